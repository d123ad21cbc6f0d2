"""How well a pair of encoder and decoder gives items back, and what its latents are worth."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from vfm.errors import UserError
from vfm.evaluate import Evaluation, cell, distance, options, spaces
from vfm.evaluate.probe import compare, principal
from vfm.layers import bottleneck
from vfm.wiring import autoencoded

OPTIONS = {"features": "pixels", "probe_examples": 0, "shown": 8, "interpolations": 4, "sounds": 4}
ACTIVE = 0.01  # variance of the posterior mean over the data, from which a latent counts as active
COLLAPSED = 0.2  # share of the codes in use, below which a codebook counts as collapsed
WHERE = "config.eval.reconstruction"


class Read(NamedTuple):
    """What a model makes of n items: reconstructed float[n, *item_shape]; latents float[n, P, W], which its decoder
    takes; mean float[n, P, W] of a Gaussian posterior and codes int[n, ...] of a codebook, or None."""

    items: np.ndarray
    labels: np.ndarray | None
    reconstructed: np.ndarray
    latents: np.ndarray
    mean: np.ndarray | None
    codes: np.ndarray | None


def check_reconstruction(experiment) -> None:
    """Refuses a model without an autoencoder, and features that cannot be had."""
    chosen = options(experiment, "reconstruction", OPTIONS)
    names = autoencoded(experiment.model)
    if not names:
        raise UserError("the evaluator 'reconstruction' needs a modality with an encoder and a decoder of its items")
    for name in names:
        spaces.check_space(experiment, name, chosen["features"], f"{WHERE}.features")


def reconstruction(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Of all items of the split (or of `limit` rows), for each modality X that has both halves of an autoencoder:

      reconstruction_{X}_mse, _psnr, _ssim   means over the items, see `distance`; SSIM of images from 7×7 pixels on.
                                             Values range as config.data.ranges says, else 0 to 1
      reconstruction_{X}_frechet             between the items and their reconstructions, in the features chosen
      reconstruction_{X}_agreement           with the features of the judge: the share of reconstructions that it takes
                                             for their class; judge_{X}_accuracy: of the items themselves
      latent_std_{X}                         standard deviation of all numbers in the latents; 1 over it brings them to
                                             the scale of the noise that a diffusion decoder adds to them (its field
                                             latent.scale; Rombach et al. 2022, appendix G)
      active_units_{X}, latent_floats_{X}    of a Gaussian posterior: latents whose mean has a variance over the data
                                             above 0.01 (Burda et al. 2016, section 5.2); numbers in the latents
      codebook_usage_{X}, codebook_perplexity_{X}   the share of codes in use over the split, and exp of the entropy of
                                             their frequencies; code_bits_{X}: bits per item, if all were as frequent
      probe_{X}, probe_random_{X}, probe_pca_{X}    with `probe_examples`: accuracy of a linear probe for the labels, on
                                             the latents; on those of the untrained model; and on as many principal
                                             components of the raw items

    Options in config.eval.reconstruction: features ("pixels", "judge", or the folder of a run, see `spaces.space`),
    probe_examples (of the training split; 0: no probes), shown (items in the report), interpolations (rows there: the
    decoder between the latents of two items), sounds (items there that are heard as well, where they are pictures of
    sounds). A codebook of which less than a fifth is in use is told in a warning.
    """
    chosen = options(experiment, "reconstruction", OPTIONS)
    weights, measured, samples = {"params": params, **variables}, {}, {}
    read = reader(experiment)
    found = read(weights, experiment.dataset(split), limit)
    if chosen["probe_examples"]:
        measured |= _probes(experiment, weights, read, found, split, limit, chosen["probe_examples"])
    for name, test in found.items():
        measured |= _distances(experiment, chosen["features"], name, test)
        measured |= _latents(experiment, name, test)
        samples |= _samples(experiment, weights, chosen, name, test)
        samples |= _sounds(experiment.dataset(split), name, test, min(chosen["sounds"], len(test.items)))
    return Evaluation(measured, samples)


