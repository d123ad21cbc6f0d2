"""Scaling laws: how the loss of a model trained from scratch falls with parameters N, data D and compute C.

Loss is that on held-out rows in nats per token, the same rows for all models of a modality. Three sweeps:

Sizes, L(N): models of all sizes, each trained once on the same number of tokens, with `seeds` seeds; depth grows with
width. The learning rate is one constant / width. For the first seed each size is also trained with other rates and
batches (`variations`); where one of them is better, all seeds of the size are moved by the difference that it makes for
this seed, so that each point is near its best. The table tells how much that was.

Data, L(D): one model on training sets of different size, a lower one a part of a higher one, for few and for many
passes; the best validation loss on the course of both counts (early stopping).

Budgets, IsoFLOP: several sizes for each of several budgets of training FLOPs; the tokens follow. N_opt is the minimum
of a parabola of log loss in log N (Hoffmann et al. 2022, approach 2); the envelope of the same points is approach 1,
the fit of L(N, D) = E + A / N^α + B / D^β to the points of sizes and budgets approach 3.

N is counted without embeddings (table of tokens and head, as Kaplan et al. 2020) and with them. C is counted on the
program: matrix products of forward and backward pass, head and attention included, which 6 N D leaves out and which
are most of it for the smallest models. The fits are those of `vfm.scaling_laws`: a cell is a size (and data), its
seeds are averaged, intervals are 95 %; what the points do not pin is called "not identified". ΔAIC is the criterion of
the exponential law less that of the power law, both with as many parameters: above 10 the power law is much better.
The error is that of the loss of the largest cell, predicted from the others.

Text is real: Python's standard library, split by file. The images (shapes), sounds (synthesised speech) and logs that
need no files are made by procedures, and say nothing of real ones; the variants with files do. Window and convolution
reach 16 tokens back in each layer.

Exponents belong to these models, tokens and budgets: the published ones (0.076 of N, 0.095 of D, for subwords and
models up to a billion parameters) are no target.
"""

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs import scaling as config
from experiments import grids
from experiments.scaling_figure import figure as figure
from experiments.scaling_points import COUNTS, Cells, Point, early_stopped, groups, near_best
from vfm import scaling_laws as laws
from vfm.errors import UserError, unknown

WARMUP = 0.05  # share of the steps


