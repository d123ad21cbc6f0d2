"""Text encoders: the embedding half of the tokenizer (ids -> features), and a whole Transformer over a text."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from vfm.backbones import BACKBONES
from vfm.encoders import check_item
from vfm.errors import UserError, unknown
from vfm.layers.dense import dot_general


class TextEncoder(nn.Module):
    """Token embedding: tokens int32[B, T] -> (float[B, T, D], out). Positions belong to the backbone.

    scale: factor of the embeddings, such as sqrt(D) (Vaswani et al. 2017, section 3.4); `attend` has none.
    pad_id: an id whose embedding gets no gradient where it is read (padding_idx of torch); None: there is none.
    """

    vocab_size: int = 259
    width: int = 32
    scale: float = 1.0
    pad_id: int | None = None
    dtype: str = "float32"

    item_shape = ()  # an item is one token
    num_tokens = 1

    def setup(self):
        # The features start with the same variance, whatever the scale.
        init = nn.initializers.normal(self.width**-0.5 / self.scale)
        self.embedding = nn.Embed(self.vocab_size, self.width, embedding_init=init, dtype=self.dtype)

    def __call__(self, tokens: jax.Array, *, train: bool):
        x = self.embedding(tokens)
        if self.pad_id is not None:
            x = jnp.where((tokens == self.pad_id)[..., None], jax.lax.stop_gradient(x), x)
        return (x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)), {}

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits float[B, T, V] by the transposed table, for a decoder with tied weights (Press & Wolf 2017)."""
        dtype = jnp.dtype(self.dtype)
        table = self.embedding.embedding.astype(dtype).T
        return dot_general(x.astype(dtype), table, (((x.ndim - 1,), (0,)), ((), ())))


POOLINGS = ("first", "last", "mean", "end", "largest")


class TextTransformer(nn.Module):
    """A whole text as one item, read by any backbone: ids int32[B, T] -> (float[B, T, D], out).

    Fields:
      length: T, the ids of an item
      backbone: {"name": "encoder_only" or "decoder_only", **fields}; its width is `width`, its max_len at least T
      pad_id: the id of padding, which is not attended to; None: there is none
      pooling: which features are out["pooled"] float[B, D]: of the "first" real id, of the "last", their "mean", of
        the first `end_id` ("end", CLIP, Radford et al. 2021), or of the largest id ("largest", the first CLIP models)

    out["backbone"]: the backbone's dict. A text of padding alone has features of no meaning, but finite ones.
    """

    vocab_size: int = 259
    length: int = 16
    width: int = 32
    backbone: Mapping = FrozenDict({"name": "encoder_only"})
    pad_id: int | None = None
    end_id: int | None = None
    pooling: str = "mean"
    dtype: str = "float32"

    item_dtype = "int32"

    @property
    def item_shape(self) -> tuple[int]:
        return (self.length,)

    @property
    def num_tokens(self) -> int:
        return self.length

    def setup(self):
        from vfm.blocks import build_block  # only here: it imports all encoders

        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS, "model.encoders.text")
        if self.pooling == "end" and self.end_id is None:
            raise UserError("model.encoders.text: pooling='end' needs end_id, the id at the end of each text")
        cfg = {"max_len": self.length, **self.backbone, "width": self.width}
        self.embedding = TextEncoder(self.vocab_size, self.width, pad_id=self.pad_id, dtype=self.dtype)
        self.reader = build_block(BACKBONES, cfg, "model.encoders.text.backbone", self.dtype)
        if self.reader.kind == "encoder_decoder":
            raise UserError("model.encoders.text.backbone must be encoder_only or decoder_only")

    def __call__(self, tokens: jax.Array, *, train: bool):
        check_item(self, tokens)
        mask = jnp.ones(tokens.shape, bool) if self.pad_id is None else tokens != self.pad_id
        x, out = self.reader(self.embedding(tokens, train=train)[0], input_mask=mask, train=train)
        if self.pooling == "mean":
            weight = mask.astype(x.dtype)[..., None]
            pooled = (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
        else:
            index = {
                "first": lambda: mask.argmax(axis=1),
                "last": lambda: jnp.where(mask, jnp.arange(self.length)[None], 0).max(axis=1),
                "end": lambda: (tokens == self.end_id).argmax(axis=1),
                "largest": lambda: tokens.argmax(axis=1),
            }[self.pooling]()
            pooled = jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
        return x, {"backbone": out, "pooled": pooled}
