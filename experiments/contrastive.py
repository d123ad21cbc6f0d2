"""Which pairs of modalities must be seen together, so that all share one space? Three modalities, aligned by contrast.

Every item shows a number of two digits, as an image, a sound or a text. Encoders are trained from scratch to tell the
items of a pair from those of other rows (InfoNCE, CLIP). The schemes differ in which modalities are paired in training:

  all pairs      each with each: three paired sets of data
  centre X       bridging (ImageBind: images, CoDi: text): each other modality is paired with X alone, two sets; the
                 third pair is never trained, and what it can do is emergent
  A-B alone      one set: what training on that very pair gives
  fusion         no shared space: a fusion encoder reads two items together and says how well they match, so that to
                 rank n items it reads n pairs. It is trained for as many steps, in batches of half as many rows; each
                 row is compared with one other, drawn from 16 by its own score, that shows another number
  shuffled       a control of each centre: in one of its two sets the partners are drawn at random

Retrieval: an item of one modality asks, and the 200 test items of another are ranked; recall@1 is the share whose first
one shows the same number. Chance is 0.01. What is never paired is marked by *. FLOPs per query are those of reading the
item that asks and of ranking all others, which were read before. Variations of one scheme show what the size of the
batch, the temperature, the loss, and the amount of paired data do.

Probes: a linear classifier on the pooled features of the trained encoder, for the digit at each place; the same for the
encoder before training, and for as many principal components of the raw items.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from configs.contrastive import MODALITIES, PAIRS, fusion
from experiments import grids
from experiments.records import Spread, spread


def _pairs(*pairs: str) -> dict[str, Any]:
    """Overrides for training on some pairs; encoders that none of them names are left out."""
    named = {name for pair in pairs for name in pair.split("-")}
    without = [name for name in MODALITIES if name not in named]
    return {
        "objective.pairs": pairs,
        "data.pairs": pairs,
        **{f"model.{kind}.{name}": {} for name in without for kind in ("encoders", "input_projectors")},
    }


def _with(centre: str) -> tuple[str, ...]:
    return tuple(pair for pair in PAIRS if centre in pair.split("-"))


NO_PROBES = {"eval.retrieval.probe_examples": 0}
SCHEMES: dict[str, dict[str, Any]] = {
    "all pairs": _pairs(*PAIRS),
    **{f"centre {name}": _pairs(*_with(name)) for name in MODALITIES},
    **{f"{pair} alone": {**_pairs(pair), **NO_PROBES} for pair in PAIRS},
    "fusion, all pairs": fusion(),
    "all pairs, 4 x the pairs, 2 x the steps": {**_pairs(*PAIRS), "data.size": 20_000, "train.steps": 600},
    **{
        f"centre {name}, shuffled": {**_pairs(*_with(name)), **NO_PROBES, "data.shuffled": _with(name)[1:]}
        for name in MODALITIES
    },
}
BASE = "centre text"
VARIATIONS: dict[str, dict[str, Any]] = {
    "batch 32": {"train.batch_size": 32},
    "batch 512": {"train.batch_size": 512},
    "temperature at least 0.2": {"model.alignment.temperature": 0.2, "model.alignment.max_scale": 5.0},
    "temperature at least 0.07": {"model.alignment.max_scale": 1 / 0.07},
    "sigmoid loss": {
        "objective.loss": "sigmoid",
        "model.alignment": {"temperature": 0.1, "max_scale": 100.0, "bias": -10.0},
    },
    "momentum 0.9, queue 256, learning rate 6e-3": {
        "objective.momentum": 0.9,
        "objective.queue": 256,
        "optimizer.learning_rate": 6e-3,
    },
    "1/10 of the pairs": {"data.size": 500},
    "1/40 of the pairs": {"data.size": 125},
    "fusion": fusion(_with("text")),
}
VARIED = {f"{BASE}, {name}": {**SCHEMES[BASE], **NO_PROBES, **changes} for name, changes in VARIATIONS.items()}
ALL = {**SCHEMES, **VARIED}


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All schemes with all seeds, seed by seed, then the variations with `variation_seeds` seeds."""
    return grids.seeded(settings, SCHEMES, VARIED)


class Emergent(Spread):
    """Of a pair that no training row held."""

    def __str__(self) -> str:
        return f"{super().__str__()} *"


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each scheme, over its seeds; what is marked by * is emergent."""
    groups: dict[str, list] = {}
    for record in records:
        groups.setdefault(grids.scheme(record, ALL), []).append(record)
    gather = lambda group, name: spread(record["metrics"][name] for record in group if name in record["metrics"])
    direct = {frozenset(name.split()[0].split("-")): group for name, group in groups.items() if name.endswith(" alone")}
    rows = []
    for name in (n for n in (*ALL, *groups) if n in groups):
        group = groups.pop(name)
        config = group[0]["config"]
        trained = {frozenset(pair.split("-")) for pair in config["data"]["pairs"]}
        row = {
            "scheme": name,
            "seeds": len(group),
            "paired sets": len(trained),
            "training FLOPs": float(group[0]["flops"]),
            "FLOPs per query": group[0]["metrics"].get("query_flops", "–"),
        }
        shares = []
        for a, b in itertools.permutations(MODALITIES, 2):
            metric, pair = f"r1_{a}_{b}", frozenset({a, b})
            if metric not in group[0]["metrics"]:
                row[f"{a} → {b}"] = "–"
                continue
            found = gather(group, metric)
            if pair not in trained:
                found = Emergent(*found)
                if pair in direct:
                    shares.append(found.mean / gather(direct[pair], metric).mean)
            row[f"{a} → {b}"] = found
        row["emergent ÷ direct"] = f"{sum(shares) / len(shares):.2f}" if shares else "–"
        for kind in ("probe", "probe_random", "probe_pca"):
            for modality in MODALITIES[:2]:
                metric = f"{kind}_{modality}"
                row[metric.replace("_", " ")] = gather(group, metric) if metric in group[0]["metrics"] else "–"
        rows.append(row)
    return rows


def figure(table: Sequence[Mapping[str, Any]]):
    """Recall@1 of every ordered pair in every scheme; bars without filling are emergent."""
    from matplotlib.figure import Figure

    columns = [f"{a} → {b}" for a, b in itertools.permutations(MODALITIES, 2)]
    drawing = Figure(figsize=(13, 1.5 + 0.33 * len(table)), layout="constrained")
    for i, column in enumerate(columns):
        axes = drawing.add_subplot(1, len(columns), i + 1)
        for place, row in enumerate(table):
            if isinstance(value := row[column], Spread):
                emergent = isinstance(value, Emergent)
                style = {"fill": False, "edgecolor": f"C{i}", "hatch": "//"} if emergent else {"color": f"C{i}"}
                axes.barh(place, value.mean, xerr=value.deviation, **style)
        axes.set_yticks(range(len(table)), [row["scheme"] for row in table])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.05)
        axes.set_title(f"{column}\nrecall@1", fontsize=9)
        axes.tick_params(labelleft=i == 0, labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    return drawing