# ------------------------------------------------------------------------------------------------------- the grid


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All runs, seed by seed; raises UserError for names that are not known and numbers out of range."""
    known = {"modalities": config.MODALITIES, "architectures": config.ARCHITECTURES, "sweeps": SWEEPS}
    for field, names in known.items():
        for name in settings[field]:
            if name not in names:
                raise unknown(field, name, names, f"config.study.{field}")
    for field in ("seeds", "tokens", "batch_size"):
        if settings[field] < 1:
            raise UserError(f"config.study.{field}={settings[field]} must be at least 1")
    if not settings["rate"] > 0:
        raise UserError(f"config.study.rate={settings['rate']} must be positive")
    grid = itertools.product(
        range(settings["seeds"]), settings["modalities"], settings["architectures"], settings["sweeps"]
    )
    found = [run for seed, *what, sweep in grid for run in SWEEPS[sweep](settings, seed, *what)]
    return [run for i, run in enumerate(found) if run not in found[:i]]


def _run(settings, seed, modality, architecture, sweep, size, tokens, rate=1.0, batch=1, budget=0.0) -> dict[str, Any]:
    """The overrides of one run that is trained on about so many tokens."""
    rows = settings["batch_size"] * batch
    steps = max(2, round(tokens / (rows * config.length(modality))))
    cell = {"name": sweep, "modality": modality, "architecture": architecture}
    rule = settings["rate"] / size[0]
    other = modality != settings["own"]
    return {
        "cell": {**cell, "rate": rule, "batch": int(batch), "budget": float(budget)},
        **({"data": config.data(modality), "tokenizer": config.MODALITIES[modality]["tokenizer"]} if other else {}),
        "model": config.model(modality, architecture, *size, settings["dtype"]),
        "train.steps": steps,
        "train.batch_size": rows,
        "optimizer.learning_rate": rule * rate,
        "optimizer.schedule.warmup_steps": min(steps - 1, max(1, round(WARMUP * steps))),
        "seed": seed,
    }


def _sizes(settings, seed, modality, architecture) -> list[dict]:
    variations = [(1.0, 1), *(settings["variations"] if seed == 0 else ())]
    return [
        _run(settings, seed, modality, architecture, "sizes", size, settings["tokens"], *variation)
        for size in settings["sizes"]
        for variation in variations
    ]


def _data(settings, seed, modality, architecture) -> list[dict]:
    found, length = settings["data"], config.length(modality)
    plan = []
    for rows, passes in itertools.product(found["rows"], found["passes"]):
        if rows < 1 or passes < 1:
            raise UserError(f"config.study.data: rows={rows} and passes={passes} must be at least 1")
        tokens = min(rows * length * passes, found["tokens"])
        run = _run(settings, seed, modality, architecture, "data", found["size"], tokens)
        every = max(1, run["train.steps"] // found["evaluations"])
        more = {"data.rows.train": rows, "eval.every": every, "eval.evaluators": ("early_stopping",)}
        plan.append({**run, **more})
    return plan


def _budgets(settings, seed, modality, architecture) -> list[dict]:
    plan = []
    for budget, sizes in settings["budgets"]:
        if not budget > 0:
            raise UserError(f"config.study.budgets: a budget of {budget} FLOPs must be positive")
        for size in sizes:
            tokens = budget / flops_per_token(modality, architecture, *size)
            run = _run(settings, seed, modality, architecture, "budgets", size, tokens, budget=budget)
            plan.append(run)
    return plan


SWEEPS: dict[str, Callable[..., list[dict]]] = {"sizes": _sizes, "data": _data, "budgets": _budgets}


def flops_per_token(modality: str, architecture: str, width: int, depth: int) -> float:
    """That of `grids.flops_per_token` for a model of the study."""
    length = config.length(modality)
    backbone = config.backbone(architecture, width, depth, length)
    return grids.flops_per_token(backbone, length, config.MODALITIES[modality]["vocab_size"])


# ------------------------------------------------------------------------------------------------------ the table


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each law of each modality and architecture."""
    rows = []
    for kind, sweeps in groups(records).items():
        found = _laws(sweeps)
        rows += [dict(zip(("tokens", "architecture", "law"), (*kind, name))) | row for name, row in found.items()]
    if not rows:
        raise UserError("the records hold no sweep of the study of scaling")
    return rows


def _row(cells: Cells, exponent="", floor="", r_squared="", delta="", error="", note="") -> dict[str, Any]:
    return {
        "cells": cells,
        "exponent [95 %]": exponent,
        "irreducible loss": floor,
        "R², log–log": r_squared,
        "ΔAIC, exponential": delta,
        "largest predicted, error in %": error,
        "note": note,
    }


def _attempt(function: Callable, *args, **settings):
    """(result, "") or (None, why there is none)."""
    try:
        return function(*args, **settings), ""
    except UserError as error:
        return None, str(error)


