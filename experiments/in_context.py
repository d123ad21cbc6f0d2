"""In-context learning from scratch: what one layer of attention cannot do, and when two begin to.

Three tasks in which the context alone tells what comes; nothing that the weights could remember helps.

  induction   A block of random tokens, then the same block again. Blocks have different lengths, so that the copy is at
              no fixed distance. Models of attention alone, one layer against two. An induction head looks at the token
              behind an earlier occurrence of the present one; it needs a head of the layer before that tells each token
              what stood in front of it (Elhage et al. 2021, Olsson et al. 2022). Beside it, with fewer seeds, blocks of
              one length: there a single layer that looks a fixed distance back is enough, and no induction head is
              needed.
  lookup      Pairs of a key and a value, then the keys again in another order: which value? Trained on the answers.
  functions   Examples x f(x) of a function that is drawn for each sequence: f(x) by the number of examples before it.
              Functions are random tables; an input may come again, and only then can the answer be known. The models
              differ in how many functions they were trained on: few can be learnt by heart, and are known after one or
              two examples; "new" ones, another in every sequence, can only be read off the context. The test has
              functions that no model was trained on.

Late loss: nats per token that can be told, in the last quarter of the sequence. ICL score: the loss there less the loss
in the second quarter (Olsson et al. 2022). Induction head: the attention of the best head to the tokens behind earlier
occurrences of the present one; previous-token head: to the token before. Step: when validation, of 64 sequences every
20 steps, first was past the level of config.eval.course; "never" means not in these steps. (Functions of validation
are those that were trained on.) Accuracy and exact match (of
all tokens of the last quarter) jump; the loss on the same checkpoints is drawn beside them.

What was expected beforehand is in EXPECTED below; the second table says whether it held for every seed, as far as the
mean and one standard deviation tell.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import grids
from experiments.records import Spread, spread
from vfm.errors import unknown

ONE, TWO = {"model.backbone.depth": 1}, {"model.backbone.depth": 2}
BLOCK = 48  # of the config; a shortest block as long as the longest: one length
FUNCTIONS = {"8 functions": 8, "64 functions": 64, "512 functions": 512, "new functions": 0}
TASKS: dict[str, tuple[dict, dict]] = {  # schemes, variations
    "induction": (
        {"1 layer": ONE, "2 layers": TWO},
        {
            "1 layer, one length": {**ONE, "data.source.least": BLOCK},
            "2 layers, one length": {**TWO, "data.source.least": BLOCK},
        },
    ),
    "lookup": ({"1 layer, lookup": ONE, "2 layers, lookup": TWO}, {}),
    "functions": (
        {
            "1 layer, new functions": {**ONE, "data.source.functions": 0},
            **{f"2 layers, {name}": {**TWO, "data.source.functions": count} for name, count in FUNCTIONS.items()},
        },
        {},
    ),
}
SOURCES = {"repeated": "induction", "lookup": "lookup", "functions": "functions"}  # source of the data -> task

# Column -> metric of a run.
COLUMNS = {
    "late loss": "late_loss",
    "late accuracy": "late_accuracy",
    "late exact match": "late_exact_match",
    "ICL score": "icl_score",
    "induction head": "induction_score",
    "previous-token head": "previous_token_score",
}
STEPS = {  # the first step at which validation was at the level of config.eval.course
    "step of the loss": "late_loss",
    "step of the ICL score": "icl_score",
    "step of the head": "induction_score",
}
NEVER = "never"


class Expected(NamedTuple):
    """That a column of a scheme is below (sign -1) or above (1) a bound: a number, or a column of the same scheme plus
    a number. Of a column of steps, bound None: that it was never reached."""

    what: str
    source: str
    scheme: str
    column: str
    sign: int
    bound: Any


EXPECTED = (
    Expected("Two layers copy", "Olsson et al. 2022", "2 layers", "late loss", -1, 0.3),
    Expected("One layer does not", "Olsson et al. 2022", "1 layer", "late loss", 1, 2.0),
    Expected("Two layers have an induction head", "Olsson et al. 2022", "2 layers", "induction head", 1, 0.5),
    Expected("and a previous-token head", "Elhage et al. 2021", "2 layers", "previous-token head", 1, 0.2),
    Expected("One layer has no induction head", "Elhage et al. 2021", "1 layer", "induction head", -1, 0.2),
    Expected("One layer never comes to the level", "Olsson et al. 2022", "1 layer", "step of the ICL score", 0, None),
    Expected("ICL score and induction head change together: not later than by 60 steps", "Olsson et al. 2022",
             "2 layers", "step of the ICL score", -1, ("step of the head", 60)),
    Expected("and not earlier", "Olsson et al. 2022",
             "2 layers", "step of the ICL score", 1, ("step of the head", -60)),
    Expected("At one distance one layer copies as well", "it can look a fixed number of tokens back",
             "1 layer, one length", "late loss", -1, 0.3),
    Expected("At one distance two layers need no previous-token head", "the same",
             "2 layers, one length", "previous-token head", -1, 0.1),
    Expected("Two layers look up", "Arora et al. 2023", "2 layers, lookup", "late loss", -1, 0.3),
    Expected("with an induction head", "Olsson et al. 2022", "2 layers, lookup", "induction head", 1, 0.5),
    Expected("One layer does not: it knows that the value is one of those shown", "as induction",
             "1 layer, lookup", "late loss", 1, 1.0),
    Expected("On new functions accuracy rises with the shots", "Garg et al. 2022",
             "2 layers, new functions", "accuracy, most shots", 1, ("accuracy, 1 shot", 0.3)),
    Expected("not with one layer", "as induction", "1 layer, new functions", "accuracy, most shots", -1,
             ("accuracy, 1 shot", 0.3)),
    Expected("Few functions are learnt by heart: others are not told from examples", "Raventós et al. 2023",
             "2 layers, 8 functions", "accuracy, most shots", -1, ("trained ones: accuracy, most shots", -0.3)),
    Expected("Many are not: others are told as well", "Raventós et al. 2023",
             "2 layers, 512 functions", "accuracy, most shots", 1, ("trained ones: accuracy, most shots", -0.1)),
)  # fmt: skip


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All schemes of a task with all seeds, seed by seed, then its variations with `variation_seeds` seeds."""
    if settings["task"] not in TASKS:
        raise unknown("task", settings["task"], TASKS, "config.study.task")
    return grids.seeded(settings, *TASKS[settings["task"]])


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each scheme, over its seeds."""
    rows = []
    for name, group in _groups(records).items():
        measured = [record["metrics"] for record in group]
        gather = lambda metric, measured=measured: (
            spread(values) if (values := [found[metric] for found in measured if metric in found]) else "–"
        )
        row: dict[str, Any] = {"scheme": name, "seeds": len(group)}
        row |= {column: gather(metric) for column, metric in COLUMNS.items()}
        row |= {column: _step(measured, metric) for column, metric in STEPS.items()}
        shots = _shots(measured[0])
        if len(shots) > 1 and shots[0] == 0:
            chosen = {"no shot": 0, "1 shot": 1, "most shots": shots[-1]}
            row |= {f"accuracy, {words}": gather(f"accuracy_{k}_shots") for words, k in chosen.items()}
            trained = {words: gather(f"validation_accuracy_{k}_shots") for words, k in chosen.items()}
            row |= {f"trained ones: accuracy, {words}": value for words, value in trained.items()}
        row |= {"parameters": group[0]["parameters"], "training FLOPs": float(group[0]["flops"])}
        row["seconds"] = spread(record["seconds"] for record in group)
        rows.append(row)
    return rows


def _groups(records: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """{scheme: its records}, in the order of the schemes."""
    groups: dict[str, list] = {name: [] for task in TASKS.values() for group in task for name in group}
    for record in records:
        schemes, variations = TASKS[SOURCES[record["config"]["data"]["source"]["name"]]]
        groups.setdefault(grids.scheme(record, {**schemes, **variations}), []).append(record)
    return {name: group for name, group in groups.items() if group}


def _step(measured: Sequence[Mapping[str, float]], metric: str) -> Spread | str:
    """When the level was reached; in words where not by all seeds, and of a metric that was not measured."""
    if not any(metric in metrics for metrics in measured):
        return "–"
    found = [metrics[key] for metrics in measured if (key := f"course_{metric}_first_step") in metrics]
    if not found:
        return NEVER
    return spread(found) if len(found) == len(measured) else f"{spread(found)}, by {len(found)} of {len(measured)}"


def _shots(metrics: Mapping[str, float], before: str = "") -> list[int]:
    """The numbers of shots for which there is an accuracy."""
    start, end = f"{before}accuracy_", "_shots"
    found = [name[len(start) : -len(end)] for name in metrics if name.startswith(start) and name.endswith(end)]
    return sorted(int(k) for k in found if k.isdecimal())


def expectations(table: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What was expected, what was found, and whether it held; of the schemes that were run."""
    rows, found = {row["scheme"]: row for row in table}, []
    for item in EXPECTED:
        row = rows.get(item.scheme, {})
        value, bound, more = row.get(item.column, "–"), item.bound, 0.0
        if value == "–":
            continue
        words = {-1: f"{item.column} < {bound}", 1: f"{item.column} > {bound}", 0: f"{item.column}: {NEVER}"}[item.sign]
        seen = str(value)
        if isinstance(bound, tuple):
            other, more = bound
            words = f"{item.column} {'<' if item.sign < 0 else '>'} {other} {'+' if more >= 0 else '−'} {abs(more):g}"
            bound = row.get(other, "–")
            seen += f", {bound}"
        if item.sign == 0:
            held = "yes" if value == NEVER else "no"
        elif isinstance(value, Spread) and isinstance(bound, Spread | float):
            there = bound if isinstance(bound, Spread) else Spread(bound, 0.0, 1)
            distance = item.sign * (value.mean - there.mean - more)
            held = "yes" if distance > value.deviation + there.deviation else "within the spread"
            held = held if distance > 0 else "no"
        else:
            held = "no"
        line = {"expected": item.what, "source": item.source, "that is": f"{item.scheme}: {words}"}
        found.append({**line, "found": seen, "held": held})
    return found


