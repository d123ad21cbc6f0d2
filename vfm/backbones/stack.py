"""What the three families of backbones share: positions, masks, the cache, and the stack of blocks."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vfm.errors import UserError, unknown
from vfm.layers.attention import make_mask
from vfm.layers.causal_convolution import taps
from vfm.layers.positions import alibi_slopes, relative_buckets, rotary, sinusoidal
from vfm.layers.transformer import BlockFields, Transformer

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "relative", "none")


class StackFields(BlockFields):
    """The fields of a stack of blocks with positions: those of `BlockFields`, and

    width: D of the residual stream. max_len: longest sequence
    positions: "learned" (GPT-2, BERT), "sinusoidal", "rope" (LLaMA), "alibi" (BLOOM), "relative" (T5), "none"
    position_offset: rows of the table of positions that are skipped (BART: 2)
    rope_theta, rope_fraction (share of each head that is rotated), rope_scaling: see `rotary_frequencies`
    relative_buckets, relative_max_distance: see `positions.relative_buckets`
    window: local attention, see `make_mask`; local_layers: which layers have it, repeated over the depth, as in
      (False, True) for alternating dense and banded layers (GPT-3); local_rope_theta: theta of these layers
    embedding_norm: a norm on the sum of all embeddings (BERT, BLOOM)
    num_token_types: rows of the table of token types, 0: none (BERT's segments)
    num_block_positions: rows of a second table of positions, 0: none (GLM's positions within a blank)
    inverse_layer_scale: layer i divides its attention logits by i + 1 (an option of GPT-2)
    """

    width: int = 32
    max_len: int = 256
    positions: str = "rope"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: Mapping | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    window: int | None = None
    local_layers: tuple[bool, ...] = (True,)
    local_rope_theta: float | None = None
    embedding_norm: bool = False
    num_token_types: int = 0
    num_block_positions: int = 0
    inverse_layer_scale: bool = False

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.width // self.num_heads

    def stack_fields(self) -> dict[str, Any]:
        """Name -> value of all fields."""
        names = StackFields.__dataclass_fields__
        return {name: getattr(self, name) for name in names if name not in ("parent", "name")}

    def run(
        self,
        x: jax.Array,
        *,
        causal: bool,
        input_mask=None,
        segment_ids=None,
        positions=None,
        token_types=None,
        prefix=None,
        block_positions=None,
        context=None,
        context_mask=None,
        context_segments=None,
        cache=None,
        train: bool,
    ):
        """The stack on features float[B, T, D]; call it in a compact method. Arguments as in the backbones' calls."""
        B, T, D = x.shape
        what = type(self).__name__
        if self.width != D:
            raise UserError(f"{what} takes features of width {self.width}, not {D}")
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
            start = cache["index"]
            write = jax.lax.dynamic_update_slice_in_dim
            valid = write(cache["valid"], input_mask, start, axis=1)
            index, q_index, segments = jnp.arange(valid.shape[1]), start + index, None
            if prefix is not None:
                prefix = write(jnp.zeros_like(valid), prefix, start, axis=1)
            layer_cache = {name: value for name, value in cache.items() if name not in ("valid", "cross_valid")}
        if positions is None:
            before = 0 if cache is None else cache["valid"].sum(axis=1, keepdims=True, dtype=jnp.int32)
            positions = jnp.maximum(before + jnp.cumsum(input_mask, axis=1, dtype=jnp.int32) - 1, 0)

        def mask(window):
            return make_mask(
                q_index,
                index,
                causal=causal,
                window=window,
                prefix=prefix,
                kv_mask=valid,
                q_segments=segment_ids,
                kv_segments=segments,
            )

        call: dict[str, Any] = {"mask": mask(None), "cache": layer_cache}
        if self.mixer == "convolution":
            self._check_convolution(prefix)
            if causal:
                call["taps"] = taps(call.pop("mask"), q_index, self.kernel_size)
        elif self.window is not None and all(self.local_layers):
            call["mask"] = mask(self.window)
        elif self.window is not None:
            call |= {"local_mask": mask(self.window), "local": jnp.asarray(self._local())}
        if self.inverse_layer_scale:
            call["scale"] = 1 / jnp.arange(1, self.depth + 1, dtype=jnp.float32)
        if self.positions == "rope":
            rotated = int(self.key_dim * self.rope_fraction + 1e-6)  # a fraction of whole dimensions is inexact
            call["table"] = rotary(positions, rotated, self.rope_theta, self.rope_scaling)
            if self.window is not None and self.local_rope_theta is not None:
                local = "local_table" if "local" in call else "table"  # all layers may be local
                call[local] = rotary(positions, rotated, self.local_rope_theta)
        elif self.positions == "alibi":
            seen = positions if cache is None else jnp.cumsum(valid, axis=1) - 1
            slopes = jnp.asarray(alibi_slopes(self.num_heads))
            # By distance, for queries that see later keys too; for others it is as good as by the key's position.
            distance = jnp.abs(positions[:, None, :, None] - seen[:, None, None, :]).astype(jnp.float32)
            call["bias"] = -slopes[None, :, None, None] * distance
        elif self.positions == "relative":
            buckets = relative_buckets(
                index[None, :] - q_index[:, None],
                bidirectional=not causal,
                num_buckets=self.relative_buckets,
                max_distance=self.relative_max_distance,
            )
            table = nn.Embed(
                self.relative_buckets,
                self.num_heads,
                embedding_init=nn.initializers.normal(0.1),
                name="relative_bias",
            )
            call["bias"] = table(buckets).transpose(2, 0, 1)[None]
        elif self.positions == "learned":
            x = x + self._table("positions", self.max_len + self.position_offset)(positions + self.position_offset)
        elif self.positions == "sinusoidal":
            table = jnp.asarray(sinusoidal(self.max_len + self.position_offset, D))
            x = x + table[positions + self.position_offset].astype(x.dtype)
        x = self._add(x, "token_types", token_types, self.num_token_types)
        x = self._add(x, "block_positions", block_positions, self.num_block_positions)
        if self.embedding_norm:
            x = self.make_norm("embedding_norm")(x)
        x = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)
        first = x
        if self.cross:
            if context is None and "cross_valid" not in (cache or {}):
                raise UserError(f"{what} with cross=True needs a context: it is the decoder of EncoderDecoder")
            seen = cache["cross_valid"] if context is None else context_mask
            if cache is not None and context is not None:  # padded to the room of the cache
                seen = jnp.zeros_like(cache["cross_valid"]).at[:, : context_mask.shape[1]].set(context_mask)
            call["context"] = context
            call["context_mask"] = make_mask(
                q_index,
                jnp.arange(seen.shape[1]),
                causal=False,
                kv_mask=seen,
                q_segments=None if context_segments is None else segment_ids,
                kv_segments=context_segments,
            )
        fields = {**self.block_fields(), "causal": causal and cache is None and prefix is None}
        x, out = Transformer(**fields, name="transformer")(x, **call, train=train)
        if cache is not None:
            out["cache"] |= {"index": start + T, "valid": valid, **({"cross_valid": seen} if self.cross else {})}
        return x, {**out, "input": first}

    def _check_convolution(self, prefix) -> None:
        """Refuses what only attention can do."""
        field = next((name for name in ("window", "num_kv_heads") if getattr(self, name) is not None), None)
        if field or self.positions in ("rope", "alibi", "relative"):
            found = f"{field}={getattr(self, field)}" if field else f"positions={self.positions!r}"
            raise UserError(
                f"model.backbone: {found} is for attention; mixer='convolution' has kernel_size, and positions 'none', "
                "'learned' or 'sinusoidal'"
            )
        if prefix is not None:
            raise UserError("model.backbone: mixer='convolution' sees no later token; a prefix needs attention")

    def _local(self) -> np.ndarray:
        """bool[L]: which layers have local attention."""
        return np.resize(np.asarray(self.local_layers, bool), self.depth)

    def _table(self, name: str, rows: int) -> nn.Embed:
        return nn.Embed(rows, self.width, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype, name=name)

    def _add(self, x, name: str, ids, rows: int):
        """x plus the rows `ids` (None: row 0) of a learned table, if there is one."""
        if not rows:
            if ids is not None:
                raise UserError(f"{type(self).__name__} has no table of {name}; set model.backbone.num_{name}")
            return x
        return x + self._table(name, rows)(jnp.zeros((1, 1), jnp.int32) if ids is None else ids)

    def init_cache(self, batch_size: int, length: int, context_length: int | None = None) -> dict[str, jax.Array]:
        """An empty cache for `length` tokens: key, value float[L, B, M, S, K], index int32[], valid bool[B, S]; with
        `context_length` also cross_key, cross_value, cross_valid for the context of a decoder. Of convolutions "key" is
        what they read, float[L, B, 1, S, D], and there is no value."""

        def pair(name, length):
            shape = (self.depth, batch_size, self.num_kv_heads or self.num_heads, length, self.key_dim)
            zeros = jnp.zeros(shape, jnp.dtype(self.dtype))
            return {f"{name}key": zeros, f"{name}value": zeros, f"{name}valid": jnp.zeros((batch_size, length), bool)}

        cross = {} if context_length is None else pair("cross_", context_length)
        own = pair("", length)
        if self.mixer == "convolution":
            del own["value"]
            own["key"] = jnp.zeros((self.depth, batch_size, 1, length, self.width), jnp.dtype(self.dtype))
        return {**own, "index": jnp.zeros((), jnp.int32), **cross}
