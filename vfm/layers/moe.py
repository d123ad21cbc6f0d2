"""Mixture of experts: a feed-forward layer whose tokens choose among experts, and the losses that balance them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import UserError, unknown
from vfm.layers.mlp import ACTIVATIONS


class MoE(nn.Module):
    """Sparse feed-forward layer, float[B, T, D] -> (float[B, T, D], router logits float32[B, T, E]).

    Each token goes to the `experts_per_token` experts with the largest router logits; their outputs are added with the
    router's probabilities as weights (Shazeer et al. 2017), made to sum to one over the chosen experts if
    `normalise_weights` (Mixtral, Jiang et al. 2024). No token is dropped: tokens are sorted by expert, and each
    expert multiplies its own group (`jax.lax.ragged_dot`). Experts are gated as `MLP` with `gated`, without biases.
    """

    num_experts: int = 4
    experts_per_token: int = 2
    mlp_dim: int = 64
    activation: str = "silu"
    normalise_weights: bool = True
    depth: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        B, T, D = x.shape
        E, k, F = self.num_experts, self.experts_per_token, self.mlp_dim
        if k > E:
            raise UserError(f"model.backbone.experts_per_token={k} is more than num_experts={E}")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        logits = nn.Dense(E, use_bias=False, dtype=jnp.float32, name="router")(x.astype(jnp.float32))
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
        if self.normalise_weights:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        expert_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
        last_init = nn.initializers.variance_scaling(1 / (2 * self.depth), "fan_in", "truncated_normal", batch_axis=0)
        kernel = lambda name, init, shape: self.param(name, init, shape).astype(jnp.dtype(self.dtype))
        up, gate = (kernel(f"experts_{name}", expert_init, (E, D, F)) for name in ("up", "gate"))
        down = kernel("experts_down", last_init, (E, F, D))
        expert = chosen.reshape(-1)  # of each of the B·T·k copies of a token
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=E)
        tokens = x.astype(up.dtype).reshape(B * T, D)[order // k]
        h = ACTIVATIONS[self.activation](jax.lax.ragged_dot(tokens, gate, sizes))
        y = jax.lax.ragged_dot(h * jax.lax.ragged_dot(tokens, up, sizes), down, sizes)
        y = y * weights.reshape(-1)[order][:, None].astype(y.dtype)
        y = jnp.zeros((B * T, D), y.dtype).at[order // k].add(y)
        return y.reshape(B, T, D), logits


def load_balancing_loss(router_logits: jax.Array, experts_per_token: int, mask: jax.Array | None = None) -> jax.Array:
    """E · Σ_e (share of choices of expert e) · (mean probability of e); float32[].

    The loss of Switch (Fedus et al. 2021, eqs. 4 to 6) for any number of choices per token; `experts_per_token` when
    all experts are equally used. router_logits: float[L, B, T, E], taken over all layers together, as Mixtral does;
    mask: bool[B, T], the tokens that count.
    """
    E = router_logits.shape[-1]
    probabilities = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(probabilities, experts_per_token)
    chosen = jax.nn.one_hot(chosen, E).sum(axis=-2)
    axes = tuple(range(router_logits.ndim - 1))
    weight = jnp.ones(router_logits.shape[:-1]) if mask is None else jnp.broadcast_to(mask, router_logits.shape[:-1])
    mean = lambda x: (x * weight[..., None]).sum(axes) / jnp.maximum(weight.sum(), 1e-6)
    return E * (mean(chosen) * mean(probabilities)).sum()


def router_z_loss(router_logits: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of logsumexp² of the router logits float[..., E] (ST-MoE, Zoph et al. 2022, eq. 5); float32[]."""
    z = jnp.square(jax.nn.logsumexp(router_logits.astype(jnp.float32), axis=-1))
    weight = jnp.ones(z.shape) if mask is None else jnp.broadcast_to(mask, z.shape)
    return (z * weight).sum() / jnp.maximum(weight.sum(), 1e-6)
