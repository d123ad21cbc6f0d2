"""Convolutional decoder of an autoencoder: a grid of features -> an image."""

import math

import flax.linen as nn
import jax

from vfm.errors import UserError


class ConvDecoder(nn.Module):
    """Discriminative decoder (survey figure 7b), features float[B, P, W] -> (image float[B, H, W, C], out).

    The P = rows · columns features are laid on `grid`; each factor of `upsample` is one stage: 3×3 convolution, then
    sub-pixel upsampling (Shi et al. 2016) by that factor. H = rows · product(upsample). Another number of features
    raises `UserError`.
    """

    grid: tuple[int, int] = (2, 2)
    upsample: tuple[int, ...] = (2, 2)
    channels: int = 1
    conv_width: int = 32
    in_width: int | None = None
    dtype: str = "float32"

    last_layer = "conv_out"

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def item_shape(self) -> tuple[int, int, int]:
        scale = math.prod(self.upsample)
        return (self.grid[0] * scale, self.grid[1] * scale, self.channels)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        B, P, W = x.shape
        if self.num_tokens != P:
            raise UserError(f"ConvDecoder takes {self.num_tokens} features (grid {self.grid}), not {P}")
        x = nn.Dense(self.conv_width, dtype=self.dtype, name="projection")(x)
        x = x.reshape(B, *self.grid, self.conv_width)
        for i, factor in enumerate(self.upsample):
            h = nn.gelu(nn.LayerNorm(dtype=self.dtype, name=f"norm_{i}")(x))
            h = nn.Conv(self.conv_width * factor**2, (3, 3), dtype=self.dtype, name=f"conv_{i}")(h)
            rows, columns = h.shape[1:3]
            h = h.reshape(B, rows, columns, factor, factor, self.conv_width).transpose(0, 1, 3, 2, 4, 5)
            x = h.reshape(B, rows * factor, columns * factor, self.conv_width)
        x = nn.gelu(nn.LayerNorm(dtype=self.dtype, name="norm")(x))
        return nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_out")(x), {}
