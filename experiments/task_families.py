"""Are new tasks solved better, the more tasks are in the instruction tuning? Families of tasks on words, from scratch.

A family asks for an order of the letters, a change of each letter, a sign in front and one behind, some of them, by an
instruction in words ("backwards, capitals and add a dot: cade=" has the answer "EDAC."). Models are trained on k
families, with the same number of questions, steps and FLOPs for every k, and asked questions of families that they
were not trained on. Which families these are, and which ones are in training, is drawn anew with every seed; with one
draw the families of a smaller k are among those of a larger one.

Scores: exact match of the answer, and two that change gradually on the same answers: accuracy and log-likelihood (nats)
per token, given the true answer so far. Families that are asked:

  held out    new combinations of several steps. "all steps seen" is the share of them of which each step occurs in some
              family of the training: what is beyond it cannot be known
  unrelated   tasks of other kinds, such as to count vowels, which share no step with those of the training
  trained     the families of the training, with words that were not

Controls: models that are trained and asked with the instruction withheld, or with that of any family (shuffled).

Spearman's rank correlation of a score with k: over the runs of all draws together, with a 95 % interval by a jackknife
over draws (Student's t of Fisher's z), and of the means. Instruction-tuned large models do better on unseen tasks the
more tasks they were tuned on (Chung et al. 2022, figure 4; Iyer et al. 2022, OPT-IML, section 4.3).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.records import Spread, cell, spread
from vfm.data.task_families import INSTRUCTIONS, STEPS, choose
from vfm.errors import UserError, unknown

ASKED = {"held out": "", "unrelated": "unrelated_", "trained": "trained_"}
SCORES = {
    "exact match": "answer_exact_match",
    "token accuracy": "answer_token_accuracy",
    "log-likelihood": "answer_log_likelihood",
}
SEEN = "all steps seen"
RANK, INTERVAL, OF_MEANS = "Spearman with k", "95 % interval", "Spearman of the means"
LEVEL = 0.9  # of the correlation, expected beforehand
LEAST_DRAWS = 3  # of an interval


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every number of families with every draw, draw by draw; then the controls."""
    for field in ("draws", "control_draws"):
        if settings[field] < 1:
            raise UserError(f"config.study.{field}={settings[field]} must be at least 1")
    for name in settings["controls"]:
        if name not in INSTRUCTIONS:
            raise unknown("instruction", name, INSTRUCTIONS, "config.study.controls")
    groups = [("given", settings["draws"]), *((name, settings["control_draws"]) for name in settings["controls"])]
    return [
        {"data.source.families": k, "data.source.draw": draw, "data.source.instruction": name, "seed": draw}
        for name, draws in groups
        for draw in range(draws)
        for k in settings["families"]
    ]


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each instruction, kind of families asked, and score; a column for each number of families."""
    sources = [record["config"]["data"]["source"] for record in records]
    counts = sorted({source["families"] for source in sources})
    rows = []
    for instruction in INSTRUCTIONS:
        chosen = [record for record, source in zip(records, sources) if source["instruction"] == instruction]
        scores = {(asked, score): _metric(lead + key) for asked, lead in ASKED.items() for score, key in SCORES.items()}
        scores["held out", SEEN] = _seen
        for (asked, score), read in sorted(scores.items(), key=lambda item: list(ASKED).index(item[0][0])):
            if chosen:
                rows.append({"instruction": instruction, "families asked": asked, "score": score})
                rows[-1] |= _row([(_source(record), read(record)) for record in chosen], counts)
    return rows


def _source(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record["config"]["data"]["source"]


def _metric(name: str):
    def read(record):
        if name not in record["metrics"]:
            needs = "the study needs config.eval.evaluators=('answers',) with the prompts of configs/task_families.py"
            raise UserError(f"run {record['run']} has no {name}: {needs}")
        return record["metrics"][name]

    return read


def _seen(record: Mapping[str, Any]) -> float:
    """The share of the families held out all of whose steps occur in training."""
    source = _source(record)
    steps = {kind: tuple(source[kind]) for kind in STEPS}
    trained, held = choose(source["families"], source["held_out"], source["draw"], source["most_steps"], steps)
    known = {step for name in trained for step in name.split("+")}
    return float(np.mean([known >= set(name.split("+")) for name in held]))


def _row(values: Sequence[tuple[Mapping[str, Any], float]], counts: Sequence[int]) -> dict[str, Any]:
    """Spreads by number of families, and correlations, of (source, value) of all runs."""
    by_count = {k: [value for source, value in values if source["families"] == k] for k in counts}
    row: dict[str, Any] = {_column(k): spread(by_count[k]) if by_count[k] else "" for k in counts}
    draws = sorted({source["draw"] for source, _ in values})
    points = {draw: [(s["families"], value) for s, value in values if s["draw"] == draw] for draw in draws}
    means = [(k, row[_column(k)].mean) for k in counts if by_count[k]]
    groups = list(points.values())
    found = {RANK: _over(groups), INTERVAL: _interval(groups), OF_MEANS: spearman(means)}
    return {**row, **{name: "constant" if value is None else value for name, value in found.items()}}


def _column(k: int) -> str:
    return f"k = {k}"


def spearman(points: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation of pairs; None where one side is always the same."""
    from scipy.stats import rankdata

    ranks = np.array([rankdata(side) for side in zip(*points)])
    if (ranks == ranks[:, :1]).all(axis=1).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def _over(groups: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    return spearman([pair for group in groups for pair in group])


def _interval(groups: Sequence[Sequence[tuple[float, float]]]) -> str:
    """The 95 % interval of the correlation over all pairs by a jackknife of the groups, of Fisher's z."""
    from scipy.stats import t as student

    n = len(groups)
    if n < LEAST_DRAWS:
        return f"needs {LEAST_DRAWS} draws"
    found = [_over(groups), *(_over([*groups[:i], *groups[i + 1 :]]) for i in range(n))]
    if None in found:
        return "constant" if found[0] is None else "not identified"
    z = np.arctanh(np.clip(found, -0.9999, 0.9999))
    error = np.sqrt((n - 1) * np.var(z[1:]))
    half = student.ppf(0.975, n - 1) * error
    return "{:.3f} to {:.3f}".format(*np.tanh([z[0] - half, z[0] + half]))


def expectations(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was expected beforehand: with instructions more families help new ones, and without they do not as much."""
    rows = {(row["instruction"], row["families asked"], row["score"]): row for row in table}
    found = []
    for score in SCORES:
        row = rows["given", "held out", score]
        found.append(
            {
                "expected": f"{score} of families held out rises with k: Spearman at least {LEVEL}",
                "found": cell(row[RANK]),
                "held": "yes" if isinstance(row[RANK], float) and row[RANK] >= LEVEL else "no",
            }
        )
    counts = [name for name in table[0] if name.startswith("k = ")]
    for control in INSTRUCTIONS[1:]:
        for score in SCORES if (control, "held out", "exact match") in rows else ():
            both = [rows[name, "held out", score] for name in ("given", control)]
            largest = [name for name in counts if all(isinstance(row[name], Spread) for row in both)][-1]
            given, without = (row[largest] for row in both)
            found.append(
                {
                    "expected": f"{score} of families held out, {largest}: higher with the instruction than {control}",
                    "found": f"{given} and {without}",
                    "held": "yes" if given.mean > without.mean else "no",
                }
            )
    return found


def figure(table: Sequence[Mapping[str, Any]]):
    """Every score against the number of families; lines are means, bars standard deviations over draws."""
    from matplotlib.figure import Figure

    counts = [name for name in table[0] if name.startswith("k = ")]
    drawing = Figure(figsize=(5 * len(SCORES), 4), layout="constrained")
    for i, score in enumerate(SCORES):
        axes = drawing.add_subplot(1, len(SCORES), i + 1)
        for row in table:
            asked, instruction = row["families asked"], row["instruction"]
            if row["score"] != score or (instruction != "given" and asked != "held out"):
                continue
            values = [(int(name[4:]), row[name]) for name in counts if isinstance(row[name], Spread)]
            axes.errorbar(
                [k for k, _ in values],
                [value.mean for _, value in values],
                yerr=[value.deviation for _, value in values],
                label=asked + ("" if instruction == "given" else f", instruction {instruction}"),
                color=f"C{list(ASKED).index(asked)}",
                linestyle={"given": "-", "withheld": ":", "shuffled": "--"}[instruction],
                marker="o",
                capsize=3,
            )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="families in training", title=f"{score} ↑")
        axes.grid(alpha=0.3)
        if not i:
            axes.legend(frameon=False, fontsize=8)
    return drawing
