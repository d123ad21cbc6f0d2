"""Training of generative decoders: the terms of their losses, item by item."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vfm import metrics
from vfm.data.construct import plain
from vfm.errors import UserError
from vfm.objectives import Aux, LossFn, Term
from vfm.objectives.next_token import apply
from vfm.wiring import generative


def generation_terms(
    out: Mapping[str, Any], batch: Mapping[str, Any], weight: float, weights: Mapping[str, float]
) -> dict[str, Term]:
    """Terms generation_X_NAME of what generative decoders gave: out[X]["losses"] {NAME: float[B, N]}.

    The mean is over the items that a row generates (`signal_starts` >= 0, where the batch has them) of real rows
    (`example_mask`). weights: of single losses by NAME, times weight; 1 where it says nothing.
    """
    terms: dict[str, Term] = {}
    for modality in sorted(out):
        losses = out[modality].get("losses", {}) if isinstance(out[modality], Mapping) else {}
        for name, loss in sorted(losses.items()):
            mask = jnp.ones(loss.shape)
            if modality in batch.get("signal_starts", {}):
                mask = mask * (batch["signal_starts"][modality] >= 0)
            if "example_mask" in batch:
                mask = mask * batch["example_mask"][:, None]
            found = metrics.mean(loss.astype(jnp.float32), mask)
            terms[f"generation_{modality}_{name}"] = (weight * weights.get(name, 1.0), *found)
    return terms


def generation(model, *, weights: Mapping[str, float] | None = None) -> LossFn:
    """The losses of all generative decoders, mean over the items (survey section 2.3.4, figure 7a).

    Terms generation_X_NAME: what a decoder of modality X calls NAME, such as noise (diffusion) or codes (next-scale
    prediction), see its docstring. weights: {NAME: weight}, 1 by default.
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
        return terms, Aux({}, variables)

    return loss_fn
