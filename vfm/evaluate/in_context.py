"""How much better a model predicts by what its context shows, and whether its heads look where that stands."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vfm.data import InContext
from vfm.data.records import SPLITS, check_split
from vfm.errors import UserError
from vfm.evaluate import Evaluation, options
from vfm.model import INPUTS

OPTIONS = {"early": (0.25, 0.5), "late": (0.75, 1.0), "parts": 12, "beside": ""}


class _Asked:
    """The rows of a data set, with the shots of their targets."""

    def __init__(self, dataset: InContext):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int, rng=None) -> dict:
        return self.dataset.asked(index)


def check_in_context(experiment) -> None:
    """Refuses other data, models that do not predict token by token, and windows that are none."""
    config, chosen = experiment.config, options(experiment, "in_context", OPTIONS)
    if config.data.name != "in_context" or "text" not in experiment.model.decoders:
        raise UserError("the evaluator 'in_context' needs config.data.name='in_context' and model.decoders.text")
    for name in ("early", "late"):
        try:
            first, last = map(float, chosen[name])
        except (TypeError, ValueError):
            first, last = 0.0, 0.0
        if not 0 <= first < last <= 1:
            wanted = "two shares of the sequence, such as (0.75, 1.0)"
            raise UserError(f"config.eval.in_context.{name}={chosen[name]!r} must be {wanted}")
    if chosen["beside"]:
        check_split(chosen["beside"], SPLITS, "config.eval.in_context.beside")
    if not isinstance(chosen["parts"], int) or chosen["parts"] < 1:
        raise UserError(f"config.eval.in_context.parts={chosen['parts']!r} must be a whole number >= 1")


def in_context(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Over a split of the data set "in_context", with losses in nats; a target is asked if its context tells it:

      early_loss                of the targets of the window `early`
      late_loss                 of the asked targets of the window `late`
      icl_score                 the loss of the targets of the window `late` less that of the window `early`: below 0
                                where the context helps (Olsson et al. 2022, "in-context learning score")
      late_accuracy             the share of the asked targets of the window `late` that are ranked first
      late_exact_match          the share of the rows in which all of them are
      loss_K_shots, accuracy_K_shots   of the targets with K examples before them
      loss_from_I               of the targets of the part of the sequence that begins at target I
      induction_score           see `prefix_matching`: the highest of all heads; induction_score_layer_I: of a layer
      previous_token_score      see `previous_token`, likewise

    Targets that are not trained on (data.loss="asked") are left out, and so is a score that has none.
    Options in config.eval.in_context: early, late: shares of the sequence; parts: in how many parts the sequence is cut
    for `loss_from_I`; beside: another split that is scored with the test split, its metrics with its name before them.
    """
    chosen = options(experiment, "in_context", OPTIONS)
    found = _scores(experiment, params, variables, split, limit, chosen)
    if chosen["beside"] and split == experiment.config.eval.test_split:
        beside = _scores(experiment, params, variables, chosen["beside"], limit, chosen)
        found |= {f"{chosen['beside']}_{name}": value for name, value in beside.items()}
    return Evaluation(found, {})


def _scores(experiment, params, variables, split, limit, chosen) -> dict[str, float]:
    dataset = experiment.dataset(split)
    measured, heads = [], {}
    for host, batch in experiment.eval_batches(_Asked(dataset), limit):
        with experiment.use_mesh():
            found = _measure(experiment.model, {"params": params, **variables}, batch)
        loss, hit, scores = jax.tree.map(experiment.fetch, found)
        real, n = host["example_mask"] > 0, dataset.source.length
        measured.append([x[real, :n] for x in (loss, hit, host["shots"], host["loss_mask"] > 0)])
        for name, (total, count) in scores.items():
            before = heads.get(name, (0.0, 0.0))
            heads[name] = before[0] + total, before[1] + count
    found = by_position(*map(np.concatenate, zip(*measured)), chosen)
    for name, (total, count) in heads.items():
        if count:
            layers = (total / count).max(axis=1)  # of its heads
            found[name] = float(layers.max())
            found |= {f"{name}_layer_{i}": float(value) for i, value in enumerate(layers)}
    return found


