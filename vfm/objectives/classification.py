"""Classification of whole sequences."""

import jax
import jax.numpy as jnp

from vfm import metrics
from vfm.errors import UserError
from vfm.objectives import Aux, LossFn
from vfm.objectives.next_token import apply, cross_entropy


def check_label(model, objective: str) -> None:
    """Refuses a model that gives no logits of classes."""
    if "label" not in model.decoders:
        raise UserError(f"config.objective: {objective} needs model.decoders.label, such as {{'name': 'classifier'}}")


def label_cross_entropy(
    logits: jax.Array, batch, label_smoothing: float = 0.0
) -> tuple[metrics.Metric, metrics.Metric]:
    """Negative log-likelihood of `label` int[B] in nats and accuracy, as (sum, count) each.

    logits: float[B, classes]. Rows with a label < 0, and those that only fill a batch (`example_mask`), do not count.
    """
    label = batch["label"]
    mask = (label >= 0) * batch.get("example_mask", jnp.ones(label.shape))
    return cross_entropy(logits, {"targets": jnp.maximum(label, 0), "loss_mask": mask}, label_smoothing)


def classification(model, *, label_smoothing: float = 0.0) -> LossFn:
    """-log p(label | sequence), mean over the rows. Term: label, in nats. label_smoothing: see `cross_entropy`."""
    check_label(model, "classification")
    if not 0 <= label_smoothing < 1:
        raise UserError(
            f"config.objective: classification: label_smoothing={label_smoothing} must be from 0 to less than 1"
        )

    def loss_fn(params, variables, batch, rng, *, train: bool):
        if "label" not in batch:
            raise UserError("config.objective: classification needs batches with a label")
        _, out, variables = apply(model, params, variables, batch, rng, train=train)
        nll, accuracy = label_cross_entropy(out["label"]["logits"], batch, label_smoothing)
        return {"label": (1.0, *nll)}, Aux({"label_accuracy": accuracy}, variables)

    return loss_fn