def _laws(sweeps: Mapping[str, Sequence[Point]]) -> dict[str, dict[str, Any]]:
    """{law: row without its kind} of one modality and architecture."""
    rows: dict[str, dict] = {}
    sizes, best = near_best(sweeps.get("sizes", ()))
    budgets = sweeps.get("budgets", ())
    if sizes:
        gain = max(gain for _, gain in best.values())
        own = sum(name == "the rule" for name, _ in best.values())
        worse = f", else {gain:.2%} worse at most" if gain else ""
        note = f"the rule for rate and batch is best for {own} of {len(best)} sizes{worse}"
        for i, count in enumerate(COUNTS):
            x = [point.n[i] for point in sizes]
            for floor in (False, True):
                name = f"L(N){' = E + …' if floor else ''}, N {count}"
                rows[name] = _of_one("N", x, sizes, floor, note if not i and not floor else "", best)
    if "data" in sweeps:
        stopped = early_stopped(sweeps["data"])
        for floor in (False, True):
            name = f"L(D){' = E + …' if floor else ''}"
            rows[name] = _of_one("D", [point.rows for point in stopped], stopped, floor)
    if budgets:
        for i, count in enumerate(COUNTS):
            rows |= _allocations(budgets, i, count) | _envelope([*sizes, *budgets], i, count)
    if budgets and sizes:
        for i, count in enumerate(COUNTS):
            rows |= _joint([*sizes, *budgets], i, count)
    return rows


def _of_one(variable, x, points, floor, note="", best=None) -> dict[str, Any]:
    """A law of one variable."""
    loss = [point.loss for point in points]
    form = "floor" if floor else "power"
    found, why = _attempt(laws.fit, form, {variable: x}, loss)
    compared, _ = _attempt(laws.compare, {variable: x}, loss, floor=floor)
    held, _ = _attempt(laws.hold_out, form, {variable: x}, loss)
    cells = Cells(tuple(x), tuple(loss), len(points), fit=found, best=best or {})
    return _row(
        cells,
        found.parameters["alpha"] if found else "",
        found.parameters["E"] if found and floor else "",
        found.r_squared if found else "",
        compared.delta_aic if compared else "",
        100 * held.error if held else "",
        note or why,
    )


def _allocations(points: Sequence[Point], count: int, name: str) -> dict[str, dict]:
    """N_opt and the least loss by budget, by IsoFLOP."""
    n, loss = [float(point.n[count]) for point in points], [point.loss for point in points]
    compute = [point.flops for point in points]
    found, why = _attempt(laws.isoflop, n, compute, loss)
    cells = Cells(tuple(n), tuple(loss), len(points), tuple(point.cell["budget"] for point in points), None, found)
    left = "; ".join(f"{p.budget:.3g} FLOPs: {p.reason}" for p in found.points if p.reason) if found else why
    r_squared = found.size.r_squared if found and found.size else ""
    rows = {f"N_opt(C), IsoFLOP, N {name}": _row(cells, found.exponent if found else "", "", r_squared, note=left)}
    if not count:
        law = found.loss if found else None
        best = [p for p in found.points if not p.reason] if found else []
        cells = Cells(tuple(p.budget for p in best) or tuple(compute), tuple(p.loss for p in best) or tuple(loss),
                      len(points), fit=law)  # fmt: skip
        held = _attempt(laws.hold_out, "power", {"C": cells.x}, cells.loss)[0] if law else None
        rows["L(C), the best of each budget"] = _row(
            cells,
            law.parameters["alpha"] if law else "",
            "",
            law.r_squared if law else "",
            error=100 * held.error if held else "",
            note="" if law else left or found.reason,
        )
    return rows


def _envelope(points: Sequence[Point], count: int, name: str) -> dict[str, dict]:
    """N_opt by the envelope: of each size the losses of all its budgets, each of a run that was trained to its end."""
    curves: dict[float, dict[float, list[float]]] = {}
    for point in points:
        budget = point.cell["budget"] or point.flops
        curves.setdefault(float(point.n[count]), {}).setdefault(budget, []).append(math.log(point.loss))
    steps = {
        size: sorted((budget, math.exp(statistics.fmean(values))) for budget, values in found.items())
        for size, found in curves.items()
        if len(found) > 1
    }
    if not steps:
        return {}
    compute, loss = ([[step[i] for step in found] for found in steps.values()] for i in (0, 1))
    above, why = _attempt(laws.envelope, list(steps), compute, loss)
    flat = [(size, *step) for size, found in steps.items() for step in found]
    x, budgets, losses = zip(*flat)
    row = _row(Cells(x, losses, len(points), budgets), above.exponent if above else "", note=why)
    return {f"N_opt(C), envelope, N {name}": row}


