"""Delayed generalisation: a + b modulo a prime, of which half the table is trained on (Power et al. 2022).

A Transformer of one layer learns the training questions by heart, and finds the rule that answers the others long
after, where AdamW decays its weights; the control is the same model, with the same steps, without decay. A step is that
of the first checkpoint at which 99 % of the training questions (mean over the steps since the one before), or 95 % of
the others, are answered right. Beside the accuracy stands the loss on those others, in nats per token: it rises while
they are learned by heart, and falls before and while the accuracy jumps. Rows end with <eos>, so that loss and accuracy
per token are those of two tokens, of which the second is never in doubt.

Frequencies: how much of the power of the numbers' embeddings, over the numbers, is in the five largest of its Fourier
frequencies (Nanda et al. 2023). A model that adds on circles needs few; random embeddings have nearly equal shares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.records import Spread, spread
from vfm.errors import UserError

TRAIN, TEST, LOSS, SHARE = "train_token_accuracy", "answer_exact_match", "loss", "spectrum_top_share"
# Of the tokens of a training row, the second, <eos>, is always right: 99 % of answers are 99.5 % of tokens.
LEVELS = {TRAIN: 0.995, TEST: 0.95}
LATE = 3  # times as many steps are "long after"


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All weight decays with all seeds, which also choose the half of the table, seed by seed."""
    if settings["seeds"] < 1:
        raise UserError(f"config.study.seeds={settings['seeds']} must be at least 1")
    return [
        {"optimizer.weight_decay": decay, "seed": seed, "data.source.seed": seed}
        for seed in range(settings["seeds"])
        for decay in settings["weight_decays"]
    ]


