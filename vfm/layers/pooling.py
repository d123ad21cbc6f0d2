"""Pooling of a set of features into one by attention."""

import flax.linen as nn
import jax

from vfm.layers.attention import Attention
from vfm.layers.mlp import MLP
from vfm.layers.norm import make_norm


class AttentionPooling(nn.Module):
    """A learned query attends to all features, then an MLP: float[B, P, D] -> float[B, D].

    The pooling head "MAP" of Zhai et al. 2022, as in SigLIP: y = attention(query, x); y + mlp(norm(y)).
    """

    num_heads: int = 2
    mlp_dim: int = 64
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        B, _, D = x.shape
        query = self.param("queries", nn.initializers.normal(D**-0.5), (1, D))
        query = query[None].repeat(B, axis=0).astype(x.dtype)
        y, _ = Attention(num_heads=self.num_heads, cross=True, dtype=self.dtype, name="attention")(query, x)
        h = make_norm("layernorm", epsilon=self.norm_epsilon, use_bias=True, dtype=self.dtype, name="norm")(y)
        y = y + MLP(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")(h, train=train)
        return y[:, 0]
