"""Next-token prediction, and what all objectives that predict tokens share."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vfm import metrics
from vfm.errors import UserError
from vfm.layers.moe import load_balancing_loss, router_z_loss
from vfm.model import INPUTS
from vfm.objectives import Aux, LossFn, Term

MUTABLE = ("batch_stats", "codebook")  # collections that a call in training changes


def rngs(rng: jax.Array) -> dict[str, jax.Array]:
    """The random streams of a call of the model: dropout, and the draws of latents, times and noise."""
    return {"dropout": rng, "noise": jax.random.fold_in(rng, 1)}


def apply(model, params, variables, batch, rng, *, train: bool):
    """model.apply on the fields of a batch that the model takes: (logits, out, variables).

    The collections of `MUTABLE` among the variables come back as training changed them.
    """
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    mutable = [name for name in MUTABLE if train and name in variables]
    (logits, out), changed = model.apply(
        {"params": params, **variables}, **inputs, train=train, rngs=rngs(rng), mutable=mutable
    )
    return logits, out, {**variables, **changed}


def cross_entropy(
    logits: jax.Array, batch: Mapping[str, Any], label_smoothing: float = 0.0
) -> tuple[metrics.Metric, metrics.Metric]:
    """Token negative log-likelihood in nats and accuracy under `loss_mask`, as (sum, count) each.

    logits: float[B, T, V]; batch: targets int[B, T], loss_mask [B, T] (or all without T). label_smoothing e: the target
    is 1 - e of the true token and e of the uniform distribution (Szegedy et al. 2016, section 7).
    """
    logits, targets = logits.astype(jnp.float32), batch["targets"]
    total = jax.nn.logsumexp(logits, axis=-1)
    loss = total - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (total - logits.mean(axis=-1))
    # The first of the largest, which is argmax; as a minimum of places it is six times as fast on CPU.
    place = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,))
    largest = logits == jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    hit = jnp.where(largest, place, logits.shape[-1]).min(axis=-1) == targets
    return metrics.mean(loss, batch["loss_mask"]), metrics.mean(hit, batch["loss_mask"])


def z_loss(logits: jax.Array, mask: jax.Array) -> metrics.Metric:
    """Squared logsumexp of logits float[B, T, V], which keeps them near log-probabilities (PaLM, Chowdhery et al. 2022,
    section 5); (sum, count) over mask [B, T]."""
    return metrics.mean(jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)), mask)


def router_terms(out: Mapping, batch: Mapping, experts_per_token: int, balance: float, z: float) -> dict[str, Term]:
    """Terms router_balance and router_z of a backbone's `out`, and encoder_… of its encoder, over the real tokens.

    The balance is no mean over tokens: with gradient accumulation it is that of each micro-batch.
    """
    terms: dict[str, Term] = {}
    stacks = {"": (out, "decoder_mask" if "encoder" in out else "input_mask")}
    if "encoder" in out:
        stacks["encoder_"] = (out["encoder"], "input_mask")
    for prefix, (stack, field) in stacks.items():
        logits = stack["router_logits"]
        mask = batch[field] if field in batch else jnp.ones(logits.shape[1:3], bool)
        if "example_mask" in batch:  # without the rows that only fill a batch
            mask = mask & (batch["example_mask"] > 0)[:, None]
        count = mask.sum().astype(jnp.float32)
        if balance:
            loss = load_balancing_loss(logits, experts_per_token, mask)
            terms[f"{prefix}router_balance"] = (balance, loss * count, count)
        if z:
            terms[f"{prefix}router_z"] = (z, router_z_loss(logits, mask) * count, count)
    return terms


def check_text(model, objective: str) -> None:
    """Refuses a model that gives no logits of tokens."""
    if "text" not in model.decoders:
        raise UserError(f"config.objective: {objective} needs model.decoders.text, which gives the logits")


def check_batch(batch: Mapping, field: str, objective: str, corruptions: str) -> None:
    """Refuses batches without a field, and says which corruptions make it."""
    if field not in batch:
        how = f"set config.data.corruption.name to {corruptions}"
        raise UserError(f"config.objective: {objective} needs {field} in its batches; {how}")


def predict_tokens(
    model, objective: str, z_weight: float, label_smoothing: float, router_balance: float, router_z: float
) -> LossFn:
    """The loss function of `next_token`, for a model whose logits stand where the targets do."""
    check_text(model, objective)
    where, sparse = f"config.objective: {objective}", getattr(model.backbone, "num_experts", None)
    if not 0 <= label_smoothing < 1:
        raise UserError(f"{where}: label_smoothing={label_smoothing} must be from 0 to less than 1")
    if (router_balance or router_z) and not sparse:
        raise UserError(
            f"{where}: router_balance and router_z are for a mixture of experts (model.backbone.num_experts)"
        )

    def loss_fn(params, variables, batch, rng, *, train: bool):
        if model.backbone.kind == "encoder_decoder":  # whose decoder would else read what its encoder sees whole
            check_batch(batch, "decoder_tokens", objective, "span_corruption or text_infilling")
        logits, out, variables = apply(model, params, variables, batch, rng, train=train)
        nll, accuracy = cross_entropy(logits, batch, label_smoothing)
        terms: dict[str, Term] = {"text": (1.0, *nll)}
        if z_weight:
            terms["z_loss"] = (z_weight, *z_loss(logits, batch["loss_mask"]))
        if router_balance or router_z:
            experts = model.backbone.experts_per_token
            terms |= router_terms(out["backbone"], batch, experts, router_balance, router_z)
        return terms, Aux({"token_accuracy": accuracy}, variables)

    return loss_fn


def next_token(
    model, *, z_loss: float = 0.0, label_smoothing: float = 0.0, router_balance: float = 0.0, router_z: float = 0.0
) -> LossFn:
    """-log p(next token), mean over the positions of `loss_mask` (Radford et al. 2018, eq. 1).

    With a `prefix` in the batch it is prefix language modelling (Raffel et al. 2020), and with GLM's positions as well
    autoregressive blank infilling (Du et al. 2022, eq. 1): data.corruption `prefix_lm`, `blank_infilling`.
    Terms: text, in nats; z_loss (PaLM: 1e-4); router_balance (Switch: 1e-2) and router_z (ST-MoE: 1e-3) of a mixture
    of experts, all with the weight given. label_smoothing: see `cross_entropy`.
    """
    if model.backbone.kind == "encoder_only":
        raise UserError(
            "config.objective: next_token needs a causal backbone; one that is encoder_only sees the tokens to predict"
        )
    return predict_tokens(model, "next_token", z_loss, label_smoothing, router_balance, router_z)
