"""Two-layer input projector."""

import flax.linen as nn
import jax

from vfm.errors import unknown
from vfm.layers.mlp import ACTIVATIONS


class MLPProjector(nn.Module):
    """Two affine maps with an activation of `ACTIVATIONS` between (LLaVA-1.5, Liu et al. 2023, which has "gelu"):
    float[B, T, D'] -> (float[B, T, D], out). use_bias: of both."""

    width: int = 32
    hidden: int = 64
    activation: str = "gelu_tanh"
    use_bias: bool = True
    in_width: int | None = None
    dtype: str = "float32"

    num_tokens = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS, "model.input_projectors")
        dense = lambda name, width: nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, name=name)
        return dense("projection", self.width)(ACTIVATIONS[self.activation](dense("hidden", self.hidden)(x))), {}
