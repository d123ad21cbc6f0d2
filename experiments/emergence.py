"""Where an ability appears: small models trained from scratch, in forms of an answer with and without its steps.

Sums (`configs/emergence.py`): numbers of three digits, the answer as it is ("plain"), its lowest digit first
("reversed"), or behind the sums of all places ("scratchpad", a chain of thought that is trained). Two hops (`:hops`):
who is the mother of someone's father, over a random graph whose facts are all known; the answer alone ("direct"), or
behind the one in between ("chain").

All forms get the same FLOPs, to whole steps between checkpoints: longer rows, fewer steps. The exact match is that of
what counts of an answer, the sum or the last person, as greedy decoding writes it for questions of the test split, none
of which was trained on. Beside it stand two measures of the same models that change gradually: the log-likelihood in
nats per token of the whole answer (of the scratchpad too, so that it compares sizes of one form, and not forms) and the
edit distance of the answer, from 0 to 1.

A threshold is where a sigmoid that was fitted to the exact match of all seeds comes to 50 %: in examples and in
parameters over the models of a series, in steps and in training FLOPs over the checkpoints of one model. In brackets
its 95 % interval, from a bootstrap over seeds. Learning rates are those that were best for each form in a sweep
(`:rates`).

Prompted (`:prompted`): questions of two hops behind two solved ones. For half of the pairs of relations no question was
ever trained with a chain, and these alone are asked: behind direct answers, and behind chains of other pairs. Some
models have been trained on chains of the other pairs too, behind chains; the rest on direct answers alone.

The survey says that chains of thought make the point of emergence come earlier.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student

from configs import emergence as config
from experiments.grids import flops_per_token
from experiments.records import Spread, spread
from vfm.errors import UserError, unknown
from vfm.thresholds import Threshold, threshold

SERIES = ("examples", "widths", "digits", "rates", "prompted", "hops")
MATCH, LIKELIHOOD, DISTANCE = "answer_final_match", "answer_log_likelihood", "answer_edit_distance"
MEASURES = {"exact match": MATCH, "log-likelihood": LIKELIHOOD, "edit distance": DISTANCE}
AMOUNTS = ("examples", "parameters")  # what a threshold over models may be in
GAIN = 0.1  # of exact match, from which on a way of asking is said to help
# How questions are asked of the models of `:prompted`, and what these were trained on.
SHOWN = {"": "behind direct answers", "chain_shots_": "behind chains"}
TRAINED = {False: "no chains trained", True: "some chains trained"}
# What a form is held against.
STEPS = {"scratchpad": "plain", "reversed": "plain", "chain": "direct"}
STEPS |= {f"{SHOWN['chain_shots_']}, {TRAINED[True]}": f"{SHOWN['']}, {TRAINED[True]}"}


# ------------------------------------------------------------------------------------------------- the grid


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models of all series with all seeds, seed by seed; one that is in two series is made once."""
    for name in settings["series"]:
        if name not in SERIES:
            raise unknown("series", name, SERIES, "config.study.series")
    if settings["seeds"] < 1:
        raise UserError(f"config.study.seeds={settings['seeds']} must be at least 1")
    if not 1 <= settings["evaluations"] <= settings["steps"]:
        raise UserError(f"config.study.evaluations={settings['evaluations']} must be from 1 to config.study.steps")
    cells: list[dict] = []
    for name in settings["series"]:
        cells += [cell for cell in _SERIES[name](settings) if cell not in cells]
    return [_seeded(cell, seed) for seed in range(settings["seeds"]) for cell in cells]


