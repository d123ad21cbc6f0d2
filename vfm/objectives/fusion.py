"""Pretraining of a fusion encoder on items and texts that are read together."""

import jax
import jax.numpy as jnp

from vfm import metrics
from vfm.errors import UserError
from vfm.objectives import Aux, LossFn, Term
from vfm.objectives.classification import check_label, label_cross_entropy
from vfm.objectives.next_token import apply, check_text, cross_entropy


def fusion(model, *, text: float = 1.0, region: float = 1.0, matching: float = 1.0) -> LossFn:
    """The sum of what VL-BERT (Su et al. 2020) and UNITER (Chen et al. 2020, section 3.2) are trained on, with the data
    set `matching`; the keyword arguments are the weights, and 0 leaves a term out:

      text      -log p(masked token | everything else), nats per position of `loss_mask`
      region_X  mean squared error between the features ME(item) of a masked slot of X and OP(hidden state there), over
                `region_mask`, as UNITER's feature regression
      matching  -log p(label): do item and text belong together, nats per row

    The target ME(item) carries no gradient, for the encoder could otherwise give all items the same features. One that
    is trained along still tends to features that are easy to recover, unless another term needs them (matching
    does) or it is frozen (`optimizer.frozen`; VL-BERT's and UNITER's come trained). A slot is masked behind the
    encoder: one that mixes the features of an item shows some of a masked slot in the others.
    """
    where = "config.objective: fusion"
    for name, weight in {"text": text, "region": region, "matching": matching}.items():
        if weight < 0:
            raise UserError(f"{where}: {name}={weight} must not be negative")
    if not text and not region and not matching:
        raise UserError(f"{where}: one of text, region and matching must be more than 0")
    if model.backbone is None or model.backbone.kind != "encoder_only":
        raise UserError(f"{where} needs a backbone that sees both sides of a token: encoder_only or cross_encoder")
    if text:
        check_text(model, "fusion, with text > 0,")
    if matching:
        check_label(model, "fusion, with matching > 0,")

    def loss_fn(params, variables, batch, rng, *, train: bool):
        logits, out, variables = apply(model, params, variables, batch, rng, train=train)
        terms: dict[str, Term] = {}
        measured = {}
        if text:
            nll, measured["token_accuracy"] = cross_entropy(logits, batch)
            terms["text"] = (text, *nll)
        if region:
            if not batch.get("region_mask"):
                raise UserError(f"{where}: region={region} needs batches with masked slots: data.region_rate > 0")
            for name, mask in batch["region_mask"].items():
                terms[f"region_{name}"] = (region, *feature_error(out[name], mask, batch.get("example_mask")))
        if matching:
            nll, measured["label_accuracy"] = label_cross_entropy(out["label"]["logits"], batch)
            terms["matching"] = (matching, *nll)
        return terms, Aux(measured, variables)

    return loss_fn


def feature_error(found, mask: jax.Array, example_mask: jax.Array | None) -> metrics.Metric:
    """Squared error of recovered features, mean over their width; (sum, count) over the slots of mask float[B, N, P].

    found: `features` and `recovered`, float[B, N, P, W] each, of the model's `out`.
    """
    target = jax.lax.stop_gradient(found["features"]).astype(jnp.float32)
    error = jnp.square(found["recovered"].astype(jnp.float32) - target).mean(axis=-1)
    return metrics.mean(error, mask if example_mask is None else mask * example_mask[:, None, None])
