"""Any-to-any training: text generation + modality conversion + data generation."""

import jax
import jax.numpy as jnp

from vfm import metrics
from vfm.objectives import Aux
from vfm.objectives.generation import WHOLE_BATCH, generation_terms
from vfm.objectives.next_token import apply, cross_entropy


def any_to_any(
    model, *, text: float = 1.0, conversion: float = 1.0, generation: float = 1.0, reconstruction: float = 1.0
):
    """The survey's sum of losses for CoDi-2 (section 2.3; Tang et al. 2023), one term per modality X:

      text              next-token cross-entropy of the answer, nats per token
      conversion_X      mean squared error between OP(hidden states) and the features ME(item), for generated items
      generation_X      mean squared error between MD(OP(hidden states)) and the item, for generated items; of a
                        generative decoder its own losses, generation_X_NAME
      reconstruction_X  mean squared error between MD(ME(item)) and the item: decoder and encoder learn as a pair

    The keyword arguments are the weights. The regression target ME(item) carries no gradient: otherwise the encoder
    could lower the loss by giving all items the same features.
    """

    def loss_fn(params, variables, batch, rng, *, train: bool):
        logits, out, variables = apply(model, params, variables, batch, rng, train=train)
        terms, measured = {}, {}
        if logits is not None:
            nll, measured["token_accuracy"] = cross_entropy(logits, batch)
            terms["text"] = (text, *nll)
        real = batch.get("example_mask")
        for name, items in batch.get("inputs", {}).items():
            present = jnp.ones(items.shape[:2]) if real is None else real[:, None].repeat(items.shape[1], axis=1)
            generated = present * (batch["signal_starts"][name] >= 0)
            found = out.get(name, {})
            if "predicted" in found and "features" in found:
                target = jax.lax.stop_gradient(found["features"])
                terms[f"conversion_{name}"] = (conversion, *squared_error(found["predicted"], target, generated))
            if "decoded" in found:
                terms[f"generation_{name}"] = (generation, *squared_error(found["decoded"], items, generated))
            if "reconstructed" in found:
                shown = present * jnp.any(items != 0, axis=tuple(range(2, items.ndim)))  # an absent item is all zeros
                terms[f"reconstruction_{name}"] = (reconstruction, *squared_error(found["reconstructed"], items, shown))
        return terms | generation_terms(out, batch, generation, {}), Aux(measured, variables)

    if model.joint is not None:
        loss_fn.whole_batch = WHOLE_BATCH
    return loss_fn


def squared_error(x: jax.Array, y: jax.Array, mask: jax.Array) -> metrics.Metric:
    """Mean squared error per item, float[B, N, ...] twice; (sum, count) over the items of mask float[B, N]."""
    error = jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)).mean(axis=tuple(range(2, x.ndim)))
    return metrics.mean(error, mask)
