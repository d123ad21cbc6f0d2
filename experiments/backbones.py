"""Table 3 of the survey as a study: encoder-only, decoder-only and encoder–decoder at matched cost, on real text.

Every model is trained from scratch on the same amount of text with an objective of its family, and is then used as it
is, without fine-tuning, for one task of understanding and one of generation. The text is that of the source of
`config.data`, by default the source files of Python's standard library, split by file. Layers, tokenizer and optimizer
are the same for all; nothing is tuned for any of them.

Understanding: which class (here: which package of the library) is a passage of 96 tokens from? A logistic regression on
the mean of the features of one layer of the stack that reads the text. The layer is chosen on training files; the
accuracy is that on passages of files that neither the model nor the regression has seen. Beside it the same for the
untrained model, and the most frequent class.

Generation: how well is the last quarter of a passage of such files predicted, token by token, from the text before it?
In bits per byte, lower is better. It is the same event under the same condition for all, so that the numbers compare.
The decoder-only model reads the text in one pass; the encoder-only one is asked with one mask behind the text, once for
every token; the encoder of an encoder–decoder reads the given part, and its decoder writes the rest, as a last span
(span corruption, T5) or behind the given part (text infilling, BART). Special tokens are left out of all
distributions. The last quarter, 24 tokens, is longer than the spans of 3 tokens on average that masks stood for in
training; that such models are good at filling gaps rather than at going on is a part of what is measured. FLOPs per
byte say what these probabilities cost.

A model is matched in FLOPs or in parameters if it is within 5 % of the decoder-only one (next token). Both are
analytic: matrix products of training steps, counted on the program, padding included.

The survey says: encoder-only weak at generation, strong at understanding, cheap; decoder-only strong at generation,
weak at understanding, cheap; encoder–decoder strong at both, expensive.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from configs import backbones
from experiments.records import Spread, spread
from vfm.errors import UserError, unknown

TOLERANCE = 0.05
REFERENCE = ("decoder_only", "next_token")
METRICS = (
    "probe_accuracy",
    "probe_random_accuracy",
    "probe_majority",
    "continuation_bits_per_byte",
    "continuation_flops_per_byte",
)


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All models with all seeds, seed by seed: an interrupted study has whole comparisons."""
    for name in settings["models"]:
        if name not in backbones.MODELS:
            raise unknown("model", name, backbones.MODELS, "config.study.models")
    if settings["seeds"] < 1:
        raise UserError(f"config.study.seeds={settings['seeds']} must be at least 1")
    return [
        {**backbones.MODELS[name], "seed": seed} for seed in range(settings["seeds"]) for name in settings["models"]
    ]


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model, over its seeds."""
    groups: dict[str, list] = {}
    for record in records:
        if missing := [name for name in METRICS if name not in record["metrics"]]:
            needs = "the study needs config.eval.evaluators=probe,continuation"
            raise UserError(f"run {record['run']} has no {', '.join(missing)}: {needs}")
        groups.setdefault(json.dumps({**record["config"], "seed": None}, sort_keys=True), []).append(record)
    models = list(groups.values())
    reference = next((model for model in models if _kind(model[0]) == REFERENCE), models[0])[0]
    rows = []
    for model in models:
        one, gather = model[0], lambda name, model=model: spread(record["metrics"][name] for record in model)
        times = {name: one[name] / reference[name] for name in ("parameters", "flops")}
        matched = [name for name, ratio in times.items() if abs(ratio - 1) <= TOLERANCE]
        rows.append(
            {
                "model": _label(one),
                "seeds": len(model),
                "parameters": one["parameters"],
                "× parameters": times["parameters"],
                "training FLOPs": float(one["flops"]),
                "× FLOPs": times["flops"],
                "matched in": " and ".join(matched).replace("flops", "FLOPs") or "nothing",
                "understanding: accuracy ↑": gather("probe_accuracy"),
                "untrained": gather("probe_random_accuracy"),
                "most frequent class": one["metrics"]["probe_majority"],
                "generation: bits per byte ↓": gather("continuation_bits_per_byte"),
                "generation: FLOPs per byte": float(one["metrics"]["continuation_flops_per_byte"]),
            }
        )
    return rows


def _kind(record: Mapping[str, Any]) -> tuple[str, str]:
    return record["config"]["model"]["backbone"]["name"], record["config"]["data"]["corruption"]["name"]


def _label(record: Mapping[str, Any]) -> str:
    """encoder-decoder, span corruption, 4 + 4 layers"""
    backbone, (family, corruption) = record["config"]["model"]["backbone"], _kind(record)
    depth = str(backbone["depth"])
    if family == "encoder_decoder":
        depth += f" + {backbone.get('decoder_depth') or depth}"
    return f"{family.replace('_', '-')}, {corruption.replace('_', ' ').replace('lm', 'LM')}, {depth} layers"


def figure(table: Sequence[Mapping[str, Any]]):
    """Both scores and both costs of every model; bars are means, lines are standard deviations."""
    from matplotlib.figure import Figure

    places = range(len(table))
    panels = {
        "understanding: accuracy ↑": "untrained",
        "generation: bits per byte ↓": None,
        "× FLOPs": None,
        "× parameters": None,
    }
    drawing = Figure(figsize=(12, 1.5 + 0.75 * len(table)), layout="constrained")
    for i, (column, control) in enumerate(panels.items()):
        axes = drawing.add_subplot(1, len(panels), i + 1)
        values = [row[column] if isinstance(row[column], Spread) else Spread(row[column], 0.0, 1) for row in table]
        axes.barh(places, [v.mean for v in values], xerr=[v.deviation for v in values], color=f"C{i}", alpha=0.8)
        if control:
            axes.plot([row[control].mean for row in table], places, "k|", markersize=14, label=control)
            axes.legend(frameon=False)
        axes.set_yticks(places, [row["model"].replace(", ", "\n") for row in table])
        axes.invert_yaxis()
        axes.set_title(column, fontsize=10)
        axes.tick_params(labelleft=i == 0, labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    return drawing
