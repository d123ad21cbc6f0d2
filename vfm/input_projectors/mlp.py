"""Two-layer input projector."""

import flax.linen as nn
import jax


class MLPProjector(nn.Module):
    """Two affine maps with a GELU between (LLaVA-1.5, Liu et al. 2023): float[B, T, D'] -> (float[B, T, D], out)."""

    width: int = 32
    hidden: int = 64
    in_width: int | None = None
    dtype: str = "float32"

    num_tokens = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        x = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        return nn.Dense(self.width, dtype=self.dtype, name="projection")(x), {}
