"""Decoder of labels: one class for a whole sequence."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import unknown
from vfm.layers.mlp import ACTIVATIONS
from vfm.layers.norm import make_norm

POOLINGS = ("first", "last", "mean")


class Classifier(nn.Module):
    """Class logits of a sequence: float[B, T, D] -> (float[B, num_classes], out); out["pooled"]: float[B, D].

    Fields:
      pooling: "first" token (BERT's [CLS]), "last" real token (GPT, BART), or the "mean" of the real ones
      norm: epsilon of a LayerNorm on the pooled features, which comes first (AST); None: there is none
      transform: an activation; the pooled features then go through dense and activation first (BERT's pooler has
        "tanh"). "": none
      num_classes: None: no head; the features are the pooled ones
      dropout: of the pooled features

    `input_mask`: bool[B, T], False at padding.
    """

    num_classes: int | None = 2
    pooling: str = "first"
    norm: float | None = None
    transform: str = ""
    use_bias: bool = True
    dropout: float = 0.0
    in_width: int | None = None
    dtype: str = "float32"

    num_tokens = None
    item_shape = ()
    whole_sequence = True  # reads the backbone's features of all positions, not those of one item's signals

    @nn.compact
    def __call__(self, x: jax.Array, *, input_mask=None, train: bool):
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS, "model.decoders")
        if self.transform and self.transform not in ACTIVATIONS:
            raise unknown("activation", self.transform, ACTIVATIONS, "model.decoders")
        mask = jnp.ones(x.shape[:2], bool) if input_mask is None else input_mask
        if self.pooling == "mean":
            weight = mask.astype(x.dtype)[:, :, None]
            x = (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
        else:
            positions = jnp.arange(x.shape[1])[None]
            last = jnp.where(mask, positions, -1).max(axis=1)
            first = jnp.where(mask, positions, x.shape[1]).min(axis=1)
            index = jnp.clip(first if self.pooling == "first" else last, 0, x.shape[1] - 1)
            x = jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
        if self.norm is not None:
            x = make_norm("layernorm", epsilon=self.norm, use_bias=True, dtype=self.dtype, name="norm")(x)
        if self.transform:
            x = ACTIVATIONS[self.transform](nn.Dense(x.shape[-1], dtype=self.dtype, name="hidden")(x))
        pooled = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)
        if self.num_classes is None:
            return pooled, {"pooled": pooled}
        logits = nn.Dense(self.num_classes, use_bias=self.use_bias, dtype=self.dtype, name="classes")(pooled)
        return logits, {"pooled": pooled}