def reader(experiment):
    """A function (weights, dataset, rows) -> {X: Read} of so many rows (0, None: all)."""
    names = autoencoded(experiment.model)

    def parts_of(out, lead) -> dict[str, np.ndarray]:
        encoded = {key: out["encoder"][key] for key in ("mean", "codes") if key in out["encoder"]}
        parts = {"reconstructed": out["reconstructed"], "latents": out["features"]}
        return {key: experiment.fetch(x) for key, x in parts.items()} | {
            key: experiment.fetch(x).reshape(*lead, *x.shape[1:]) for key, x in encoded.items()
        }

    def read(weights, dataset, rows) -> dict[str, Read]:
        found: dict[str, dict[str, list]] = {}
        for host, batch in experiment.eval_batches(dataset, rows):
            real = (host["example_mask"] > 0)[:, None]
            out = experiment.forward(weights, batch)
            for name in (name for name in names if name in host["inputs"]):
                items = host["inputs"][name]
                keep = spaces.shown(items) & real
                parts = {key: x[keep] for key, x in parts_of(out[name], keep.shape).items()}
                parts["items"] = items[keep]
                if "label" in host:
                    parts["labels"] = spaces.of_rows(host["label"], keep)
                for key, x in parts.items():
                    found.setdefault(name, {}).setdefault(key, []).append(x)
        return {
            name: Read(*(np.concatenate(parts[key]) if key in parts else None for key in Read._fields))
            for name, parts in found.items()
        }

    return read


def decoder(experiment, name: str):
    """A function (weights, latents float[n, P, W]) -> items float[n, *item_shape] of the decoder of a modality."""
    decode = experiment.jit(
        lambda weights, x: experiment.model.apply(weights, x, method=lambda m, x: m.decoders[name](x, train=False)[0])
    )

    def run(weights, latents: np.ndarray) -> np.ndarray:
        size, parts = experiment.config.eval.batch_size, []
        for begin in range(0, len(latents), size):
            part = latents[begin : begin + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            parts.append(experiment.fetch(decode(weights, filled))[: len(part)])
        return np.concatenate(parts)

    return run


def nearest_codes(experiment, weights, name: str, latents: np.ndarray) -> np.ndarray:
    """Latents float[n, P, W] moved to the nearest codes of the encoder's bottleneck."""

    def move(model, x):
        encoder = model.encoders[name]
        scale = getattr(encoder, "scaling_factor", 1.0)
        return encoder.quantizer(x / scale, grid=getattr(encoder, "grid", None), train=False)[0] * scale

    moved = experiment.jit(lambda weights, x: experiment.model.apply(weights, x, method=move))
    return experiment.fetch(moved(weights, latents))


def _probes(experiment, weights, read, found: Mapping[str, Read], split, limit, count: int) -> dict[str, float]:
    """See `reconstruction`. found: what the model makes of the split; count: of the training items."""
    state, measured = experiment.init_state(), {}
    untrained = {"params": state.params, **state.variables}
    train, test = experiment.dataset("train", train=False), experiment.dataset(split)
    training, before = read(weights, train, count), (read(untrained, train, count), read(untrained, test, limit))
    for name, tested in found.items():
        labels = training[name].labels, tested.labels
        if any(x is None for x in labels):
            raise UserError(f"{WHERE}.probe_examples: the data has no labels that a probe could find; set it to 0")
        components = int(np.prod(tested.latents.shape[1:]))
        features = {
            "probe": (training[name].latents, tested.latents),
            "probe_random": tuple(part[name].latents for part in before),
            "probe_pca": principal(training[name].items, tested.items, components),
        }
        measured |= {f"{kind}_{name}": score for kind, score in compare(features, labels).items()}
    return measured


def _distances(experiment, features: str, name: str, test: Read) -> dict[str, float]:
    place = f"reconstruction_{name}"
    found = {f"{place}_mse": distance.mse(test.items, test.reconstructed).mean()}
    low, high = experiment.config.data.get("ranges", {}).get(name, (0.0, 1.0))
    found[f"{place}_psnr"] = distance.psnr(test.items, test.reconstructed, high - low).mean()
    if test.items.ndim == 4 and min(test.items.shape[1:3]) >= distance.WINDOW:
        found[f"{place}_ssim"] = distance.ssim(test.items, test.reconstructed, high - low).mean()
    training = spaces.Items(test.items, test.labels)
    if features == "judge":
        training = spaces.training_items(experiment, name, experiment.config.eval.judge_examples)
    space = spaces.space(experiment, name, features, f"{WHERE}.features", training)
    if len(test.items) > 1:
        found[f"{place}_frechet"] = distance.frechet_distance(*map(space.features, (test.items, test.reconstructed)))
    if space.judge is not None:
        found[f"judge_{name}_accuracy"] = space.judge.accuracy(test.items, test.labels)
        found[f"{place}_agreement"] = space.judge.accuracy(test.reconstructed, test.labels)
    return {key: float(value) for key, value in found.items()}


def _latents(experiment, name: str, test: Read) -> dict[str, float]:
    found: dict[str, float] = {f"latent_floats_{name}": float(np.prod(test.latents.shape[1:]))}
    found[f"latent_std_{name}"] = float(test.latents.std(dtype=np.float64))
    if test.mean is not None:
        found[f"active_units_{name}"] = float(active_units(test.mean))
    if test.codes is not None:
        found |= {f"{key}_{name}": value for key, value in codes(experiment.model.encoders[name], test.codes).items()}
        warn_of_collapse(name, found[f"codebook_usage_{name}"])
    return found


def codes(encoder, codes: np.ndarray) -> dict[str, float]:
    """{"codebook_usage", "codebook_perplexity", "code_bits"} of codes int[n, P], see `reconstruction`.

    Of a residual codebook, int[n, P, levels], the first two are means over its levels.
    """
    size = codebook_size(encoder)
    levels = codes.reshape(-1, codes.shape[2] if codes.ndim == 3 else 1).T
    counts = np.stack([np.bincount(level, minlength=size) for level in levels])
    shares = counts / counts.sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.where(counts, shares, 1)), axis=1)
    return {
        "codebook_usage": float((counts > 0).mean()),
        "codebook_perplexity": float(np.exp(entropy).mean()),
        "code_bits": float(np.prod(codes.shape[1:]) * np.log2(size)),
    }


