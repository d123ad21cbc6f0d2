"""Whether items that are drawn together belong together."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vfm.decoders.diffusion import Diffusion
from vfm.errors import UserError, unknown
from vfm.evaluate import Evaluation, cell, distance, spaces
from vfm.evaluate.generation import drawer
from vfm.evaluate.judge import Judge
from vfm.model import INPUTS

OPTIONS = {"shown": 10, "seed": 0}
# What `sample_joint` takes: the settings of the decoders' `sample`.
SETTINGS = tuple(
    name
    for name in inspect.signature(Diffusion.sample).parameters
    if name not in ("self", "condition", "rng", "batch_size", "control")
)
WHERE = "config.eval.joint"


def _options(experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the evaluator, settings of the sampler) of `config.eval.joint`."""
    given = dict(experiment.config.eval.get("joint", {}))
    own = {**OPTIONS, **{field: given.pop(field) for field in OPTIONS if field in given}}
    return own, given


def check_joint(experiment) -> None:
    """Refuses a model that draws nothing together, data without labels, and unknown options."""
    model = experiment.model
    if model.joint is None or model.backbone is not None:
        raise UserError(
            "the evaluator 'joint' needs model.joint, the modalities that are drawn together, without a backbone"
        )
    for field in _options(experiment)[1]:
        if field not in SETTINGS:
            raise unknown("field", field, [*OPTIONS, *SETTINGS], WHERE)
    for name in model.joint["modalities"]:
        spaces.check_space(experiment, name, "judge", f"{WHERE}.judge")


def joint(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Items of the modalities of `model.joint`, drawn together for each row of the split (or of `limit` rows):

      joint_agreement            the share of rows whose items show one class, by a classifier for each modality, fitted
                                 on real training items
      joint_agreement_alone      the same of items that each decoder draws alone, from the same noise
      joint_agreement_shuffled   the same of the items that were drawn together, after those of a modality are
                                 exchanged: what the frequencies of their classes give by themselves
      joint_agreement_real       the same of the real items of the split: what the classifiers allow
      joint_ratio                joint_agreement over joint_agreement_alone
      joint_{X}_frechet, joint_{X}_frechet_alone   distance of the items of X from real ones, in features of the
                                 classifier, drawn together and alone

    Options in config.eval.joint: shown (items in the report), seed, and the settings of the decoders' `sample`.
    """
    own, settings = _options(experiment)
    names = experiment.model.joint["modalities"]
    found = _draw(experiment, {"params": params, **variables}, settings, own["seed"], split, limit)
    judges = {}
    for name in names:
        training = spaces.training_items(experiment, name, experiment.config.eval.judge_examples)
        judges[name] = Judge(training.raw, training.labels)
    classes = {kind: {n: judges[n].predict(items[n]) for n in names} for kind, items in found.items()}
    measured = agreements(classes, own["seed"])
    for name, judge in judges.items():
        real = judge.features(found["real"][name])
        for kind, ending in (("joint", ""), ("alone", "_alone")):
            items = judge.features(found[kind][name])
            measured[f"joint_{name}_frechet{ending}"] = distance.frechet_distance(real, items)
    rows = [
        [("text", f"{name}, {how}"), *(cell(experiment, name, x) for x in found[kind][name][: own["shown"]])]
        for kind, how in (("joint", "together"), ("alone", "alone"))
        for name in names
    ]
    return Evaluation(measured, {"joint": ("Items that were drawn together, one above the other, and alone", rows)})


def agreements(classes: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> dict[str, float]:
    """The shares of rows of one class. classes: {"joint", "alone", "real": {modality: int[n]}}."""
    rng = np.random.default_rng(seed)
    shuffled = {name: rng.permutation(found) for name, found in classes["joint"].items()}
    share = lambda found: float(np.mean([len(set(row)) == 1 for row in zip(*found.values(), strict=True)]))
    together, alone = share(classes["joint"]), share(classes["alone"])
    return {
        "joint_agreement": together,
        "joint_agreement_alone": alone,
        "joint_agreement_shuffled": share(shuffled),
        "joint_agreement_real": share(classes["real"]),
        # Where no pair agrees by chance, as if one did.
        "joint_ratio": together / max(alone, 1 / len(shuffled[next(iter(shuffled))])),
    }


def _draw(experiment, weights, settings, seed: int, split: str, limit: int | None) -> dict[str, dict[str, np.ndarray]]:
    """{"joint", "alone", "real": {modality: float[n, *item_shape]}}."""
    model = experiment.model
    names = model.joint["modalities"]
    conditioned = model.centre in model.encoders

    @experiment.jit
    def together(weights, batch, key):
        out = model.apply(weights, **{field: batch[field] for field in INPUTS if field in batch}, train=False)[1]
        rows = {} if conditioned else {"batch_size": len(batch["example_mask"])}
        return model.apply(weights, out, rng=key, **rows, **settings, method="sample_joint")

    alone = {name: drawer(experiment, name, settings) for name in names}
    found = {kind: {name: [] for name in names} for kind in ("joint", "alone", "real")}
    for i, (host, batch) in enumerate(experiment.eval_batches(experiment.dataset(split), limit)):
        rows, key = host["example_mask"] > 0, jax.random.fold_in(jax.random.key(seed), i)
        drawn = together(weights, batch, key)
        for k, name in enumerate(names):
            single = alone[name](weights, batch, jax.random.fold_in(key, k))
            found["joint"][name].append(experiment.fetch(drawn[name])[rows, -1])
            found["alone"][name].append(experiment.fetch(single)[rows, -1])
            found["real"][name].append(host["inputs"][name][rows, -1])
    return {kind: {name: np.concatenate(x) for name, x in items.items()} for kind, items in found.items()}
