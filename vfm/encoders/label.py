"""Encoder of labels: a learned vector for each class."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.encoders import check_item


class LabelEncoder(nn.Module):
    """Class ids int32[B], 0 to num_classes - 1 -> (float[B, 1, D], {}); the class condition of a generative decoder.

    Other ids have no meaning: the data set "items" refuses them (`data.classes`), for arrays cannot be looked at inside
    a compiled program; there they give NaN.
    """

    num_classes: int = 10
    width: int = 32
    dtype: str = "float32"

    item_shape = ()
    item_dtype = "int32"
    num_tokens = 1

    @nn.compact
    def __call__(self, labels: jax.Array, *, train: bool):
        check_item(self, labels)
        init = nn.initializers.normal(1.0)
        table = nn.Embed(self.num_classes, self.width, dtype=self.dtype, embedding_init=init, name="embedding")
        # A negative id would be counted from the end.
        return table(jnp.where(labels < 0, self.num_classes, labels))[:, None], {}
