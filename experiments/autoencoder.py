"""Four autoencoders with the same latents: plain, variational, vector-quantised, and adversarial.

All have the same encoder, the same decoder, and as many numbers in the latents that the decoder takes; what differs is
the bottleneck and the loss. How much these numbers can tell differs, and is a column, "bits": those of 32-bit floats
(AE, an upper bound that nothing uses up), KL(posterior || prior) in bits (VAE), the bits of the codes (VQ).

  AE      squared error
  VAE     evidence lower bound; Gaussian likelihood, of standard deviation 0.1: about the error that an AE makes. (A
          learned one starts at 1 and is slow: the posterior collapses before it has come down.)
  VQ-VAE  squared error and commitment; 256 codes that follow the latents by EMA; unused ones restart
  VQGAN   the same, with the distance in the feature maps of a network, and a PatchGAN with adaptive weight

No published perceptual network is assumed: its weights are random and stay so (a random network knows edges and
textures, and nothing of the data). The features of Fréchet distances are those of an independent classifier, a support
vector machine on pixels: a fair judge of what a digit is, not of how sharp it looks. Samples: the VAE decodes draws of
its prior; the others draw from ten Gaussians fitted to the latents of training items (Ghosh et al. 2020), which a
codebook moves to its nearest codes. The probe is linear, on latents of the frozen encoder. All is measured on test
items that no model has seen. Variations change one thing, with fewer seeds.

What was expected beforehand, with the source of each expectation, is in EXPECTED below, and the second table
says what held: "yes" if the means differ that way by more than their standard deviations together, "within the spread"
if they differ by less, else "no".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.autoencoder import CODES
from experiments import grids
from experiments.records import Spread, spread

GAUSSIAN = {"name": "gaussian"}
VQ = {"name": "vq", "codebook_size": CODES, "update": "ema", "codebook_init": "data", "restart": 100}
VAE = {"name": "reconstruction", "likelihood": "gaussian", "sigma": 0.1, "beta": 1.0}
PERCEPTUAL = {"random": {"name": "vgg", "stages": (1, 1), "widths": (16, 32), "norm": "group"}}
ADVERSARIAL = {
    "name": "adversarial",
    "reconstruction": {"likelihood": "mse"},
    "weight": 0.5,
    "start": 300,
    "lead": 100,
    "perceptual_weight": 0.1,
    "perceptual": PERCEPTUAL,
}
DISCRIMINATOR = {"image": {"name": "patchgan", "width": 16, "depth": 1, "norm": "group"}}


def _vae(**objective: Any) -> dict[str, Any]:
    return {
        "model.encoders.image.bottleneck": GAUSSIAN,
        "objective": {**VAE, **objective},
    }


def _vq(**bottleneck: Any) -> dict[str, Any]:
    return {"model.encoders.image.bottleneck": {**VQ, **bottleneck}}


def _vqgan(**objective: Any) -> dict[str, Any]:
    return {**_vq(), "model.discriminators": DISCRIMINATOR, "objective": {**ADVERSARIAL, **objective}}


SCHEMES: dict[str, dict[str, Any]] = {"AE": {}, "VAE": _vae(), "VQ-VAE": _vq(), "VQGAN": _vqgan()}
VARIED: dict[str, dict[str, Any]] = {
    "AE, samples of one Gaussian": {"eval.generation.density": "gaussian"},
    "VAE, samples of the mixture": {**_vae(), "eval.generation.density": "mixture"},
    "VAE, β 0.1": _vae(beta=0.1),
    "VAE, β 4": _vae(beta=4.0),
    "VQ-VAE, 16 codes": _vq(codebook_size=16),
    "VQ-VAE, 1024 codes": _vq(codebook_size=1024),
    "VQ-VAE, codes by gradient": _vq(update="gradient"),
    "VQ-VAE, codes by gradient, small start, no restart": _vq(update="gradient", codebook_init="uniform", restart=0),
    "VQ-VAE, perceptual term": _vqgan(weight=0.0),
    "VQ-VAE, adversarial term": _vqgan(perceptual_weight=0.0),
}
ALL = {**SCHEMES, **VARIED}


class Expected(NamedTuple):
    """That a column of one scheme is less, or more, than that of another, and who says so. than: (scheme, column)."""

    what: str
    source: str
    scheme: str
    column: str
    sign: int  # 1: more, -1: less
    than: tuple[str, str]


def _expect(what, source, scheme, column, sign, other, other_column=None) -> Expected:
    return Expected(what, source, scheme, column, sign, (other, other_column or column))


EXPECTED = (
    _expect("A posterior costs reconstruction", "Ghosh et al. 2020, table 1", "VAE", "mse", 1, "AE"),
    _expect("Codes cost more than a posterior, at equal floats", "their bits", "VQ-VAE", "mse", 1, "VAE"),
    _expect("The adversarial and perceptual terms do not lower the squared error", "Blau & Michaeli 2018",
            "VQGAN", "mse", 1, "VQ-VAE"),
    _expect("They lower the Fréchet distance", "Esser et al. 2021", "VQGAN", "Fréchet", -1, "VQ-VAE"),
    _expect("So does the perceptual term alone", "Johnson et al. 2016", "VQ-VAE, perceptual term", "Fréchet", -1,
            "VQ-VAE"),
    _expect("Latents of an AE are better than principal components", "Hinton & Salakhutdinov 2006", "AE", "probe", 1,
            "AE", "probe of PCA"),
    _expect("A posterior costs probe accuracy", "smaller rate", "VAE", "probe", -1, "AE"),
    _expect("A fitted density of an AE gives better samples than a VAE's prior", "Ghosh et al. 2020, table 1", "AE",
            "samples: Fréchet", -1, "VAE"),
    _expect("A mixture is better than one Gaussian", "Ghosh et al. 2020, table 1", "AE", "samples: Fréchet", -1,
            "AE, samples of one Gaussian"),
    _expect("A mixture is better than the VAE's own prior", "Ghosh et al. 2020, table 1",
            "VAE, samples of the mixture", "samples: Fréchet", -1, "VAE"),
    _expect("More β, more error", "Higgins et al. 2017", "VAE, β 4", "mse", 1, "VAE, β 0.1"),
    _expect("More β, a smaller rate", "Higgins et al. 2017; Alemi et al. 2018", "VAE, β 4", "bits", -1, "VAE, β 0.1"),
    _expect("More β, fewer active units", "Burda et al. 2016, section 5.2", "VAE, β 4", "active units", -1,
            "VAE, β 0.1"),
    _expect("More codes, less error", "Esser et al. 2021, released models", "VQ-VAE, 1024 codes", "mse", -1,
            "VQ-VAE, 16 codes"),
    _expect("EMA learns faster than the gradient", "Kaiser et al. 2018", "VQ-VAE", "mse", -1,
            "VQ-VAE, codes by gradient"),
    _expect("Without restart, from a small start, codes stay unused", "Dhariwal et al. 2020, section 3.1",
            "VQ-VAE, codes by gradient, small start, no restart", "codes in use", -1, "VQ-VAE, codes by gradient"),
)  # fmt: skip


def runs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All schemes with all seeds, seed by seed, then the variations with `variation_seeds` seeds."""
    return grids.seeded(settings, SCHEMES, VARIED)


