"""Two-stream backbone for permutation language modelling (XLNet)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vfm.errors import UserError, unknown
from vfm.layers.attention import make_mask
from vfm.layers.mlp import MLP
from vfm.layers.norm import make_norm
from vfm.layers.positions import sinusoidal
from vfm.layers.transformer import REMAT
from vfm.sharding import constrain


def permutation_masks(order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(content, query) masks bool[B, 1, T, T] of a factorisation order int32[B, T] (Yang et al. 2019, section 2.3).

    True where token t may see token s. The content stream sees order[s] <= order[t], itself included; the query
    stream, which predicts t, sees order[s] < order[t] only. Tokens of the same number see each other's content.
    """
    s, t = order[:, None, None, :], order[:, None, :, None]
    return s <= t, s < t


def shift(x: jax.Array) -> jax.Array:
    """float[..., T, 2T - 1] by distance T - 1, …, 1 - T  ->  float[..., T, T], element (t, s) at distance t - s.

    Row t is what stands from column T - 1 - t on (Transformer-XL, Dai et al. 2019, appendix B).
    """
    *lead, T, P = x.shape
    flat = x.reshape(*lead, T * P)[..., T - 1 : T - 1 + T * (P - 1)] if T > 1 else x
    return flat.reshape(*lead, T, max(P - 1, 1))[..., :T]


class RelativeAttention(nn.Module):
    """Attention of both streams with relative positions (Dai et al. 2019, section 3.3; Yang et al. 2019).

    Logits: ((q + u) k_s + (q + v) r_{t-s} [+ (q + w) e_{same}]) / sqrt(K); queries of the two streams differ, keys and
    values are those of the content. h, g (None: no query stream): float[B, T, D]; relative: float[2T - 1, D], codes of
    the distances T - 1, …, 1 - T; same: bool[B, T, T], whether two tokens are of one type; masks: bool[B | 1, 1, T, T].
    Returns the same shapes as h, g. A token that may see nothing gets zeros.
    """

    num_heads: int
    head_dim: int | None
    token_types: bool
    dtype: str

    @nn.compact
    def __call__(self, h, g, relative, same, content_mask, query_mask):
        D, N = h.shape[-1], self.num_heads
        if self.head_dim is None and D % N:
            raise UserError(f"attention: num_heads={N} does not divide width={D}; set head_dim, or change one")
        K = self.head_dim or D // N

        def heads(name):
            return nn.DenseGeneral((N, K), use_bias=False, dtype=self.dtype, name=name)

        def bias(name, *lead):
            return self.param(name, nn.initializers.normal(0.02), (*lead, N, K)).astype(jnp.dtype(self.dtype))

        query, out = heads("query"), nn.DenseGeneral(D, (-2, -1), use_bias=False, dtype=self.dtype, name="out")
        key, value, distance = heads("key")(h), heads("value")(h), heads("relative")(relative)
        content_bias, position_bias = bias("content_bias"), bias("position_bias")
        if self.token_types:
            type_bias, types = bias("type_bias"), bias("type_embedding", 2)

        def attend(x, mask):
            q = constrain(query(x), "batch", "length", "heads", None)
            logits = jnp.einsum("btnk,bsnk->bnts", q + content_bias[None, None], key)
            logits = logits + shift(jnp.einsum("btnk,pnk->bntp", q + position_bias[None, None], distance))
            if self.token_types:
                of_type = jnp.einsum("btnk,cnk->cbnt", q + type_bias[None, None], types)[..., None]
                logits = logits + jnp.where(same[:, None], of_type[0], of_type[1])
            logits = jnp.where(mask, logits.astype(jnp.float32) / math.sqrt(K), jnp.finfo(jnp.float32).min)
            weights = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0).astype(value.dtype)
            return out(jnp.einsum("bnts,bsnk->btnk", weights, value))

        return attend(h, content_mask), None if g is None else attend(g, query_mask)


class TwoStreamBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)), on both streams with the same parameters."""

    num_heads: int
    head_dim: int | None
    mlp_dim: int
    activation: str
    norm_epsilon: float
    token_types: bool
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, streams, relative, same, content_mask, query_mask, train):
        def norm(name):
            return make_norm("layernorm", epsilon=self.norm_epsilon, use_bias=True, dtype=self.dtype, name=name)

        def add(norm, x, y):
            return constrain(norm(x + dropout(y, deterministic=not train)), "batch", "length", "width")

        dropout = nn.Dropout(self.dropout, name="dropout")
        attention = RelativeAttention(self.num_heads, self.head_dim, self.token_types, self.dtype, name="attention")
        mlp = MLP(self.mlp_dim, self.activation, dropout=self.dropout, dtype=self.dtype, name="mlp")
        norm_attention, norm_mlp = norm("norm_attention"), norm("norm_mlp")
        attended = attention(*streams, relative, same, content_mask, query_mask)
        result = []
        for x, y in zip(streams, attended):
            if x is not None:
                x = add(norm_attention, x, y)
                x = add(norm_mlp, x, mlp(x, train=train))
            result.append(x)
        return tuple(result), result[0]


class TwoStream(nn.Module):
    """XLNet (Yang et al. 2019): Transformer with relative positions (Dai et al. 2019) and two streams of attention.

    x: float[B, T, D] -> (float[B, T, D], out); out["layers"]: float[L, B, T, D], the content stream after each block.

    Args of the call:
      order: int32[B, T], the factorisation order: token t is predicted from all tokens s with order[s] < order[t]. The
        features are then those of the query stream, which starts from one learned vector and never sees the token at
        its own place; out["content"] are those of the content stream. Tokens of one number, such as 0 for all that is
        only context, see each other. A token before which nothing comes sees nothing. None: every token sees every
        other, and the features are those of the content stream, as for fine-tuning.
      input_mask: bool[B, T], segment_ids: int32[B, T] as in `DecoderOnly`. positions: not read: a distance is that in
        the row, which is the same for the tokens of one segment.
      token_types: int32[B, T], with `relative_token_types`: whether two tokens are of one type is seen by attention.
    """

    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    head_dim: int | None = None
    max_len: int = 512
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    relative_token_types: bool = False
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    kind = "encoder_only"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        order=None,
        input_mask=None,
        segment_ids=None,
        positions=None,
        token_types=None,
        train: bool,
    ):
        B, T, D = x.shape
        if self.width != D:
            raise UserError(f"TwoStream takes features of width {self.width}, not {D}")
        if D % 2:
            raise UserError(f"TwoStream: relative positions need an even width, not {D}")
        if self.max_len < T:
            raise UserError(f"a sequence of {T} positions is longer than model.backbone.max_len={self.max_len}")
        if self.remat not in REMAT:
            raise unknown("remat policy", self.remat, REMAT)
        if token_types is not None and not self.relative_token_types:
            raise UserError("TwoStream has no token types; set model.backbone.relative_token_types")
        index = jnp.arange(T)
        content = make_mask(
            index, index, causal=False, kv_mask=input_mask, q_segments=segment_ids, kv_segments=segment_ids
        )
        start, query = self.param("query_start", nn.initializers.normal(0.02), (D,)), None
        drop, x = nn.Dropout(self.dropout, name="dropout"), x.astype(jnp.dtype(self.dtype))
        streams = (drop(x, deterministic=not train), None)
        if order is not None:
            masks = permutation_masks(order)
            content, query = (jnp.logical_and(*jnp.broadcast_arrays(content, mask)) for mask in masks)
            g = jnp.broadcast_to(start[None, None].astype(x.dtype), x.shape)
            streams = (streams[0], drop(g, deterministic=not train))
        same = None
        if self.relative_token_types:
            types = jnp.zeros((B, T), jnp.int32) if token_types is None else token_types
            same = types[:, :, None] == types[:, None, :]
        relative = jnp.asarray(_distances(T, D), x.dtype)
        block = TwoStreamBlock
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT[self.remat], prevent_cse=False, static_argnums=(6,))
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * 5,
            length=self.depth,
        )(
            self.num_heads,
            self.head_dim,
            self.mlp_dim,
            self.activation,
            self.norm_epsilon,
            self.relative_token_types,
            self.dropout,
            self.dtype,
            name="layers",
        )
        (h, g), layers = stack(streams, relative, same, content, query, train)
        out = {"layers": layers, "content": h}
        return (h if g is None else g), out


def _distances(T: int, D: int) -> np.ndarray:
    """float32[2T - 1, D], sinusoids (sines before cosines) of the distances T - 1, …, 1 - T."""
    ahead = sinusoidal(T, D)
    sign = np.where(np.arange(D) < D // 2, -1, 1).astype(np.float32)
    return np.concatenate([ahead[::-1], ahead[1:] * sign])