def figure(table: Sequence[Mapping[str, Any]]):
    """Bars of what every scheme came to; lines are standard deviations."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(13, 1.5 + 0.4 * len(table)), layout="constrained")
    for i, column in enumerate(COLUMNS):
        axes = drawing.add_subplot(1, len(COLUMNS), i + 1)
        for place, row in enumerate(table):
            if isinstance(value := row[column], Spread):
                axes.barh(place, value.mean, xerr=value.deviation, color=f"C{i}", alpha=0.8)
        axes.set_yticks(range(len(table)), [row["scheme"] for row in table])
        axes.invert_yaxis()
        axes.set_title(column, fontsize=10)
        axes.tick_params(labelleft=i == 0, labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    return drawing


def pictures(records: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, tuple[str, Any]]:
    """The course of the training, loss by position, and accuracy and loss by shots; all from the records."""
    groups = _groups(records)
    caption = (
        "The course of the training on validation, one line for each seed: accuracy and exact match, which jump, the "
        "loss on the same checkpoints, and what the heads look at"
    )
    found = {
        "course": (caption, _course(groups)),
        "positions": ("Loss by position in test sequences; bands are standard deviations", _positions(groups)),
    }
    if any(len(_shots(group[0]["metrics"])) > 1 for group in groups.values()):
        caption = "Accuracy and loss by the number of examples before; dashed: functions that were trained on"
        found["shots"] = (caption, _by_shots(groups))
    return found


def _band(axes, x, values: np.ndarray, **style) -> None:
    """Mean and standard deviation of values [seeds, points]."""
    mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
    axes.plot(x, mean, marker=".", **style)
    axes.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.2, linewidth=0)


def _positions(groups: Mapping[str, Sequence]):
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 4), layout="constrained")
    axes = drawing.add_subplot()
    for i, (name, group) in enumerate(groups.items()):
        starts = [int(key.removeprefix("loss_from_")) for key in group[0]["metrics"] if key.startswith("loss_from_")]
        values = np.array([[record["metrics"][f"loss_from_{start}"] for start in starts] for record in group])
        _band(axes, starts, values, color=f"C{i}", label=name)
    axes.set(xlabel="from token", ylabel="loss, nats")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return drawing


def _by_shots(groups: Mapping[str, Sequence]):
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4), layout="constrained")
    for axes, metric in zip(drawing.subplots(1, 2), ("accuracy", "loss")):
        for i, (name, group) in enumerate(groups.items()):
            for before, style in (("", "-"), ("validation_", "--")):
                shots = _shots(group[0]["metrics"], before)
                values = [[record["metrics"][f"{before}{metric}_{k}_shots"] for k in shots] for record in group]
                if shots:
                    label = None if before else name
                    _band(axes, shots, np.array(values), color=f"C{i}", linestyle=style, label=label)
        axes.set(xlabel="shots", ylabel=metric if metric == "accuracy" else "loss, nats")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return drawing


def _course(groups: Mapping[str, Sequence]):
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(13, 6.5), layout="constrained")
    for axes, (column, metric) in zip(drawing.subplots(2, 3).ravel(), COLUMNS.items()):
        before = f"course_{metric}_at_"
        for i, (name, group) in enumerate(groups.items()):
            for number, record in enumerate(group):
                points = [
                    (int(k.removeprefix(before)), v) for k, v in record["metrics"].items() if k.startswith(before)
                ]
                if points:
                    label = None if number else name
                    axes.plot(*zip(*sorted(points)), color=f"C{i}", alpha=0.7, linewidth=1, label=label)
        axes.set(title=column, xlabel="step")
        axes.grid(alpha=0.3)
    drawing.axes[0].legend(frameon=False, fontsize=8)
    return drawing