# Column -> metric of a run.
COLUMNS = {
    "mse": "reconstruction_image_mse",
    "PSNR, dB": "reconstruction_image_psnr",
    "SSIM": "reconstruction_image_ssim",
    "Fréchet": "reconstruction_image_frechet",
    "right class": "reconstruction_image_agreement",
    "samples: Fréchet": "sample_image_frechet",
    "samples: precision": "sample_image_precision",
    "samples: recall": "sample_image_recall",
    "probe": "probe_image",
    "probe of PCA": "probe_pca_image",
    "probe, untrained": "probe_random_image",
    "active units": "active_units_image",
    "codes in use": "codebook_usage_image",
    "perplexity": "codebook_perplexity_image",
}


def bits(metrics: Mapping[str, float]) -> float:
    """Bits per item that the latents can tell, see the head of this file."""
    if "code_bits_image" in metrics:
        return metrics["code_bits_image"]
    if "test_kl_image" in metrics:
        return metrics["test_kl_image"] / 0.6931471805599453  # ln 2
    return 32 * metrics["latent_floats_image"]


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each scheme, over its seeds."""
    groups: dict[str, list] = {}
    for record in records:
        groups.setdefault(grids.scheme(record, ALL), []).append(record)
    rows = []
    for name in (n for n in (*ALL, *groups) if n in groups):
        group = groups.pop(name)
        measured = [record["metrics"] for record in group]
        row: dict[str, Any] = {
            "scheme": name,
            "seeds": len(group),
            "floats": int(measured[0]["latent_floats_image"]),
            "bits": spread(bits(metrics) for metrics in measured),
        }
        for column, metric in COLUMNS.items():
            values = [metrics[metric] for metrics in measured if metric in metrics]
            row[column] = spread(values) if values else "–"
        row["parameters"] = group[0]["parameters"]
        row["training FLOPs"] = float(group[0]["flops"])
        row["seconds"] = spread(record["seconds"] for record in group)
        rows.append(row)
    return rows


def expectations(table: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What was expected, what was found, and whether it held; of the schemes that were run."""
    rows = {row["scheme"]: row for row in table}
    found = []
    for item in EXPECTED:
        values = [rows.get(name, {}).get(column) for name, column in ((item.scheme, item.column), item.than)]
        if not all(isinstance(value, Spread) for value in values):
            continue
        here, there = values
        difference = item.sign * (here.mean - there.mean)
        held = "yes" if difference > here.deviation + there.deviation else "within the spread"
        relation = f"{item.column} of {item.scheme} {'>' if item.sign > 0 else '<'} {item.than[1]} of {item.than[0]}"
        found.append(
            {
                "expected": item.what,
                "source": item.source,
                "that is": relation,
                "found": f"{here}, {there}",
                "held": held if difference > 0 else "no",
            }
        )
    return found


