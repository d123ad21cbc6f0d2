"""Attention, and the one function that builds every mask."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import UserError, unknown
from vfm.layers.dense import dot_general
from vfm.layers.mlp import residual_init
from vfm.layers.norm import make_norm
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


QK_NORMS = ("none", "head", "full")
_CHUNK, _CHUNKS = 64, 8  # the fewest queries of a chunk, and the most chunks


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
) -> jax.Array:
    """softmax(scale · Q K^T + bias) V (Vaswani et al. 2017, eq. 1), softmax in fp32.

    q: float[B, T, N, K]; k, v: float[B, S, M, K], where M divides N (grouped queries); mask: bool[B | 1, 1, T, S];
    bias: float[B | 1, N, T, S]. softcap c: logits become c · tanh(logits / c) before bias and mask (Gemma 2). A query
    that may see no key gets a mean of values. causal: the mask allows no key behind its query; then the queries go
    chunk by chunk, and the keys behind a chunk are not computed, which saves up to half of the work.
    """
    B, T, N, K = q.shape
    q, k, bias = _grouped(q, k, bias, scale)
    v = v.transpose(0, 2, 1, 3)

    def attend(queries: slice, keys: slice):
        part = lambda x: None if x is None else x[..., queries, keys]
        logits = _logits(q[..., queries, :], k[:, :, keys], part(mask), part(bias), softcap)
        # The division comes behind the product with the values, which are fewer than the logits.
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
        y = jnp.einsum("bmgts,bmsk->bmgtk", weights.astype(v.dtype), v[:, :, keys], preferred_element_type=jnp.float32)
        return (y / weights.sum(axis=-1)[..., None]).astype(v.dtype)

    if causal and k.shape[2] == T and jax.sharding.get_abstract_mesh().shape.get("context", 1) == 1:
        chunk = max(_CHUNK, -(-T // _CHUNKS))
        y = jnp.concatenate([attend(slice(i, i + chunk), slice(0, i + chunk)) for i in range(0, T, chunk)], axis=3)
    else:
        y = attend(slice(None), slice(None))
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, N, K)


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(scale · Q K^T + bias) float32[B, N, T, S]; arguments as in `dot_product_attention`."""
    B, T, N, _ = q.shape
    q, k, bias = _grouped(q, k, bias, scale)
    return jax.nn.softmax(_logits(q, k, mask, bias, softcap), axis=-1).reshape(B, N, T, -1)


