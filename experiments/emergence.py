"""Where an ability appears: small models trained from scratch, in forms of an answer with and without its steps.

Sums (`configs/emergence.py`): numbers of three digits, the answer as it is ("plain"), its lowest digit first
("reversed"), or behind the sums of all places ("scratchpad", a chain of thought that is trained). Two hops (`:hops`):
who is the mother of someone's father, over a random graph whose facts are all known; the answer alone ("direct"), or
behind the one in between ("chain").

All forms get the same FLOPs: longer rows, fewer steps. The exact match is that of what counts of an answer, the sum or
the last person, as greedy decoding writes it for questions of the test split, none of which was trained on. Beside it
stand two measures of the same models that change gradually: the log-likelihood in nats per token of the whole answer
(of the scratchpad too, so that it compares sizes of one form, and not forms) and the edit distance of the answer, from
0 to 1.

A threshold is where a sigmoid that was fitted to the exact match of all seeds comes to 50 %: in examples and in
parameters over the models of a series, in steps and in training FLOPs over the checkpoints of one model. In brackets
its 95 % interval, from a bootstrap over seeds. Learning rates are those that were best for each form in a sweep
(`:rates`).

Prompted (`:prompted`): models that were trained on plain answers alone are shown solved scratchpads in front of the
question. Beside it the same with as many plain examples in front, and models that have seen such rows of examples in
their training; the others have never seen positions so far behind, which are learned, and are only their control.

The survey says that chains of thought make the point of emergence come earlier.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from configs import emergence as config
from experiments.records import Spread, spread
from vfm.errors import UserError, unknown
from vfm.thresholds import Threshold, threshold

SERIES = ("examples", "widths", "digits", "rates", "prompted", "hops")
MATCH, LIKELIHOOD, DISTANCE = "answer_final_match", "answer_log_likelihood", "answer_edit_distance"
MEASURES = {"exact match": MATCH, "log-likelihood": LIKELIHOOD, "edit distance": DISTANCE}
PROMPTS = {"behind plain examples": "plain_shots", "behind solved scratchpads": "scratchpad_shots"}
AMOUNTS = ("examples", "parameters")  # what a threshold over models may be in
STEPS = {"scratchpad": "plain", "reversed": "plain", "chain": "direct"}  # what a form is held against


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
    found = {**cell, "seed": seed, "data.source.seed": seed}
    if prompts := cell.get("eval.answers.prompts"):
        shown = {**prompts["scratchpad_shots"]["shots_source"], "seed": seed}
        found["eval.answers.prompts"] = {
            **prompts,
            "scratchpad_shots": {**prompts["scratchpad_shots"], "shots_source": shown},
        }
    return found


def _sums(settings: Mapping[str, Any], form: str, **changes) -> dict[str, Any]:
    """The overrides of one model of sums; changes: examples, digits, width, rate, shots, prompted."""
    chosen = {"examples": settings["most_examples"], "digits": settings["digits"], "width": settings["width"]}
    chosen |= {"rate": settings["learning_rates"][form], "shots": 0, "prompted": False, **changes}
    digits, shots = chosen["digits"], chosen["shots"]
    length = row_length(form, digits) + shots * shot_length(form, digits)
    found = {
        "data.source.form": form,
        "data.source.examples": chosen["examples"],
        "data.source.digits": digits,
        "data.shots": shots,
        "data.length": length,
        "optimizer.learning_rate": chosen["rate"],
        **config.size(chosen["width"]),
        **_schedule(settings, length, row_length("plain", settings["digits"])),
    }
    if chosen["prompted"]:
        more = {form: settings["shots"] * shot_length(form, digits) + row_length("plain", digits) for form in
                ("plain", "scratchpad")}  # fmt: skip
        source = {"name": "addition", "digits": digits, "form": "scratchpad", "examples": chosen["examples"]}
        source["sizes"] = dict(settings["sizes"])  # so that none of its training examples is a question
        found |= {
            "eval.every": 0,
            "eval.evaluators": ("answers",),
            "eval.answers.prompts": {
                "plain_shots": {"shots": settings["shots"], "length": more["plain"]},
                "scratchpad_shots": {
                    "shots": settings["shots"],
                    "length": more["scratchpad"],
                    "shots_source": source,
                },
            },
        }
    return found


def row_length(form: str, digits: int) -> int:
    """Tokens of the longest row of sums: <bos>, "a+b=", the answer, <eos>."""
    answer = digits + 1 + (9 * digits if form == "scratchpad" else 0)
    return 1 + 2 * digits + 2 + answer + 1


def shot_length(form: str, digits: int) -> int:
    """Tokens of a solved example: a row without <bos> and <eos>, and a separator."""
    return row_length(form, digits) - 2 + 1


def _schedule(settings: Mapping[str, Any], length: int, shortest: int) -> dict[str, int]:
    """Steps and checkpoints of a model whose rows are `length` tokens: as many tokens in all as the plain form has."""
    every = max(round(settings["steps"] * shortest / length / settings["evaluations"]), 1)
    return {"train.steps": every * settings["evaluations"], "eval.every": every}


def _prompted(settings: Mapping[str, Any]) -> list[dict]:
    return [
        _sums(settings, "plain", width=width, shots=shots, prompted=True)
        for width in settings["widths"]
        for shots in (0, settings["shots"])
    ]


def _hops(settings: Mapping[str, Any]) -> list[dict]:
    """Relations: share of the questions of two hops that the training split has × with and without what is between."""
    return [
        {
            "data.source.fractions": {"train": share, "validation": (1 - share) / 2, "test": (1 - share) / 2},
            "data.source.chain": chain,
            "data.length": 9 if chain else 7,
            **_schedule(settings, 9 if chain else 7, 7),
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
        if missing := [name for name in MEASURES.values() if name not in record["metrics"]]:
            raise UserError(f"run {record['run']} has no {', '.join(missing)}: the study needs the evaluator 'answers'")
        groups.setdefault(tuple(_cell(record).items()), []).append(record)
    order = sorted(groups, key=lambda cell: [(str(type(v)), v) for v in dict(cell).values()])
    rows = [{**dict(cell), **_scores(groups[cell])} for cell in order]
    seeds = [[record["metrics"][MATCH] for record in groups[cell]] for cell in order]
    for amount in AMOUNTS:
        for places in _series([*rows], amount):
            x, y = zip(*((rows[i][amount], score) for i in places for score in seeds[i]))
            found = threshold(x, y)
            for i in places:
                rows[i][f"50 % at {amount}"] = found
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    return [{column: row.get(column, "–") for column in columns} for row in rows]


def _cell(record: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the models of the study apart."""
    config, source = record["config"], record["config"]["data"]["source"]
    if source["name"] == "relations":
        share = source["fractions"]["train"]
        two_hop = source["entities"] * len(source["relations"]) ** 2
        about = {"form": "chain" if source["chain"] else "direct", "examples": round(share * two_hop)}
    else:
        about = {"form": source["form"], "digits": source["digits"], "examples": source["examples"]}
        if config["data"]["shots"]:
            about["form"] += f", trained behind {config['data']['shots']} examples"
        if config["eval"]["answers"]["prompts"]:
            about["form"] += ", prompted"
    width, rate = config["model"]["backbone"]["width"], config["optimizer"]["learning_rate"]
    return {**about, "width": width, "parameters": record["parameters"], "learning rate": rate}