def figure(table: Sequence[Mapping[str, Any]]):
    """What each scheme gives up for what: bars of six columns."""
    from matplotlib.figure import Figure

    columns = ("PSNR, dB", "SSIM", "Fréchet", "samples: Fréchet", "probe", "codes in use")
    drawing = Figure(figsize=(13, 1.5 + 0.33 * len(table)), layout="constrained")
    for i, column in enumerate(columns):
        axes = drawing.add_subplot(1, len(columns), i + 1)
        for place, row in enumerate(table):
            if isinstance(value := row[column], Spread):
                axes.barh(place, value.mean, xerr=value.deviation, color=f"C{i}")
        axes.set_yticks(range(len(table)), [row["scheme"] for row in table])
        axes.invert_yaxis()
        axes.set_title(column, fontsize=9)
        axes.tick_params(labelleft=i == 0, labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    return drawing


DRAWN = {
    "reconstruction_image": "Test items, and what the decoder makes of their latents; one seed",
    "interpolation_image": "The decoder on the straight line between the latents of two items; one seed",
    "sample_image": "Items that were drawn; one seed",
}


def pictures(records: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, tuple[str, Any]]:
    """The sheets that the first run of each scheme drew, one above the other; none where the folders are gone."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    first: dict[str, Path] = {}
    for record in records:
        first.setdefault(grids.scheme(record, ALL), folder / "runs" / record["run"] / "figures")
    found = {}
    for name, caption in DRAWN.items():
        sheets = {title: path / f"{name}.png" for title, path in first.items() if title in SCHEMES}
        sheets = {title: imread(path) for title, path in sheets.items() if path.is_file()}
        if not sheets:
            continue
        heights = [8 * sheet.shape[0] / sheet.shape[1] + 0.3 for sheet in sheets.values()]
        drawing = Figure(figsize=(8, sum(heights)), layout="constrained")
        axes = drawing.subplots(len(sheets), 1, squeeze=False, height_ratios=heights)[:, 0]
        for place, (title, sheet) in zip(axes, sheets.items()):
            place.imshow(sheet)
            place.set_axis_off()
            place.set_title(title, fontsize=10)
        found[f"study_{name}"] = (caption, drawing)
    return found