def course(record: Mapping[str, Any], metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric through the training."""
    lead = f"course_{metric}_at_"
    return sorted((int(n[len(lead) :]), value) for n, value in record["metrics"].items() if n.startswith(lead))


def first_step(record: Mapping[str, Any], metric: str) -> int | None:
    """The first step at which a metric is at its level; None: never."""
    return next((step for step, value in course(record, metric) if value >= LEVELS[metric]), None)


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each weight decay, over its seeds."""
    groups: dict[float, list] = {}
    for record in records:
        if not course(record, TEST) or not course(record, TRAIN):
            needs = f"config.eval.course with {TRAIN} and {TEST}, each {{'every': 1}}"
            raise UserError(f"run {record['run']} has no course of the accuracy: the study needs {needs}")
        groups.setdefault(record["config"]["optimizer"]["weight_decay"], []).append(record)
    rows = []
    for decay, group in sorted(groups.items(), reverse=True):
        learned, general = ([first_step(record, metric) for record in group] for metric in (TRAIN, TEST))
        late = [b / a for a, b in zip(learned, general, strict=True) if a and b]
        gather = lambda name, group=group: spread(record["metrics"][name] for record in group)
        rows.append(
            {
                "weight decay": decay,
                "seeds": len(group),
                "parameters": group[0]["parameters"],
                "steps": group[0]["config"]["train"]["steps"],
                "training FLOPs": float(group[0]["flops"]),
                "learned by heart at step": _steps(learned),
                "generalises at step": _steps(general),
                "times later": spread(late) if late else "–",
                "seeds that generalise": sum(step is not None for step in general),
                "test exact match": gather(TEST),
                "test loss": gather("test_loss"),
                "highest loss on the way": spread(max(v for _, v in course(record, LOSS)) for record in group),
                "power in five frequencies": gather(SHARE),
            }
        )
    return rows


def _steps(found: Sequence[int | None]) -> Spread | str:
    known = [step for step in found if step is not None]
    if not known:
        return "never"
    return spread(known) if len(known) == len(found) else f"{spread(known)} ({len(known)} of {len(found)} seeds)"


def expectations(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether generalisation was late with weight decay, and did not come without."""
    rows = []
    for row in table:
        general, seeds = row["seeds that generalise"], row["seeds"]
        if row["weight decay"]:
            late = isinstance(row["times later"], Spread) and row["times later"].mean >= LATE
            rows.append(
                {
                    "expected": f"weight decay {row['weight decay']:g}: the others long after the training questions",
                    "by": "Power et al. 2022",
                    "found": f"{general} of {seeds} seeds, {row['times later']} times as many steps",
                    "held": "yes" if late and general == seeds else "no",
                }
            )
        else:
            rows.append(
                {
                    "expected": "without weight decay not in the same steps",
                    "by": "control",
                    "found": f"{general} of {seeds} seeds; exact match {row['test exact match']} at the end",
                    "held": "no" if general else "yes",
                }
            )
    with_, without = ([row for row in table if bool(row["weight decay"]) is decays] for decays in (True, False))
    if with_ and without:
        a, b = (rows[0]["power in five frequencies"] for rows in (with_, without))
        rows.append(
            {
                "expected": "the embedding of a model that generalises is made of few frequencies",
                "by": "Nanda et al. 2023",
                "found": f"{a} of the power in five with weight decay, {b} without",
                "held": "yes" if a.mean - a.deviation > b.mean + b.deviation else "no",
            }
        )
    return rows


def figure(table: Sequence[Mapping[str, Any]]):
    """Exact match, loss and share of the frequencies at the end; bars are means, lines standard deviations."""
    from matplotlib.figure import Figure

    columns = ("test exact match", "test loss", "power in five frequencies")
    drawing = Figure(figsize=(10, 3), layout="constrained")
    names = [f"weight decay {row['weight decay']:g}" for row in table]
    for i, column in enumerate(columns):
        axes = drawing.add_subplot(1, len(columns), i + 1)
        values = [row[column] for row in table]
        axes.bar(names, [v.mean for v in values], yerr=[v.deviation for v in values], color=f"C{i}", alpha=0.8)
        axes.set_title(column, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    return drawing


def pictures(records: Sequence[Mapping[str, Any]], folder) -> dict[str, tuple[str, Any]]:
    """Accuracy and loss through the training, and the spectra at its end; a line for each seed."""
    from matplotlib.figure import Figure

    decays = sorted({record["config"]["optimizer"]["weight_decay"] for record in records}, reverse=True)
    drawing = Figure(figsize=(1 + 5 * len(decays), 9), layout="constrained")
    axes = drawing.subplots(3, len(decays), squeeze=False, sharey="row")
    for record in records:
        column = decays.index(record["config"]["optimizer"]["weight_decay"])
        first = record["seed"] == min(r["seed"] for r in records)
        for metric, label, color in ((TRAIN, "training questions", "C0"), (TEST, "others", "C1")):
            steps, values = zip(*course(record, metric))
            # Of the two tokens of a training row one is always right.
            values = [2 * value - 1 for value in values] if metric == TRAIN else values
            axes[0][column].plot(steps, values, color=color, alpha=0.7, label=label if first else "")
        if points := course(record, LOSS):
            axes[1][column].plot(*zip(*points), color="C1", alpha=0.7)
        share = {int(n.removeprefix("spectrum_")): v for n, v in record["metrics"].items() if n[9:].isdigit()}
        if share:
            axes[2][column].plot(sorted(share), [share[k] for k in sorted(share)], marker=".", alpha=0.7)
    for column, decay in enumerate(decays):
        axes[0][column].set_title(f"weight decay {decay:g}")
        axes[0][column].set_ylabel("answers that are right")
        axes[1][column].set_ylabel("loss on the others, nats per token")
        axes[1][column].set_xlabel("steps")
        axes[2][column].set_ylabel("share of the embedding's power")
        axes[2][column].set_xlabel("frequency")
        for row in range(3):
            axes[row][column].grid(alpha=0.3)
            if row < 2:
                axes[row][column].set_xscale("log")
    axes[0][0].legend(frameon=False)
    return {"courses": ("Accuracy and loss on the same checkpoints, and the spectra of the embeddings", drawing)}
