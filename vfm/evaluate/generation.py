"""How good the items are that a model draws: like real ones, as various as they are, of the class asked for."""

import inspect
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vfm.data.edges import edges
from vfm.data.pairs import Task
from vfm.errors import UserError, unknown
from vfm.evaluate import Evaluation, cell, distance, fewest, spaces
from vfm.evaluate.judge import Judge
from vfm.evaluate.reconstruction import decoder, nearest_codes, reader
from vfm.model import INPUTS
from vfm.wiring import autoencoded, controls, generative, labels

OPTIONS = {
    "features": "pixels", "neighbours": 3, "density": "", "components": 10, "shown": 8, "seed": 0, "bits": 0,
    "adherence": "",
}  # fmt: skip
ADHERENCES = {"edges": edges}  # how a control is read from an item float[*item_shape]
DENSITIES = ("", "prior", "gaussian", "mixture")
GIVEN = ("self", "condition", "rng", "batch_size")  # arguments of `sample` that no config sets
WHERE = "config.eval.generation"


class Drawn(NamedTuple):
    """Items that were drawn beside as many real ones, float[n, *item_shape]; the labels that were asked for, int[n], or
    None; seconds that a draw took, of all items."""

    items: np.ndarray
    real: np.ndarray
    labels: np.ndarray | None
    seconds: float
    controls: np.ndarray | None = None  # what controlled them, float[n, *item_shape of the control]