def codebook_size(encoder) -> int:
    """Codes of an encoder that says so, or of its bottleneck."""
    if hasattr(encoder, "codebook_size"):
        return encoder.codebook_size
    return bottleneck.build(encoder.bottleneck, encoder.width, "model.encoders", encoder.dtype).codebook_size


def active_units(mean: np.ndarray) -> int:
    """How many latents of a posterior mean float[n, P, W] differ from item to item (Burda et al. 2016, section 5.2)."""
    return int((np.asarray(mean, np.float64).var(axis=0) > ACTIVE).sum())


def warn_of_collapse(name: str, usage: float) -> None:
    """Warns, in one line that says what helps, of a codebook that is hardly used."""
    if usage < COLLAPSED:
        logging.warning(
            "the codebook of encoders.%s has collapsed: %.1f %% of its codes are in use; what helps: restart of dead "
            "codes, codes that follow the latents by EMA, a start from latents of the data, a smaller codebook",
            name,
            100 * usage,
        )


def _samples(experiment, weights, chosen: Mapping[str, Any], name: str, test: Read) -> dict:
    """Items above their reconstructions, and the decoder's way from one item to another."""
    found, count = {}, min(chosen["shown"], len(test.items))
    row = lambda title, items: [("text", title), *(cell(experiment, name, item) for item in items)]
    if count:
        rows = [row("item", test.items[:count]), row("given back", test.reconstructed[:count])]
        found[f"reconstruction_{name}"] = (f"{name}: items, and what the decoder makes of their latents", rows)
    pairs = min(chosen["interpolations"], len(test.items) // 2)
    if pairs:
        share = np.linspace(0, 1, 7, dtype=np.float32)[None, :, None, None]
        first, second = (test.latents[k : 2 * pairs : 2][:, None] for k in (0, 1))
        between = ((1 - share) * first + share * second).reshape(-1, *test.latents.shape[1:])
        drawn = decoder(experiment, name)(weights, between).reshape(pairs, 7, *test.items.shape[1:])
        rows = [row("", drawn[i]) for i in range(pairs)]
        found[f"interpolation_{name}"] = (f"{name}: the decoder on the straight line between two latents", rows)
    return found


def _sounds(dataset, name: str, test: Read, count: int) -> dict:
    """Items beside their reconstructions as sounds, if their source says how a picture of its modality sounds."""
    source = getattr(dataset, "source", None)
    if not count or name != "image" or not hasattr(source, "sound"):
        return {}
    heard = lambda item: ("audio", source.sound(item), source.sample_rate)
    rows = [[("text", "item"), ("text", "given back")]]
    rows += [[heard(item), heard(back)] for item, back in zip(test.items[:count], test.reconstructed[:count])]
    return {f"sounds_{name}": (f"{name}: what items and reconstructions sound like, with phases made up", rows)}
