"""Vision Transformer."""

import flax.linen as nn
import jax

from vfm.encoders import check_item
from vfm.errors import UserError
from vfm.layers.transformer import Transformer


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021): image float[B, H, W, C] -> (float[B, P, D], out).

    P = (H / patch_size) · (W / patch_size) patches, rows first. No class token: every patch is a feature.
    `item_shape` is (H, W, C); an image of another shape, or a side that `patch_size` does not divide, raises
    `UserError`. out["layers"]: float[L, B, P, D].
    """

    image_size: tuple[int, int] = (8, 8)
    channels: int = 1
    patch_size: int = 4
    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (*self.image_size, self.channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        if any(side % self.patch_size for side in self.image_size):
            raise UserError(f"ViT: patch_size={self.patch_size} does not divide image_size={tuple(self.image_size)}")
        return tuple(side // self.patch_size for side in self.image_size)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool):
        check_item(self, image)
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", dtype=self.dtype, name="patch")(image)
        x = x.reshape(x.shape[0], self.num_tokens, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.num_tokens, self.width))
        x = x + positions[None].astype(x.dtype)
        return Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(x, train=train)
