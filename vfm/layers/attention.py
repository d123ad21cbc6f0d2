"""Attention, and the one function that builds every mask."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import UserError
from vfm.layers.mlp import residual_init
from vfm.layers.positions import rotate
from vfm.sharding import constrain


def make_mask(
    q_index: jax.Array,
    kv_index: jax.Array,
    *,
    causal: bool,
    window: int | None = None,
    prefix: jax.Array | None = None,
    kv_mask: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
) -> jax.Array:
    """Builds bool[B, 1, T, S]: True where query token t may attend to key token s.

    Args:
      q_index, kv_index: int32[T], int32[S]; places in the sequence (not position ids: those may have gaps).
      causal: a query sees keys at its own place and before.
      window: a query sees only the keys fewer than `window` places away (itself included).
      prefix: bool[B, S]; these keys are seen by every query, also by earlier ones (prefix LM).
      kv_mask: bool[B, S]; False at padding.
      q_segments, kv_segments: int32[B, T], int32[B, S]; tokens see their own segment only (packing).
    """
    distance = (q_index[:, None] - kv_index[None, :])[None, None]
    allowed = jnp.ones_like(distance, dtype=bool)
    if causal:
        allowed = distance >= 0
        if prefix is not None:
            allowed = jnp.logical_or(*jnp.broadcast_arrays(allowed, prefix[:, None, None, :]))
    if window is not None:
        allowed = allowed & (jnp.abs(distance) < window)
    if kv_mask is not None:
        allowed = jnp.logical_and(*jnp.broadcast_arrays(allowed, kv_mask[:, None, None, :]))
    if q_segments is not None:
        same = q_segments[:, None, :, None] == kv_segments[:, None, None, :]
        allowed = jnp.logical_and(*jnp.broadcast_arrays(allowed, same))
    return allowed


class Attention(nn.Module):
    """Multi-head attention softmax(Q K^T / sqrt(K)) V (Vaswani et al. 2017), grouped if `num_kv_heads` < `num_heads`
    (Ainslie et al. 2023).

    `x`: float[B, T, D] asks; `context`: float[B, S, D'] answers (None: `x` itself). `mask`: bool[B, 1, T, S], True
    where attention is allowed. `table`: rotary tables of the query tokens. `cache`: {"key", "value": float[B, S, N, K],
    "index": int32[]}; the new keys are written at `index`. Returns float[B, T, D] and the cache (None without one).
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    use_bias: bool = True
    depth: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, context=None, *, mask=None, table=None, cache=None):
        B, T, D = x.shape
        kv_heads = self.num_kv_heads or self.num_heads
        if self.head_dim is None and D % self.num_heads:
            raise UserError(
                f"attention: num_heads={self.num_heads} does not divide width={D}; set head_dim, or change one"
            )
        if self.num_heads % kv_heads:
            raise UserError(f"attention: num_kv_heads={kv_heads} does not divide num_heads={self.num_heads}")
        head_dim = self.head_dim or D // self.num_heads
        context = x if context is None else context

        def heads(name, count, source):
            layer = nn.DenseGeneral((count, head_dim), use_bias=self.use_bias, dtype=self.dtype, name=name)
            return constrain(layer(source), "batch", "length", "heads", None)

        q = heads("query", self.num_heads, x)
        k = heads("key", kv_heads, context)
        v = heads("value", kv_heads, context)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            k = write(cache["key"], k.astype(cache["key"].dtype), cache["index"], axis=1)
            v = write(cache["value"], v.astype(cache["value"].dtype), cache["index"], axis=1)
            cache = {"key": k, "value": v, "index": cache["index"] + T}
        y = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask)
        y = constrain(y, "batch", "length", "heads", None)
        y = nn.DenseGeneral(
            D,
            axis=(-2, -1),
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=residual_init(self.depth),
            name="out",
        )(y)
        return y, cache