def _joint(points: Sequence[Point], count: int, name: str) -> dict[str, dict]:
    """The exponents of L(N, D), and of the N and D that it calls optimal."""
    n, d = [float(point.n[count]) for point in points], [point.tokens for point in points]
    loss = [point.loss for point in points]
    law, why = _attempt(laws.parametric, n, d, loss)
    held, _ = _attempt(laws.hold_out, "chinchilla", {"N": n, "D": d}, loss, huber=1e-3)
    cells = Cells(tuple(n), tuple(loss), len(points), tuple(d), law)
    if law is None:
        return {f"L(N, D), N {name}": _row(cells, note=why)}
    values = law.parameters
    optimum = laws.compute_optimal(law, max(point.flops for point in points))
    shown = (values["E"], law.r_squared, "", 100 * held.error if held else "")
    return {
        f"L(N, D), α of N {name}": _row(cells, values["alpha"], *shown),
        f"L(N, D), β of D, N {name}": _row(cells, values["beta"], *shown),
        f"N_opt(C), L(N, D), N {name}": _row(cells, optimum.a),
    }


def files(records: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """{name: content} of files beside the table: the laws of each modality and architecture as `scaling_laws.load`
    reads them, for `config.mode=plan`. N is that with embeddings, for which C = flops · N · D holds best."""
    found = {}
    for (modality, architecture), sweeps in groups(records).items():
        sizes, _ = near_best(sweeps.get("sizes", ()))
        points = [*sizes, *sweeps.get("budgets", ())]
        stopped = sweeps.get("data", ())
        kept = {
            "N": _either("N", [p.n[1] for p in sizes], sizes),
            "D": _either("D", [p.rows for p in early_stopped(stopped)], early_stopped(stopped)),
            "C": getattr(_attempt(laws.isoflop, *_columns(sweeps.get("budgets", ())))[0], "loss", None),
            "joint": _attempt(laws.parametric, [p.n[1] for p in points], [p.tokens for p in points],
                              [p.loss for p in points])[0],
            "gap": _gap(stopped),
        }  # fmt: skip
        kept = {name: law for name, law in kept.items() if law is not None}
        if not kept:
            continue
        every = [*points, *stopped]
        ratio = statistics.median(p.flops / (p.n[1] * p.tokens) for p in every)
        first = next(r for r in records if r["config"]["cell"]["modality"] == modality)
        about = {
            "study": "experiments.scaling",
            "tokens": modality,
            "architecture": architecture,
            "tokenizer": first["config"]["tokenizer"]["name"],
            "device": first["device"],
            "versions": first["versions"],
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "laws.json"
            laws.save(path, kept, count="total", flops=ratio, about=about)
            found[f"laws_{modality}_{architecture}.json"] = path.read_bytes()
    return found


def _columns(points: Sequence[Point]):
    return [p.n[1] for p in points], [p.flops for p in points], [p.loss for p in points]


def _either(variable: str, x: Sequence[float], points: Sequence[Point]):
    """The law with an irreducible loss where the points tell it, else without; None if there is none."""
    loss = [point.loss for point in points]
    floor = _attempt(laws.fit, "floor", {variable: x}, loss)[0]
    if floor is not None and floor.identified and floor.parameters["E"].identified:
        return floor
    return _attempt(laws.fit, "power", {variable: x}, loss)[0]


def _gap(points: Sequence[Point]):
    """The gap between validation and training loss by unique tokens per parameter and passes over them."""
    open_ = [point for point in points if point.gap > 0]
    x = {"D_over_N": [p.rows / p.n[1] for p in open_], "epochs": [p.tokens / p.rows for p in open_]}
    return _attempt(laws.fit, "product", x, [point.gap for point in open_])[0]


# ------------------------------------------------------------------------------------------- expectations, figure


def expectations(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was expected before the runs, with its source, what was found, and whether it held."""
    rows = []

    def expect(what: str, source: str, found: str, held: bool | None) -> None:
        told = "cannot be told" if held is None else "yes" if held else "no"
        rows.append({"expected": what, "source": source, "found": found, "held": told})

    exponent = "exponent [95 %]"
    plain = [row for row in table if row["law"] == f"L(N), N {COUNTS[0]}" and row["cells"].fit is not None]
    name = lambda row: f"{row['tokens']}, {row['architecture']}"
    for row in plain:
        r, delta, error = row["R², log–log"], row["ΔAIC, exponential"], row["largest predicted, error in %"]
        expect(f"L(N) of {name(row)}: a power law, R² ≥ 0.98", "Kaplan et al. 2020, figure 6", f"{r:.4f}", r >= 0.98)
        if delta != "":
            expect("… and no exponential one, ΔAIC > 10", "the same", f"{delta:.1f}", delta > 10)
        if error != "":
            what = "… that predicts the largest model within 2 %"
            expect(what, "Hoffmann et al. 2022, section 3", f"{error:+.2f} %", abs(error) <= 2)
    for row in table:
        error = row["largest predicted, error in %"]
        if row["law"] == f"L(N) = E + …, N {COUNTS[0]}" and error != "":
            what = f"L(N) of {name(row)} with an irreducible loss predicts the largest model within 2 %"
            expect(what, "Henighan et al. 2020", f"{error:+.2f} %", abs(error) <= 2)
    for row in table:
        if row["law"] in (f"L(N), N {COUNTS[0]}", "L(D)") and row["cells"].fit is not None:
            law = row["law"].partition(",")[0]
            value = row[exponent]
            falls = value.low > 0 if value.identified else None
            expect(f"{law} of {name(row)} falls", "Kaplan et al. 2020", str(value), falls)
    fitted = lambda count: [r for r in table if r["law"] == f"L(N), N {count}" and r["R², log–log"] != ""]
    for a, b in zip(*map(fitted, COUNTS)):
        bare, whole = a["R², log–log"], b["R², log–log"]
        what = f"{name(a)}: straighter without embeddings than with them"
        expect(what, "Kaplan et al. 2020, figure 6", f"R² {bare:.4f} and {whole:.4f}", bare >= whole)
    vanilla = {row["tokens"]: row[exponent] for row in plain if row["architecture"] == "vanilla"}
    for row in plain:
        ours = vanilla.get(row["tokens"])
        if row["architecture"] != "vanilla" and ours is not None:
            what = f"{row['tokens']}: vanilla scales at least as steeply as {row['architecture']}"
            other = row[exponent]
            steeper = ours.value >= other.value if _apart(ours, other) else None
            expect(what, "Tay et al. 2022", f"{ours} and {other}", steeper)
    if len(vanilla) > 1:
        apart = [(a, b) for a, b in itertools.combinations(vanilla, 2) if _apart(vanilla[a], vanilla[b])]
        found = ", ".join(f"{name} {value}" for name, value in vanilla.items())
        expect(
            "exponents of modalities differ, beyond their intervals", "Henighan et al. 2020", found, bool(apart) or None
        )
    for row in table:
        if row["law"] == f"N_opt(C), IsoFLOP, N {COUNTS[1]}" and row[exponent] != "":
            a = row[exponent]
            what = f"{name(row)}: N_opt and D_opt grow alike, N_opt ∝ C^0.5"
            expect(what, "Hoffmann et al. 2022, table 2", str(a), a.low <= 0.5 <= a.high if a.identified else None)
    return rows


def _apart(a, b) -> bool:
    return a.identified and b.identified and (a.low > b.high or b.low > a.high)