def _options(experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the evaluator, settings of the samplers) of `config.eval.generation`."""
    given = dict(experiment.config.eval.get("generation", {}))
    own = {**OPTIONS, **{field: given.pop(field) for field in OPTIONS if field in given}}
    return own, given


def sampler_settings(experiment) -> dict[str, Any]:
    """The settings of the samplers in `config.eval.generation`."""
    return _options(experiment)[1]


def _samplers(model) -> dict[str, set[str]]:
    """{X: the settings that its generative decoder's `sample` takes}."""
    parameters = lambda name: inspect.signature(type(model.decoders[name]).sample).parameters
    return {name: set(parameters(name)) - set(GIVEN) for name in generative(model)}


def _wanted(experiment) -> list[tuple[str, str, str | None]]:
    """(prefix of the metrics, modality, task or None) of all that the model can draw."""
    model = experiment.model
    if model.backbone is None:
        return [(f"sample_{name}", name, None) for name in sorted({*generative(model), *autoencoded(model)})]
    items, found = set(model.decoders) - {*labels(model), "text"}, []
    for task in experiment.config.data.get("tasks", ()):
        inputs, output = Task.split(task)
        if output in items:
            found.append((f"{'_'.join(inputs)}_to_{output}", output, task))
    return found


def check_generation(experiment) -> None:
    """Refuses a model that draws nothing, and options and settings of samplers that are unknown."""
    own, settings = _options(experiment)
    samplers = _samplers(experiment.model)
    for field in settings:
        if not any(field in known for known in samplers.values()):
            raise unknown("field", field, [*OPTIONS, *set().union(*samplers.values())], WHERE)
    if own["density"] not in DENSITIES:
        raise unknown("density", own["density"], DENSITIES, f"{WHERE}.density")
    wanted = _wanted(experiment)
    if not wanted:
        raise UserError(
            "the evaluator 'generation' needs a decoder of items: a generative one, an autoencoder without a backbone, "
            "or with one a task in config.data.tasks whose output has a decoder"
        )
    for _, name, _ in wanted:
        spaces.check_space(experiment, name, own["features"], f"{WHERE}.features")
    if own["bits"] and not any(_has_likelihood(experiment.model, name) for _, name, _ in wanted):
        raise UserError(
            f"{WHERE}.bits={own['bits']} needs a decoder that bounds the likelihood of items: 'diffusion' with a "
            "Gaussian process on the items themselves"
        )
    if own["adherence"]:
        if own["adherence"] not in ADHERENCES:
            raise unknown("adherence", own["adherence"], ADHERENCES, f"{WHERE}.adherence")
        if not any(name in controls(experiment.model) for _, name, _ in wanted):
            raise UserError(f"{WHERE}.adherence={own['adherence']!r} needs a decoder with a control")


def _has_likelihood(model, name: str) -> bool:
    return getattr(model.decoders[name], "has_likelihood", False)


def generation(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Items of each modality X drawn under the conditions of the split (or of `limit` rows), beside its real items:

      sample_{X}_frechet, _precision, _recall, _density, _coverage   see `distance`, in the features chosen
      sample_{X}_diversity   mean distance of two drawn items of a class there, over that of two real ones; of any two,
                             where there is no condition
      sample_{X}_agreement   the share of drawn items that a classifier, fitted on real training items alone, takes for
                             the class that was asked for; judge_{X}_accuracy: its own on the split
      sample_{X}_seconds     per item, without compilation
      sample_{X}_bits_per_dim   with `bits`: the bound on -log2 of the probability of the real items, per number in
                             them, under their conditions (Ho et al. 2020, eq. 5)
      sample_{X}_adherence, _adherence_uncontrolled   with `adherence`: the correlation of the control that was given
                             and the one read from the drawn item, mean over items; the same of items that are drawn
                             from the same noise and conditions without the control

    With a backbone the name is {inputs}_to_{X}_… for every task of the data that ends in a modality with a decoder, be
    it generative or not. An autoencoder without a backbone draws latents from a density: "prior", the standard normal
    of a Gaussian posterior; "gaussian" or "mixture" (of `components` Gaussians), fitted to the latents of training
    items, as any autoencoder can be made generative (Ghosh et al. 2020, section 4). The default is the prior where
    there is one, else the mixture. Latents of a codebook are moved to their nearest codes.

    Options in config.eval.generation: features ("pixels", "judge", or the folder of a run), neighbours (k of precision
    and recall), density, components, shown (items of a class in the report), seed, bits (rows for the bound, which
    takes as many passes as the process has steps; 0: none), adherence (how a control is read from an item: "edges");
    and the settings of the decoder's `sample`, such as steps, guidance, temperature.
    """
    own, settings = _options(experiment)
    weights = {"params": params, **variables}
    measured: dict[str, float] = {}
    samples: dict[str, tuple[str, list]] = {}
    fitted: dict[str, tuple[spaces.Space, Judge | None]] = {}
    for prefix, name, task in _wanted(experiment):
        if name not in fitted:
            fitted[name] = _space(experiment, own, name, task)
        space, judge = fitted[name]
        if task is None and name not in generative(experiment.model):
            drawn = _from_density(experiment, weights, own, name, split, limit)
        else:
            drawn = _from_conditions(experiment, weights, own, settings, name, task, split, limit)
        measured |= {f"{prefix}_{key}": value for key, value in _scores(own, space, drawn).items()}
        if judge is not None and drawn.labels is not None:
            measured[f"{prefix}_agreement"] = judge.accuracy(drawn.items, drawn.labels)
            measured[f"judge_{name}_accuracy"] = judge.accuracy(drawn.real, drawn.labels)
        if own["adherence"] and drawn.controls is not None:
            free = _from_conditions(experiment, weights, own, settings, name, task, split, limit, controlled=False)
            for ending, found in (("", drawn), ("_uncontrolled", free)):
                score = _adherence(ADHERENCES[own["adherence"]], found.items, drawn.controls)
                measured[f"{prefix}_adherence{ending}"] = score
        if own["bits"] and _has_likelihood(experiment.model, name):
            bits = _bits_per_dim(experiment, weights, own["seed"], name, task, split, fewest(limit, own["bits"]))
            measured[f"{prefix}_bits_per_dim"] = bits
        caption = f"{task or name}: items that were drawn" + ("" if drawn.labels is None else ", by class")
        samples[prefix] = (caption, _rows(experiment, name, drawn, own["shown"]))
    return Evaluation(measured, samples)


def _space(experiment, own, name, task) -> tuple[spaces.Space, Judge | None]:
    """The features, and the judge if the data has labels."""
    overrides = {} if task is None else {"task": task}
    training = spaces.training_items(experiment, name, experiment.config.eval.judge_examples, **overrides)
    space = spaces.space(experiment, name, own["features"], f"{WHERE}.features", training)
    several = training.labels is not None and len(np.unique(training.labels)) > 1
    return space, space.judge or (Judge(training.raw, training.labels) if several else None)


def drawer(experiment, name: str, settings: Mapping[str, Any]):
    """A function (weights, batch, key) -> items [B, N, *item_shape] that the model gives for a batch: what a generative
    decoder draws, with those of the settings that it takes, or what another one decodes."""
    model, takes = experiment.model, _samplers(experiment.model).get(name, set())
    settings = {field: value for field, value in settings.items() if field in takes}
    conditioned = model.backbone is not None or model.centre in model.encoders

    def draw(weights, batch, key):
        inputs = {field: batch[field] for field in INPUTS if field in batch}
        out = model.apply(weights, **inputs, train=False)[1]
        if name not in generative(model):
            return out[name]["decoded"]
        rows = {} if conditioned else {"batch_size": len(batch["example_mask"])}
        return model.apply(weights, name, out, rng=key, **rows, **settings, method="sample")

    return experiment.jit(draw)


def _from_conditions(experiment, weights, own, settings, name, task, split, limit, controlled=True) -> Drawn:
    """What the model draws for the rows of the split; controlled: with the decoder's control, if it has one."""
    model = experiment.model
    control = controls(model).get(name)
    overrides = {} if task is None else {"task": task}
    truth = experiment.dataset(split, **overrides)
    asked = truth if task is None else experiment.dataset(split, task=task, answer=False)
    conditioned = model.backbone is not None or model.centre in model.encoders
    step, key = drawer(experiment, name, settings), jax.random.key(own["seed"])
    items, real, found, given, seconds = [], [], [], [], 0.0
    for i, ((host, batch), (full, _)) in enumerate(
        zip(experiment.eval_batches(asked, limit), experiment.eval_batches(truth, limit), strict=True)
    ):
        if control and not controlled:
            batch = {**batch, "inputs": {of: x for of, x in batch["inputs"].items() if of != control}}
        call = (weights, batch, jax.random.fold_in(key, i))
        if not i:
            jax.block_until_ready(step(*call))  # compiles
        began = time.perf_counter()
        batch_items = jax.block_until_ready(step(*call))
        seconds += time.perf_counter() - began
        rows = host["example_mask"] > 0
        items.append(experiment.fetch(batch_items)[rows, -1])
        real.append(full["inputs"][name][rows, -1])
        if conditioned and "label" in host:
            found.append(host["label"].reshape(len(rows), -1)[rows, -1])
        if control and controlled:
            given.append(host["inputs"][control][rows, -1])
    joined = lambda parts: np.concatenate(parts) if parts else None
    return Drawn(joined(items), joined(real), joined(found), seconds, joined(given))


def _adherence(read, items: np.ndarray, given: np.ndarray) -> float:
    """The correlation of a control and the one that is read from the item, mean over items; 0 where one is constant."""
    score = []
    for item, control in zip(items, given, strict=True):
        a, b = (x.reshape(-1).astype(np.float64) - x.mean(dtype=np.float64) for x in (read(item), control))
        size = np.sqrt((a @ a) * (b @ b))
        score.append(a @ b / size if size else 0.0)
    return float(np.mean(score))


def _bits_per_dim(experiment, weights, seed: int, name: str, task: str | None, split: str, rows: int) -> float:
    """The mean bound over the real items of the split under what the model is given with them."""
    model = experiment.model
    truth = experiment.dataset(split, **({} if task is None else {"task": task}))
    asked = truth if task is None else experiment.dataset(split, task=task, answer=False)

    @experiment.jit
    def bound(weights, batch, items, key):
        out = model.apply(weights, **{x: batch[x] for x in INPUTS if x in batch}, train=False)[1].get(name, {})
        flat = lambda x: None if x is None else x[:, -1]
        given = {"control": flat(out.get("control")), "rng": key}
        method = lambda m: m.decoders[name].bits_per_dim(flat(out.get("condition")), items, **given)
        return model.apply(weights, method=method)

    found, key = [], jax.random.key(seed)
    batches = zip(experiment.eval_batches(asked, rows), experiment.eval_batches(truth, rows), strict=True)
    for i, ((host, batch), (full, true)) in enumerate(batches):
        real = host["example_mask"] > 0
        model.decoders[name].check_levels(full["inputs"][name][real, -1])
        bits = bound(weights, batch, true["inputs"][name][:, -1], jax.random.fold_in(key, i))
        found.append(experiment.fetch(bits)[real])
    return float(np.concatenate(found).mean(dtype=np.float64))


def _from_density(experiment, weights, own, name, split, limit) -> Drawn:
    """What the decoder of an autoencoder makes of latents that are drawn from a density, as many as real items."""
    read, decode = reader(experiment), decoder(experiment, name)
    real = spaces.real_items(experiment, experiment.dataset(split), name, limit).raw
    rows = fewest(experiment.config.eval.judge_examples)
    training = read(weights, experiment.dataset("train", train=False), rows)[name]
    density = own["density"] or ("prior" if training.mean is not None else "mixture")
    if density == "prior" and training.mean is None:
        raise UserError(f"{WHERE}.density='prior' needs an encoder with a Gaussian posterior; take 'mixture'")
    shape = training.latents.shape[1:]
    latents = _draw(density, training.latents.reshape(len(training.latents), -1), len(real), own).reshape(-1, *shape)
    if training.codes is not None:
        latents = nearest_codes(experiment, weights, name, latents)
    decode(weights, latents[:1])  # compiles
    began = time.perf_counter()
    items = decode(weights, latents)
    return Drawn(items, real, None, time.perf_counter() - began)


def _draw(density: str, latents: np.ndarray, count: int, own: Mapping[str, Any]) -> np.ndarray:
    """float32[count, D] from a density of latents [n, D]."""
    rng = np.random.default_rng(own["seed"])
    if density == "prior":
        return rng.standard_normal((count, latents.shape[1])).astype(np.float32)
    import threadpoolctl
    from sklearn.mixture import GaussianMixture

    components = 1 if density == "gaussian" else min(own["components"], len(latents))
    with threadpoolctl.threadpool_limits(1):
        mixture = GaussianMixture(components, random_state=own["seed"], reg_covar=1e-4).fit(latents.astype(np.float64))
        drawn, _ = mixture.sample(count)
    return rng.permutation(drawn).astype(np.float32)


def _scores(own, space: spaces.Space, drawn: Drawn) -> dict[str, float]:
    found = {"seconds": drawn.seconds / max(len(drawn.items), 1)}
    if min(len(drawn.items), len(drawn.real)) <= max(own["neighbours"], 1):
        return found
    real, items = space.features(drawn.real), space.features(drawn.items)
    found["frechet"] = distance.frechet_distance(real, items)
    found |= distance.manifold_scores(real, items, own["neighbours"])
    classes = np.zeros(len(items), int) if drawn.labels is None else drawn.labels
    among_real = distance.spread(real, classes)
    if among_real:
        found["diversity"] = distance.spread(items, classes) / among_real
    return found


def _rows(experiment, name, drawn: Drawn, shown: int) -> list[list[tuple]]:
    """A row of cells for each class, at most ten; four rows where there are none."""
    if drawn.labels is None:
        rows = [("", drawn.items[i * shown : (i + 1) * shown]) for i in range(4)]
    else:
        classes = np.unique(drawn.labels)[:10]
        rows = [(str(label), drawn.items[drawn.labels == label][:shown]) for label in classes]
    return [[("text", title), *(cell(experiment, name, x) for x in items)] for title, items in rows if len(items)]
