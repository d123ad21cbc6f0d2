"""The runs of the study of scaling as points of laws."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vfm.errors import UserError

# How N is counted; the index is that of `Point.n`.
COUNTS = ("without embeddings", "with embeddings")


@dataclasses.dataclass(frozen=True)
class Point:
    """A run: parameters without and with embeddings, tokens of its training set, tokens and FLOPs of its training,
    loss; rate, batch: as a multiple of what the rule says; cell: section `cell` of its config; gap: see
    `early_stopping`."""

    n: tuple[int, int]
    rows: float
    tokens: float
    flops: float
    loss: float
    seed: int
    rate: float
    batch: int
    cell: Mapping[str, Any]
    gap: float = 0.0


def point_of(record: Mapping[str, Any]) -> Point:
    """The point of a record; raises UserError for one without the loss that its sweep needs."""
    cfg, metrics = record["config"], record["metrics"]
    cell, data = cfg["cell"], unique_tokens(cfg)
    name = "early_stopping_loss" if cell["name"] == "data" else "test_loss"
    if name not in metrics:
        needs = "; the study needs config.eval.evaluators=early_stopping" if cell["name"] == "data" else ""
        raise UserError(f"run {record['run']} has no {name}{needs}")
    blocks = cfg["model"]["encoders"]["text"], cfg["model"]["decoders"]["text"]
    embeddings = sum(block["vocab_size"] for block in blocks) * cfg["model"]["backbone"]["width"]
    return Point(
        n=(record["parameters"] - embeddings, record["parameters"]),
        rows=float(data),
        tokens=float(record["tokens"]),
        flops=float(record["flops"]),
        loss=metrics[name],
        seed=record["seed"],
        rate=round(cfg["optimizer"]["learning_rate"] / cell["rate"], 6),
        batch=cell["batch"],
        cell=cell,
        gap=metrics.get("early_stopping_gap", 0.0),
    )


def unique_tokens(cfg: Mapping[str, Any]) -> int:
    """Tokens of the training set of a run; 0: all that there are."""
    return cfg["data"].get("rows", {}).get("train", 0) * cfg["data"]["length"]


def groups(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, list[Point]]]:
    """{(modality, architecture): {sweep: points}} in the order of the records."""
    found: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for record in records:
        point = point_of(record)
        kind = point.cell["modality"], point.cell["architecture"]
        found.setdefault(kind, {}).setdefault(point.cell["name"], []).append(point)
    return found


def near_best(points: Sequence[Point]) -> tuple[list[Point], dict[int, tuple[str, float]]]:
    """The points of the sweep of sizes by their rule, each size moved by what its best variation gains.

    -> (points, {N: (the best variation as text, its gain in log loss)}). A variation is compared with the rule on the
    seeds that have both, where initial parameters and order of the data are the same.
    """
    rule = lambda point: (point.rate, point.batch) == (1.0, 1)
    base = {(point.n, point.seed): point for point in points if rule(point)}
    gains: dict[tuple[int, int], dict[tuple, list[float]]] = {}
    for point in points:
        if (point.n, point.seed) in base and not rule(point):
            gain = math.log(base[point.n, point.seed].loss / point.loss)
            gains.setdefault(point.n, {}).setdefault((point.rate, point.batch), []).append(gain)
    best = {}
    for n in {point.n for point in base.values()}:
        means = {key: statistics.fmean(values) for key, values in gains.get(n, {}).items()}
        key = max(means, key=means.__getitem__, default=None)
        better = key is not None and means[key] > 0
        best[n] = (f"rate × {key[0]:g}, batch × {key[1]}", means[key]) if better else ("the rule", 0.0)
    moved = [
        dataclasses.replace(point, loss=point.loss * math.exp(-best[point.n][1])) for point in base.values()
    ]  # fmt: skip
    return moved, {n[0]: best[n] for n in sorted(best)}


def early_stopped(points: Sequence[Point]) -> list[Point]:
    """The best run of each training set and seed."""
    best: dict[tuple, Point] = {}
    for point in points:
        key = point.rows, point.seed
        if key not in best or point.loss < best[key].loss:
            best[key] = point
    return list(best.values())


@dataclasses.dataclass(frozen=True)
class Cells:
    """What a law was fitted to, for the figure: x and loss of its cells, their budgets, and the law itself."""

    x: tuple[float, ...]
    loss: tuple[float, ...]
    runs: int
    budget: tuple[float, ...] = ()
    fit: Any = None
    allocation: Any = None
    best: Mapping[int, tuple[str, float]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        low, high = min(self.x), max(self.x)
        cells = len({*zip(self.x, self.budget or self.x)})
        return f"{cells} cells of {self.runs} runs, {low:.3g} to {high:.3g}"
