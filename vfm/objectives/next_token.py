"""Next-token prediction."""

import jax
import jax.numpy as jnp
import optax

from vfm import metrics
from vfm.errors import UserError
from vfm.model import INPUTS
from vfm.objectives import Aux


def apply(model, params, variables, batch, rng, *, train: bool):
    """model.apply on the fields of a batch that the model takes: (logits, out)."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    return model.apply({"params": params, **variables}, **inputs, train=train, rngs={"dropout": rng})


def cross_entropy(logits: jax.Array, batch) -> tuple[metrics.Metric, metrics.Metric]:
    """Token negative log-likelihood in nats and accuracy under `loss_mask`, as (sum, count) each."""
    logits = logits.astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    hit = jnp.argmax(logits, axis=-1) == batch["targets"]
    return metrics.mean(nll, batch["loss_mask"]), metrics.mean(hit, batch["loss_mask"])


def next_token(model):
    """-log p(next token), mean over the positions of `loss_mask` (Radford et al. 2018, eq. 1). Term: text, in nats."""
    if "text" not in model.decoders:
        raise UserError("config.objective: next_token needs model.decoders.text, which gives the logits")

    def loss_fn(params, variables, batch, rng, *, train: bool):
        logits, _ = apply(model, params, variables, batch, rng, train=train)
        nll, accuracy = cross_entropy(logits, batch)
        return {"text": (1.0, *nll)}, Aux({"token_accuracy": accuracy}, variables)

    return loss_fn