def _scores(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds at the end, and the thresholds over the checkpoints."""
    one = group[0]
    steps = one["config"]["train"]["steps"]
    gather = lambda name: spread(record["metrics"][name] for record in group)
    found = {"seeds": len(group), "steps": steps, "training FLOPs": float(one["flops"])}
    found |= {name: gather(metric) for name, metric in MEASURES.items()}
    for name, prompt in PROMPTS.items():
        if f"{prompt}_{MATCH}" in one["metrics"]:
            found[name] = gather(f"{prompt}_{MATCH}")
    points = [(step, value, record["run"]) for record in group for step, value in course(record, MATCH)]
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
            ours, theirs = (_of_form(table, name, column, digits) for name in (form, base))
            if ours is None or theirs is None:
                continue
            of = f", numbers of {digits} digits" if len(lengths) > 1 else ""
            who = "the survey, §1.5: chain of thought" if form in ("scratchpad", "chain") else "Lee et al. 2023"
            rows.append(
                {
                    "expected": f"{form} is earlier than {base} in {column.removeprefix('50 % at ')}{of}",
                    "by": who,
                    "found": f"{form} {ours}, {base} {theirs}",
                    "held": _earlier(ours, theirs),
                }
            )
    return rows + _gradual(table) + _prompting(table)


def _of_form(table: Sequence[Mapping[str, Any]], form: str, column: str, digits: int | None) -> Threshold | None:
    """The threshold of a form's largest model with the most examples."""
    found = [
        row
        for row in table
        if row["form"] == form and row.get("digits") == digits and isinstance(row.get(column), Threshold)
    ]
    return max(found, key=lambda row: (row["examples"], row["parameters"]))[column] if found else None


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
    """Solved scratchpads in front of the question against plain examples there, and against nothing."""
    ours = [row for row in table if isinstance(row.get("behind solved scratchpads"), Spread)]
    if not ours:
        return []
    helped = [
        row
        for row in ours
        if _above(row["behind solved scratchpads"], row["behind plain examples"])
        and _above(row["behind solved scratchpads"], row["exact match"])
    ]
    best = max(ours, key=lambda row: row["behind solved scratchpads"].mean)
    sizes = sorted({row["parameters"] for row in ours})
    return [
        {
            "expected": "solved scratchpads in front of the question, never trained, help above some scale",
            "by": "Wei et al. 2022",
            "found": f"{len(helped)} of {len(ours)} models of {sizes[0]:,} to {sizes[-1]:,} parameters are better so; "
            f"exact match {best['behind solved scratchpads']} at best",
            "held": "yes" if helped else "not at these scales",
        }
    ]


def _above(a: Spread, b: Spread) -> bool:
    """Whether means differ by more than two standard errors."""
    error = math.sqrt(a.deviation**2 / a.count + b.deviation**2 / b.count)
    return a.mean - b.mean > max(2 * error, 0.01)


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
                end = found.high if math.isfinite(found.high) else rows[-1][amount]
                axes[0][column].axvspan(found.low, end, color=f"C{i}", alpha=0.1)
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

    with_course = [record for record in records if len(course(record, MATCH)) > 2]
    groups: dict[tuple, list] = {}
    for record in with_course:
        cell = _cell(record)
        groups.setdefault((cell["form"], cell.get("digits")), []).append((cell["examples"], cell["parameters"], record))
    if not groups:
        return {}
    drawing = Figure(figsize=(11, 9), layout="constrained")
    axes = drawing.subplots(len(MEASURES), 2, sharey="row", sharex="col")
    several = len({digits for _, digits in groups}) > 1
    for i, ((form, digits), found) in enumerate(sorted(groups.items(), key=str)):
        largest = max((examples, size) for examples, size, _ in found)
        for number, record in enumerate(r for examples, size, r in found if (examples, size) == largest):
            per_step = record["flops"] / record["config"]["train"]["steps"]
            for row, metric in enumerate(MEASURES.values()):
                steps, values = zip(*course(record, metric))
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
