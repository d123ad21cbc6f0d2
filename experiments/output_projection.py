"""What should stand between a backbone and the data it is to draw? Text to image with four output sides, one backbone.

Discriminative: an explicit output projector is trained to give the features that the image's encoder has, and the
decoder of that autoencoder makes an image of them (survey figure 7b). Diffusion and flow matching: a DiT attends to the
backbone's hidden states by cross-attention, with no projector (figure 7a). Next-scale prediction: a Transformer over a
pyramid of codes takes the hidden states as its start (figure 7a); its first stage is trained before, apart, and stays
as it is: its FLOPs and its parameters are not in the table's.

A word asks for a digit; all schemes read it with the same backbone, and are trained from scratch on the same pairs.
They are matched in parameters that learn and in training FLOPs; × of the first scheme is in the table. Guidance is 2
for the three generative ones.

Columns, over seeds, on test rows: agreement, the share of drawn images that a classifier, fitted on real training
images alone, takes for the digit asked for, beside its accuracy on the real test images; the Fréchet distance to the
real test images in that classifier's features; diversity, the mean distance of two images drawn for one word over that
of two real ones (0: a word has one image; 1: as various as real ones); precision and recall of the drawn set
(Kynkäänniemi et al. 2019); milliseconds per image.

Expected beforehand: the discriminative side agrees with the word but gives one image for each word, since a regression
to features has the mean as its optimum (survey section 2.3.4; diversity 0 where nothing is drawn at random), and is the
cheapest to sample; the generative ones are various, and cost more per image, diffusion most.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from configs import output_projection
from experiments.records import Spread, spread
from vfm.errors import UserError, unknown

PREFIX = "text_to_image"
COLUMNS = {
    "agreement ↑": f"{PREFIX}_agreement",
    "classifier on real images": "judge_image_accuracy",
    "Fréchet distance ↓": f"{PREFIX}_frechet",
    "diversity (real: 1)": f"{PREFIX}_diversity",
    "precision ↑": f"{PREFIX}_precision",
    "recall ↑": f"{PREFIX}_recall",
}


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All schemes with all seeds, seed by seed."""
    for name in settings["schemes"]:
        if name not in output_projection.SCHEMES:
            raise unknown("scheme", name, output_projection.SCHEMES, "config.study.schemes")
    if settings["seeds"] < 1:
        raise UserError(f"config.study.seeds={settings['seeds']} must be at least 1")
    if "var" in settings["schemes"] and not settings["first"]:
        raise UserError(
            "config.study.first='' must be the folder of a run of configs/output_projection.py:first, from which the "
            "scheme 'var' starts; or leave 'var' out of config.study.schemes"
        )
    return [
        {
            **output_projection.SCHEMES[name],
            **({"init.path": settings["first"]} if name == "var" else {}),
            "seed": seed,
        }
        for seed in range(settings["seeds"])
        for name in settings["schemes"]
    ]


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each scheme, over its seeds."""
    groups: dict[str, list] = {}
    for record in records:
        if missing := [name for name in COLUMNS.values() if name not in record["metrics"]]:
            raise UserError(
                f"run {record['run']} has no {', '.join(missing)}: the study needs config.eval.evaluators=generation"
            )
        groups.setdefault(json.dumps({**record["config"], "seed": None}, sort_keys=True), []).append(record)
    schemes = list(groups.values())
    rows, reference = [], schemes[0][0]
    for found in schemes:
        one, gather = found[0], lambda name, found=found: spread(record["metrics"][name] for record in found)
        learns = one["parameters"] - one["metrics"].get("parameters_frozen", 0)
        rows.append(
            {
                "output side": _label(one),
                "seeds": len(found),
                "parameters that learn": learns,
                "× parameters": learns / (reference["parameters"] - reference["metrics"].get("parameters_frozen", 0)),
                "training FLOPs": float(one["flops"]),
                "× FLOPs": one["flops"] / reference["flops"],
                **{column: gather(name) for column, name in COLUMNS.items()},
                "ms per image ↓": spread(1000 * record["metrics"][f"{PREFIX}_seconds"] for record in found),
            }
        )
    return rows


def _label(record: Mapping[str, Any]) -> str:
    decoder = record["config"]["model"]["decoders"]["image"]
    if decoder["name"] == "diffusion":
        flow = decoder["process"]["name"] == "flow"
        return f"{'flow matching' if flow else 'diffusion'}, {decoder['network']['conditioning'].replace('_', '-')}"
    return {"autoencoder": "projector, discriminative decoder", "var": "next-scale prediction"}[decoder["name"]]


def figure(table: Sequence[Mapping[str, Any]]):
    """Agreement, distance, diversity and cost of each output side; lines are standard deviations."""
    from matplotlib.figure import Figure

    panels = ("agreement ↑", "Fréchet distance ↓", "diversity (real: 1)", "ms per image ↓")
    drawing = Figure(figsize=(12, 1.5 + 0.6 * len(table)), layout="constrained")
    for i, column in enumerate(panels):
        axes = drawing.add_subplot(1, len(panels), i + 1)
        values: list[Spread] = [row[column] for row in table]
        axes.barh(range(len(table)), [v.mean for v in values], xerr=[v.deviation for v in values], color=f"C{i}")
        axes.set_yticks(range(len(table)), [row["output side"] for row in table])
        axes.invert_yaxis()
        axes.set_title(column, fontsize=10)
        axes.tick_params(labelleft=i == 0, labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    return drawing