def _grouped(q, k, bias, scale):
    """Scaled queries [B, M, G, T, K], keys [B, M, S, K] and bias [B | 1, M, G, T, S] of M groups of G heads."""
    B, T, N, K = q.shape
    M = k.shape[2]
    q = (q * scale).reshape(B, T, M, N // M, K).transpose(0, 2, 3, 1, 4)
    bias = None if bias is None else bias.reshape(bias.shape[0], M, N // M, *bias.shape[2:])
    return q, k.transpose(0, 2, 1, 3), bias


def _logits(q, k, mask, bias, softcap) -> jax.Array:
    """float32[B, M, G, T, S] of what `_grouped` gave; mask: bool[B | 1, 1, T, S]."""
    logits = jnp.einsum("bmgtk,bmsk->bmgts", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    return logits if mask is None else jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)


def write(cache: jax.Array, x: jax.Array, layer: jax.Array, start: jax.Array | int) -> jax.Array:
    """The cache float[L, B, M, S, K] with x float[B, T, M, K] at the positions from `start` on, in place under jit.

    All layers are one array, and heads stand before positions, so that a step of generation copies and turns nothing.
    """
    x = x.swapaxes(1, 2)[None].astype(cache.dtype)
    return jax.lax.dynamic_update_slice(cache, x, (layer, 0, 0, start, 0))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), grouped if `num_kv_heads` < `num_heads` (Ainslie et al. 2023).

    Fields:
      scale: factor of the logits; None: 1 / sqrt(head_dim). T5 has 1 (its queries start smaller instead).
      key_bias: None: `use_bias`.
      softcap: see `dot_product_attention`. out_bias: None: `use_bias`.
      causal: as in `dot_product_attention`.
      qk_norm: "head": queries and keys are RMS-normalised per head, before rotation (Dehghani et al. 2023; Qwen 3);
        "full": over all heads together (OLMo 2).

    `x`: float[B, T, D] asks; `context`: float[B, S, D'] answers (None: `x` itself). `mask`: bool[B, 1, T, S], True
    where attention is allowed. `bias`: float[B | 1, N, T, S] on the logits. `table`: rotary tables of the query
    tokens. `layer_scale`: float32[], a further factor of the logits. `cache`: {"key", "value": float[L, B, M, S, K] of
    all layers, "index": int32[]}; the new keys are written at `index` of this layer, int32[]. Keys and values of a
    context (`cross`) are computed and written when `context` is given, and read from "cross_key" and "cross_value" when
    it is not.
    Returns float[B, T, D] and the cache (None without one). Where the caller asks for the collection "intermediates"
    (`mutable`), "weights" float32[B, N, T, S] are put there; else nothing is computed for them.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    use_bias: bool = True
    key_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: str = "none"
    norm_epsilon: float = 1e-6
    scale: float | None = None
    softcap: float | None = None
    rope_interleaved: bool = False
    cross: bool = False
    causal: bool = False
    depth: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, context=None, *, mask=None, bias=None, table=None, layer_scale=None, cache=None, layer=None):
        B, T, D = x.shape
        kv_heads = self.num_kv_heads or self.num_heads
        if self.head_dim is None and D % self.num_heads:
            raise UserError(
                f"attention: num_heads={self.num_heads} does not divide width={D}; set head_dim, or change one"
            )
        if self.num_heads % kv_heads:
            raise UserError(f"attention: num_kv_heads={kv_heads} does not divide num_heads={self.num_heads}")
        if self.qk_norm not in QK_NORMS:
            raise unknown("qk_norm", self.qk_norm, QK_NORMS, "model.backbone")
        head_dim = self.head_dim or D // self.num_heads
        scale = 1 / math.sqrt(head_dim) if self.scale is None else self.scale
        # Whatever the scale, the logits start with the variance of 1 / sqrt(K).
        plain = nn.initializers.lecun_normal()
        small = nn.initializers.variance_scaling(1 / (head_dim * scale**2), "fan_in", "truncated_normal")

        def heads(name, count, source, init=plain):
            bias = self.key_bias if name == "key" and self.key_bias is not None else self.use_bias
            layer = nn.DenseGeneral(
                (count, head_dim),
                use_bias=bias,
                dtype=self.dtype,
                kernel_init=init,
                dot_general=dot_general,
                name=name,
            )
            return constrain(layer(source), "batch", "length", "heads", None)

        def normalised(name, x):
            shape = x.shape
            flat = x.reshape(*shape[:2], -1) if self.qk_norm == "full" else x
            norm = make_norm(
                "rmsnorm", epsilon=self.norm_epsilon, use_bias=False, dtype=self.dtype, name=f"norm_{name}"
            )
            return norm(flat).reshape(shape)

        q = heads("query", self.num_heads, x, small)
        if self.qk_norm != "none":
            q = normalised("query", q)
        if table is not None:
            q = rotate(q, table, self.rope_interleaved)
        if layer_scale is not None:
            q = q * layer_scale.astype(q.dtype)

        names = ("cross_key", "cross_value") if self.cross else ("key", "value")
        if not self.cross or context is not None:
            source = x if context is None else context
            k, v = heads("key", kv_heads, source), heads("value", kv_heads, source)
            if self.qk_norm != "none":
                k = normalised("key", k)
            if table is not None:
                k = rotate(k, table, self.rope_interleaved)
            if cache is not None:
                start = 0 if self.cross else cache["index"]
                cache = {**cache, **{name: write(cache[name], new, layer, start) for name, new in zip(names, (k, v))}}
        if cache is not None:
            k, v = (cache[name][layer].swapaxes(1, 2) for name in names)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        how = {"mask": mask, "bias": bias, "scale": scale, "softcap": self.softcap}
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", attention_weights(q, k, **how))
        y = dot_product_attention(q, k, v, **how, causal=self.causal)
        y = constrain(y, "batch", "length", "heads", None)
        y = nn.DenseGeneral(
            D,
            axis=(-2, -1),
            use_bias=self.use_bias if self.out_bias is None else self.out_bias,
            dtype=self.dtype,
            kernel_init=residual_init(self.depth),
            dot_general=dot_general,
            name="out",
        )(y)
        return y, cache
