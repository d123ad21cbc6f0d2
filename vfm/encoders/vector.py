"""Encoder of plain vectors: tabular rows, sensor readings, embeddings from elsewhere."""

import flax.linen as nn
import jax

from vfm.encoders import check_item


class VectorEncoder(nn.Module):
    """Two-layer perceptron: vector float[B, F] -> (float[B, num_tokens, D], out).

    `item_shape` is (num_features,); a vector of another size raises `UserError`.
    """

    num_features: int = 16
    num_tokens: int = 1
    width: int = 32
    mlp_dim: int = 64
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int]:
        return (self.num_features,)

    @nn.compact
    def __call__(self, vector: jax.Array, *, train: bool):
        check_item(self, vector)
        x = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, name="hidden")(vector))
        x = nn.Dense(self.num_tokens * self.width, dtype=self.dtype, name="projection")(x)
        x = x.reshape(vector.shape[0], self.num_tokens, self.width)
        return nn.LayerNorm(dtype=self.dtype, name="norm")(x), {}
