"""Linear input projector."""

import flax.linen as nn
import jax


class Linear(nn.Module):
    """One affine map per feature (LLaVA, Liu et al. 2023): float[B, T, D'] -> (float[B, T, D], out)."""

    width: int = 32
    use_bias: bool = True
    in_width: int | None = None
    dtype: str = "float32"

    num_tokens = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        return nn.Dense(self.width, use_bias=self.use_bias, dtype=self.dtype, name="projection")(x), {}
