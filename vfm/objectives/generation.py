"""Training of generative decoders: the terms of their losses, item by item."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import jax.numpy as jnp

from vfm import metrics
from vfm.data.construct import plain
from vfm.errors import UserError
from vfm.objectives import Aux, LossFn, Term
from vfm.objectives.contrastive import infonce
from vfm.objectives.next_token import apply
from vfm.wiring import generative

# Of joint generation: why gradients are not accumulated.
WHOLE_BATCH = "compares what is drawn together with the other items of a batch, and micro-batches have fewer"


def generation_terms(
    out: Mapping[str, Any], batch: Mapping[str, Any], weight: float, weights: Mapping[str, float]
) -> dict[str, Term]:
    """Terms generation_X_NAME of what generative decoders gave: out[X]["losses"] {NAME: float[B, N]}.

    The mean is over the items that a row generates (`signal_starts` >= 0, where the batch has them) of real rows
    (`example_mask`). weights: of single losses by NAME, times weight; 1 where it says nothing. Of joint generation also
    generation_joint_contrast: how well items that belong together are found by what the decoders see of each other.
    """
    terms: dict[str, Term] = {}
    for modality in sorted(out):
        losses = out[modality].get("losses", {}) if isinstance(out[modality], Mapping) else {}
        for name, loss in sorted(losses.items()):
            found = metrics.mean(loss.astype(jnp.float32), _mask(loss, batch, modality))
            terms[f"generation_{modality}_{name}"] = (weight * weights.get(name, 1.0), *found)
    if "joint" in out:
        found = _contrast(out["joint"], batch)
        terms["generation_joint_contrast"] = (weight * weights.get("contrast", 1.0), *found)
    return terms


def _contrast(joint: Mapping[str, Any], batch: Mapping[str, Any]) -> metrics.Metric:
    """InfoNCE of the embeddings {"noisy", "clean": {X: float32[B, N, E]}} of what is generated together.

    The mean over pairs of modalities: both without noise, and either noisy. What is drawn is seen through its noise,
    which the losses of the noise teach slowly.
    """
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    noisy, clean = ({name: flat(x) for name, x in joint["embeddings"][kind].items()} for kind in ("noisy", "clean"))
    each = [_mask(x[..., 0], batch, name) for name, x in joint["embeddings"]["clean"].items()]
    mask = flat(jnp.stack(each).min(axis=0)[..., None])[:, 0]
    found = [
        infonce(ours[a], theirs[b], joint["scale"], mask)[0]
        for a, b in combinations(sorted(clean), 2)
        for ours, theirs in ((clean, clean), (noisy, clean), (clean, noisy))
    ]
    return metrics.mean(jnp.stack(found).mean(axis=0), mask)


def _mask(loss: jnp.ndarray, batch: Mapping[str, Any], modality: str) -> jnp.ndarray:
    """float[B, N]: the items of real rows that are generated."""
    mask = jnp.ones(loss.shape)
    if modality in batch.get("signal_starts", {}):
        mask = mask * (batch["signal_starts"][modality] >= 0)
    if "example_mask" in batch:
        mask = mask * batch["example_mask"][:, None]
    return mask


def scale_metrics(out: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, metrics.Metric]:
    """Metrics generation_X_scale_{s}: the loss of each scale, of decoders that give out[X]["scales"] float[B, N, S]."""
    found = {}
    for modality in sorted(out):
        scales = out[modality].get("scales") if isinstance(out[modality], Mapping) else None
        for s in range(0 if scales is None else scales.shape[-1]):
            loss = scales[..., s].astype(jnp.float32)
            found[f"generation_{modality}_scale_{s}"] = metrics.mean(loss, _mask(loss, batch, modality))
    return found


def generation(model, *, weights: Mapping[str, float] | None = None) -> LossFn:
    """The losses of all generative decoders, mean over the items (survey section 2.3.4, figure 7a).

    Terms generation_X_NAME: what a decoder of modality X calls NAME, such as noise (diffusion) or codes (next-scale
    prediction), see its docstring. weights: {NAME: weight}, 1 by default. Metrics generation_X_scale_{s}: next-scale
    prediction's loss of each scale, from the coarsest. A model with `joint` has the term generation_joint_contrast
    (weight "contrast") as well, where its decoders see items that belong together.
    """
    if not generative(model):
        raise UserError("config.objective: generation needs a generative decoder, such as 'diffusion' or 'var'")
    given = plain(weights or {})

    def loss_fn(params, variables, batch, rng, *, train: bool):
        _, out, variables = apply(model, params, variables, batch, rng, train=train)
        terms = generation_terms(out, batch, 1.0, given)
        if not terms:
            raise UserError(
                f"config.objective: generation needs items of {', '.join(generative(model))} in its batches"
            )
        return terms, Aux(scale_metrics(out, batch), variables)

    if model.joint is not None:
        loss_fn.whole_batch = WHOLE_BATCH
    return loss_fn