def _seeded(cell: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A model with a seed of its own, of its questions too."""
    return {**cell, "seed": seed, "data.source.seed": seed}


def _sums(settings: Mapping[str, Any], form: str, **changes) -> dict[str, Any]:
    """The overrides of one model of sums; changes: examples, digits, width, rate."""
    chosen = {"examples": settings["most_examples"], "digits": settings["digits"], "width": settings["width"]}
    chosen |= {"rate": settings["learning_rates"][form], **changes}
    length, width = row_length(form, chosen["digits"]), chosen["width"]
    return {
        "data.source.form": form,
        "data.source.examples": chosen["examples"],
        "data.source.digits": chosen["digits"],
        "data.shots": 0,
        "data.length": length,
        "optimizer.learning_rate": chosen["rate"],
        **config.size(width),
        **_schedule(settings, _share(length, row_length("plain", settings["digits"]), width, config.SYMBOLS)),
    }


def row_length(form: str, digits: int) -> int:
    """Tokens of the longest row of sums: <bos>, "a+b=", the answer, <eos>."""
    answer = digits + 1 + (9 * digits if form == "scratchpad" else 0)
    return 1 + 2 * digits + 2 + answer + 1


def _share(length: int, other: int, width: int, symbols: Sequence[str]) -> float:
    """The FLOPs of a row of `other` tokens over those of one of `length`."""
    vocabulary = len(symbols) + config.SPECIALS
    backbone = config.model(vocabulary, width, config.DEPTH, length)["backbone"]
    cost = lambda length: length * flops_per_token(backbone, length, vocabulary)
    return cost(other) / cost(length)


def _schedule(settings: Mapping[str, Any], share: float) -> dict[str, int]:
    """Steps and checkpoints of a model that makes a share of the study's steps, to whole steps between checkpoints."""
    every = max(round(settings["steps"] * share / settings["evaluations"]), 1)
    return {"train.steps": every * settings["evaluations"], "eval.every": every}


def _prompted(settings: Mapping[str, Any]) -> list[dict]:
    """Relations, questions behind two solved ones: width × with and without chains of other pairs in training."""
    return [
        {
            "data.source.chain": chains,
            "data.source.both": chains,
            **config.size(width),
            **_schedule(settings, 1.0),
        }
        for width in settings["widths"]
        for chains in (False, True)
    ]


def _hops(settings: Mapping[str, Any]) -> list[dict]:
    """Relations: share of the questions of two hops that the training split has × with and without what is between."""
    return [
        {
            "data.source.fractions": {"train": share, "validation": (1 - share) / 2, "test": (1 - share) / 2},
            "data.source.chain": chain,
            "data.length": 9 if chain else 7,
            **_schedule(settings, _share(9 if chain else 7, 7, config.HOPS_WIDTH, config.HOPS_SYMBOLS)),
        }
        for share in settings["shares"]
        for chain in (False, True)
    ]


_FORMS = ("plain", "reversed", "scratchpad")
_SERIES = {
    "examples": lambda s: [_sums(s, form, examples=n) for n in s["examples"] for form in _FORMS],
    "widths": lambda s: [_sums(s, form, width=width) for width in s["widths"] for form in _FORMS],
    "digits": lambda s: [_sums(s, form, digits=digits) for digits in s["numbers"] for form in _FORMS],
    "rates": lambda s: [_sums(s, form, rate=rate) for rate in s["rates"] for form in _FORMS],
    "prompted": _prompted,
    "hops": _hops,
}


# ------------------------------------------------------------------------------------------------ the table


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model, over its seeds, with the thresholds over its checkpoints and those of its series."""
    groups: dict[tuple, list] = {}
    for record in records:
        for asked in _asked(record):
            metrics = {name: f"{asked}{metric}" for name, metric in MEASURES.items()}
            if missing := [metric for metric in metrics.values() if metric not in record["metrics"]]:
                raise UserError(
                    f"run {record['run']} has no {', '.join(missing)}: the study needs the evaluator 'answers'"
                )
            groups.setdefault(tuple(_cell(record, asked).items()), []).append((record, asked))
    order = sorted(groups, key=lambda cell: [(str(type(v)), v) for v in dict(cell).values()])
    rows = [{**dict(cell), **_scores(groups[cell])} for cell in order]
    seeds = [[record["metrics"][f"{asked}{MATCH}"] for record, asked in groups[cell]] for cell in order]
    for amount in AMOUNTS:
        for places in _series([*rows], amount):
            x, y = zip(*((rows[i][amount], score) for i in places for score in seeds[i]))
            found = threshold(x, y)
            for i in places:
                rows[i][f"50 % at {amount}"] = found
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    return [{column: row.get(column, "–") for column in columns} for row in rows]


def _asked(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What the metrics of a record begin with, for each way in which its questions were asked."""
    return ("", *(f"{name}_" for name in record["config"]["eval"].get("answers", {}).get("prompts", {})))


def _cell(record: Mapping[str, Any], asked: str = "") -> dict[str, Any]:
    """What tells the rows of the table apart: a model, and how it was asked."""
    config, source = record["config"], record["config"]["data"]["source"]
    if source["name"] == "relations":
        share = source["fractions"]["train"]
        two_hop = source["entities"] * len(source["relations"]) ** 2
        about = {"form": "chain" if source["chain"] else "direct", "examples": round(share * two_hop)}
    else:
        about = {"form": source["form"], "digits": source["digits"], "examples": source["examples"]}
    if source.get("unchained") and asked in SHOWN:
        about["form"] = f"{SHOWN[asked]}, {TRAINED[source['chain']]}"
    elif asked:
        about["form"] += f", asked as {asked[:-1]}"
    width, rate = config["model"]["backbone"]["width"], config["optimizer"]["learning_rate"]
    return {**about, "width": width, "parameters": record["parameters"], "learning rate": rate}


def _scores(group: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, Any]:
    """Means over seeds at the end, and the thresholds over the checkpoints; of (record, how it was asked)."""
    one, asked = group[0]
    steps = one["config"]["train"]["steps"]
    found = {"seeds": len(group), "steps": steps, "training FLOPs": float(one["flops"])}
    for name, metric in MEASURES.items():
        found[name] = spread(record["metrics"][f"{asked}{metric}"] for record, _ in group)
    points = [(step, value, r["run"]) for r, _ in group for step, value in course(r, f"{asked}{MATCH}")]
    if len({step for step, *_ in points}) > 2:
        x, y, runs = zip(*points)
        reached = threshold(x, y, groups=runs)
        found |= {"50 % at steps": reached, "50 % at FLOPs": reached.scaled(one["flops"] / steps)}
    return found


def course(record: Mapping[str, Any], metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric at the checkpoints of a run, and at its end."""
    lead = f"course_{metric}_at_"
    found = [(int(name[len(lead) :]), value) for name, value in record["metrics"].items() if name.startswith(lead)]
    return sorted({**dict(found), record["config"]["train"]["steps"]: record["metrics"][metric]}.items())


def _series(rows: Sequence[Mapping[str, Any]], amount: str) -> list[list[int]]:
    """The places of rows that differ in one amount and what comes with it; three or more of them."""
    free = ("width", "parameters") if amount == "parameters" else (amount,)
    about = ("form", "digits", "examples", "width", "parameters", "learning rate")
    found: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(tuple(row.get(name) for name in about if name not in free), []).append(i)
    several = [places for places in found.values() if len({rows[i].get(amount) for i in places}) > 2]
    return [sorted(places, key=lambda i: rows[i][amount]) for places in several]


# ------------------------------------------------------------------------------ what was expected, and figures


def expectations(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The survey's claim and others, beside what was seen."""
    rows = []
    lengths = sorted({row.get("digits") for row in table}, key=str)
    for column, digits in itertools.product(("50 % at examples", "50 % at parameters", "50 % at FLOPs"), lengths):
        for form, base in STEPS.items():
            rows_of = [_of_form(table, name, column, digits) for name in (form, base)]
            if None in rows_of:
                continue
            ours, theirs = (row[column] for row in rows_of)
            told = all(row["seeds"] > 1 for row in rows_of)
            of = f", numbers of {digits} digits" if len(lengths) > 1 else ""
            who = "Lee et al. 2023" if form == "reversed" else "the survey, §1.5: chain of thought"
            rows.append(
                {
                    "expected": f"{form} is earlier than {base} in {column.removeprefix('50 % at ')}{of}",
                    "by": who,
                    "found": f"{form} {ours}, {base} {theirs}",
                    "held": _earlier(ours, theirs) if told else "cannot be told",
                }
            )
    return rows + _gradual(table) + _prompting(table)


def _of_form(table: Sequence[Mapping[str, Any]], form: str, column: str, digits: int | None) -> Mapping | None:
    """The row of a form's largest model with the most examples that has a threshold in a column; None where there are
    several, of other rates."""
    found = [
        row
        for row in table
        if row["form"] == form and row.get("digits") == digits and isinstance(row.get(column), Threshold)
    ]
    amounts = [tuple(row[amount] for amount in AMOUNTS) for row in found]
    largest = [row for row, amount in zip(found, amounts) if amount == max(amounts)]
    return largest[0] if len(largest) == 1 else None


def _earlier(ours: Threshold, theirs: Threshold) -> str:
    if ours.high < theirs.low:
        factor = theirs.value / ours.value
        return f"yes, {factor:.2g} times" if math.isfinite(factor) else "yes"
    if ours.low > theirs.high:
        factor = ours.value / theirs.value
        return f"no: later, {factor:.2g} times" if math.isfinite(factor) else "no: later"
    return "cannot be told"


def _gradual(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Which share of its whole change a measure makes between two neighbours of a series, at most."""
    rows = []
    for amount in AMOUNTS:
        for places in _series(table, amount):
            values = {name: [table[i][name].mean for i in places] for name in MEASURES}
            if max(values["exact match"]) - min(values["exact match"]) < 0.5:
                continue
            shares = {name: _largest_step(found) for name, found in values.items()}
            held = shares["exact match"] > 1.25 * shares["log-likelihood"]
            rows.append(
                {
                    "expected": f"{table[places[0]]['form']}, by {amount}: exact match jumps where the log-likelihood "
                    "rises gradually",
                    "by": "Schaeffer et al. 2023",
                    "found": "most of the change between two neighbours: "
                    + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()),
                    "held": "yes" if held else "no",
                }
            )
    return rows


def _largest_step(values: Sequence[float]) -> float:
    total = max(values) - min(values)
    return max(abs(b - a) for a, b in itertools.pairwise(values)) / total if total else 0.0


def _prompting(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Chains in front of the question against direct answers there, for both kinds of training."""
    rows = []
    for chains, trained in TRAINED.items():
        direct, chain = (
            {row["parameters"]: row["exact match"] for row in table if row["form"] == f"{shown}, {trained}"}
            for shown in SHOWN.values()
        )
        if not direct or not chain:
            continue
        better = {size: _better(chain[size], direct[size], len(direct)) for size in direct}
        helped = [size for size in better if better[size]]
        largest = max(direct)
        found = f"{len(helped)} of {len(direct)} models of {min(direct):,} to {largest:,} parameters are better so; "
        found += f"the largest has {chain[largest]} behind chains, {direct[largest]} behind direct answers"
        if chains:
            expected = "chains in front of the question help above some scale, where those of other pairs were trained"
            held = {True: "yes", False: "no"}.get(better[largest], "cannot be told")
        else:
            expected = "without any chains in training those in front do not help"
            held = "no" if helped else "cannot be told" if None in better.values() else "yes"
        by = "Wei et al. 2022" if chains else "control"
        rows.append({"expected": expected, "by": by, "found": found, "held": held})
    return rows


def _better(a: Spread, b: Spread, comparisons: int) -> bool | None:
    """Whether a mean is above another by Welch's t, at 5 % for all comparisons together (Bonferroni); False where a
    gain of GAIN or more is ruled out; None where neither can be told."""
    if a.count < 2 or b.count < 2:
        return None
    parts = [score.deviation**2 / score.count for score in (a, b)]
    half = 0.0
    if sum(parts):
        freedom = sum(parts) ** 2 / sum(part**2 / (score.count - 1) for part, score in zip(parts, (a, b)))
        half = student.ppf(1 - 0.025 / comparisons, freedom) * math.sqrt(sum(parts))
    gain = a.mean - b.mean
    return True if gain > max(half, 0.01) else False if gain + half < GAIN else None


def figure(table: Sequence[Mapping[str, Any]]):
    """All measures of the same models: exact match, log-likelihood and edit distance, over each amount that varies."""
    from matplotlib.figure import Figure

    amounts = [amount for amount in (*AMOUNTS, "digits") if _series(table, amount)] or ["examples"]
    drawing = Figure(figsize=(1.5 + 4.5 * len(amounts), 9), layout="constrained")
    axes = drawing.subplots(len(MEASURES), len(amounts), squeeze=False, sharex="col")
    for column, amount in enumerate(amounts):
        for i, places in enumerate(_series(table, amount)):
            rows = [table[place] for place in places]
            for row, name in enumerate(MEASURES):
                values = [r[name] for r in rows]
                axes[row][column].errorbar(
                    [r[amount] for r in rows],
                    [v.mean for v in values],
                    yerr=[v.deviation for v in values],
                    marker="o",
                    capsize=2,
                    color=f"C{i}",
                    label=rows[0]["form"],
                )
            found = rows[0].get(f"50 % at {amount}")
            if isinstance(found, Threshold) and math.isfinite(found.value):
                axes[0][column].axvline(found.value, color=f"C{i}", linestyle=":")
                low = found.low if math.isfinite(found.low) else rows[0][amount]
                high = found.high if math.isfinite(found.high) else rows[-1][amount]
                if found.state != "no interval":
                    axes[0][column].axvspan(low, high, color=f"C{i}", alpha=0.1)
        for row, name in enumerate(MEASURES):
            axes[row][column].set_xscale("log")
            axes[row][column].xaxis.set_minor_formatter("")  # numbers would lie over each other
            values = sorted({r[amount] for r in table if isinstance(r.get(amount), int)})
            axes[row][column].set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
            axes[row][column].set_ylabel(name)
            axes[row][column].grid(alpha=0.3)
        axes[-1][column].set_xlabel(amount)
        if axes[0][column].get_legend_handles_labels()[0]:
            axes[0][column].legend(frameon=False)
    return drawing


def pictures(records: Sequence[Mapping[str, Any]], folder) -> dict[str, tuple[str, Any]]:
    """The courses of the models with the most examples and parameters: all measures, by steps and by FLOPs."""
    from matplotlib.figure import Figure

    with_course = [one for one in records if len(course(one, MATCH)) > 2]
    groups: dict[tuple, list] = {}
    for record, asked in ((one, asked) for one in with_course for asked in _asked(one)):
        cell = _cell(record, asked)
        found = groups.setdefault((cell["form"], cell.get("digits")), [])
        found.append(((cell["examples"], cell["parameters"]), record, asked))
    if not groups:
        return {}
    drawing = Figure(figsize=(11, 9), layout="constrained")
    axes = drawing.subplots(len(MEASURES), 2, sharey="row", sharex="col")
    several = len({digits for _, digits in groups}) > 1
    for i, ((form, digits), found) in enumerate(sorted(groups.items(), key=str)):
        largest = max(amounts for amounts, *_ in found)
        for number, (_, record, asked) in enumerate(model for model in found if model[0] == largest):
            per_step = record["flops"] / record["config"]["train"]["steps"]
            for row, metric in enumerate(MEASURES.values()):
                steps, values = zip(*course(record, f"{asked}{metric}"))
                name = f"{form}, {digits} digits" if several else form
                for column, factor in enumerate((1, per_step)):
                    axes[row][column].plot(
                        [factor * step for step in steps],
                        values,
                        color=f"C{i}",
                        alpha=0.7,
                        linewidth=1,
                        label="" if number else name,
                    )
    for row, name in enumerate(MEASURES):
        axes[row][0].set_ylabel(name)
        for column in range(2):
            axes[row][column].grid(alpha=0.3)
    axes[0][0].legend(frameon=False, fontsize=8)
    axes[-1][0].set_xlabel("steps")
    axes[-1][1].set_xlabel("training FLOPs")
    return {"courses": ("The same checkpoints by steps and by FLOPs; a line for each seed", drawing)}