def by_position(
    loss: np.ndarray, hit: np.ndarray, shots: np.ndarray, trained: np.ndarray, chosen: Mapping
) -> dict[str, float]:
    """The scores of losses float[R, n] in nats, hits bool[R, n], shots int[R, n] and what is trained on, bool[R, n], of
    R rows of n targets; chosen: the options of `in_context`."""
    n = loss.shape[1]
    place, asked = np.broadcast_to(np.arange(n), loss.shape), shots >= 0
    window = lambda name: (place >= round(chosen[name][0] * n)) & (place < round(chosen[name][1] * n))
    late = window("late")
    starts = np.unique(np.arange(chosen["parts"]) * n // chosen["parts"])
    part = starts[np.searchsorted(starts, place, side="right") - 1]
    wanted = {
        "early_loss": (loss, window("early") & trained),
        "late_loss": (loss, late & asked),
        "icl_score": (loss, late & trained),
        "late_accuracy": (hit, late & asked),
        **{f"loss_{k}_shots": (loss, shots == k) for k in np.unique(shots[asked])},
        **{f"accuracy_{k}_shots": (hit, shots == k) for k in np.unique(shots[asked])},
        **{f"loss_from_{i}": (loss, (part == i) & trained) for i in starts},
    }
    found = {name: float(values[which].mean()) for name, (values, which) in wanted.items() if which.any()}
    late_of_all = found.pop("icl_score", None)
    if late_of_all is not None and "early_loss" in found:
        found["icl_score"] = late_of_all - found["early_loss"]
    if "late_loss" in found:
        rows = (late & asked).any(axis=1)
        found["late_exact_match"] = float((hit | ~(late & asked)).all(axis=1)[rows].mean())
    return found


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all evaluations of a training
def _measure(model, variables, batch):
    """(loss float[B, T], hit bool[B, T], {score: (sum float[L, N], count)} of heads) of a model."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    (logits, _), kept = model.apply(variables, **inputs, train=False, mutable=["intermediates"])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    hit = jnp.argmax(logits, axis=-1) == batch["targets"]
    real = batch["input_mask"] & (batch["example_mask"] > 0)[:, None]
    heads = {}
    if (weights := _weights(kept.get("intermediates", {}))) is not None:
        heads["induction_score"] = prefix_matching(weights, batch["tokens"], real & (batch["shots"] >= 0))
        heads["previous_token_score"] = previous_token(weights, real)
    return loss, hit, heads


def _weights(kept: Mapping) -> jax.Array | None:
    """Attention weights float[L, B, N, T, T] of a backbone among the intermediates; None for one without attention."""
    try:
        return kept["backbone"]["transformer"]["layers"]["attention"]["weights"][0]
    except KeyError:
        return None


def prefix_matching(weights: jax.Array, tokens: jax.Array, asked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention that a head pays to the tokens behind earlier occurrences of the present token (Olsson et al. 2022,
    "prefix matching score"; an induction head has 1), as (sum float[L, N], count float[]) over the positions `asked`
    bool[B, T] whose token has occurred before.

    weights: float[L, B, N, T, T]; tokens: int[B, T].
    """
    place = jnp.arange(tokens.shape[1])
    follows = jnp.roll(tokens, 1, axis=1)[:, None, :] == tokens[:, :, None]  # key s stands behind such a token
    follows &= ((place[None, :] >= 1) & (place[None, :] <= place[:, None]))[None]
    asked = asked & follows.any(axis=-1)
    mass = jnp.einsum("lbnts,bts->lbnt", weights, (follows & asked[..., None]).astype(weights.dtype))
    return mass.sum(axis=(1, 3)), asked.sum().astype(jnp.float32)


def previous_token(weights: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention that a head pays to the token before the present one, as (sum float[L, N], count float[]) over the
    positions `real` bool[B, T] but the first; weights: float[L, B, N, T, T]."""
    mass = jnp.diagonal(weights, offset=-1, axis1=3, axis2=4)  # [L, B, N, T - 1]
    real = real[:, 1:].astype(weights.dtype)
    return jnp.einsum("lbnt,bt->ln", mass, real), real.sum()
