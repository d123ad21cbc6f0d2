"""Decoder-only backbone: the GPT-2 style and the LLaMA style are choices of its fields (`GPT2`, `LLAMA`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import UserError, unknown
from vfm.layers.attention import make_mask
from vfm.layers.positions import rotary
from vfm.layers.transformer import Transformer

POSITIONS = ("learned", "rope", "none")
# Field values of the two styles, for configs: {**GPT2, "width": 256, ...}.
GPT2 = dict(
    norm="layernorm", norm_epsilon=1e-5, positions="learned", activation="gelu_tanh", gated=False, use_bias=True
)
LLAMA = dict(norm="rmsnorm", norm_epsilon=1e-6, positions="rope", activation="silu", gated=True, use_bias=False)


class DecoderOnly(nn.Module):
    """Causal Transformer, GPT-2 style (Radford et al. 2019) or LLaMA style (Touvron et al. 2023).

    x: float[B, T, D] -> (float[B, T, D], out); out["layers"]: float[L, B, T, D], out["cache"].

    Args of the call:
      input_mask: bool[B, T], False at padding. segment_ids: int32[B, T] for packed rows; tokens see their own segment.
      positions: int32[B, T]; the default counts the real tokens of `input_mask` (so left padding is right as well).
      cache: what `init_cache` gives or the last call returned: keys and values of all layers, and which are real. The
        new tokens are written behind those in it. Without room left the result is undefined (sizes are static): the
        caller counts.
    """

    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_len: int = 256
    positions: str = "rope"
    rope_theta: float = 10_000.0
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @nn.compact
    def __call__(self, x: jax.Array, *, input_mask=None, segment_ids=None, positions=None, cache=None, train: bool):
        B, T, D = x.shape
        if self.width != D:
            raise UserError(f"DecoderOnly takes features of width {self.width}, not {D}")
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS, "model.backbone")
        if self.max_len < T:
            raise UserError(f"a sequence of {T} positions is longer than model.backbone.max_len={self.max_len}")
        input_mask = jnp.ones((B, T), bool) if input_mask is None else input_mask
        index, valid, segments = jnp.arange(T), input_mask, segment_ids
        layer_cache, q_index = None, index
        if cache is not None:
            if segment_ids is not None:
                raise UserError("packed rows cannot be continued: a call with a cache takes no segment_ids")
            start = cache["index"][0]
            write = jax.lax.dynamic_update_slice_in_dim
            valid = write(cache["valid"], input_mask, start, axis=1)
            index, q_index, segments = jnp.arange(valid.shape[1]), start + index, None
            layer_cache = {name: cache[name] for name in ("key", "value", "index")}
        if positions is None:
            before = 0 if cache is None else cache["valid"].sum(axis=1, keepdims=True, dtype=jnp.int32)
            positions = jnp.maximum(before + jnp.cumsum(input_mask, axis=1, dtype=jnp.int32) - 1, 0)
        mask = make_mask(q_index, index, causal=True, kv_mask=valid, q_segments=segment_ids, kv_segments=segments)
        table = None
        if self.positions == "learned":
            x = x + nn.Embed(
                self.max_len, D, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype, name="positions"
            )(positions)
        elif self.positions == "rope":
            table = rotary(positions, self.key_dim, self.rope_theta)
        x = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)
        x, out = Transformer(
            self.depth,
            self.num_heads,
            self.mlp_dim,
            self.num_kv_heads,
            self.head_dim,
            self.norm,
            self.norm_epsilon,
            self.activation,
            self.gated,
            self.use_bias,
            self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(x, mask=mask, table=table, cache=layer_cache, train=train)
        if cache is not None:
            out["cache"] = {**out["cache"], "valid": valid}
        return x, out

    def init_cache(self, batch_size: int, length: int) -> dict[str, jax.Array]:
        """An empty cache for `length` tokens: key, value float[L, B, S, N, K], index int32[L], valid bool[B, S]."""
        shape = (self.depth, batch_size, length, self.num_kv_heads or self.num_heads, self.key_dim)
        zeros = jnp.zeros(shape, jnp.dtype(self.dtype))
        return {
            "key": zeros,
            "value": zeros,
            "index": jnp.zeros((self.depth,), jnp.int32),
            "valid": jnp.zeros((batch_size, length), bool),
        }
