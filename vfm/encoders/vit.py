"""Vision Transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.encoders import check_item
from vfm.errors import UserError, unknown
from vfm.layers.norm import make_norm
from vfm.layers.pooling import AttentionPooling
from vfm.layers.positions import resize_positions, rotary_2d, sinusoidal_2d
from vfm.layers.transformer import Transformer

POOLINGS = ("", "class", "mean", "map")
POSITIONS = ("learned", "sinusoidal", "rope")


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021): image float[B, H, W, C] -> (float[B, P, D], out).

    P = (H / patch_size) · (W / patch_size) patches, rows first; every patch is a feature.

    Fields:
      pooling: what out["pooled"] float[B, D] is: the "class" token (there is none without this pooling), the "mean" of
        the features, or a learned query that attends to them ("map", see `AttentionPooling`). "": nothing
      feature_layer: the features are the tokens behind this block, 1 to `depth`, without the last norm, as LLaVA reads
        CLIP. None: those behind all blocks and the norm
      positions: "learned", "sinusoidal" (2-D, see `sinusoidal_2d`), or "rope" (2-D, see `rotary_2d`; rope_theta)
      any_size: images of other sizes than `image_size` are taken too; learned positions are then resized by
        `interpolation`: "bicubic" or "bilinear"
      num_registers: learned tokens that stand beside the patches (Darcet et al. 2024)
      patch_dropout: share of the patches of each image that the Transformer does not see in training (FLIP, Li et al.
        2023); the features are those of the others, whose numbers are out["kept"] int32[B, P']
      embedding_norm: a norm in front of the Transformer (CLIP). patch_bias, qkv_bias: whether these layers have biases
      activation, norm_epsilon, dropout, remat: see `BlockFields`

    out: "layers" float[L, B, T, D] of all tokens, which are the class token, the registers, and the patches; "input"
    float[B, T, D] of the Transformer; "class" float[B, D] and "registers" float[B, R, D], where there are any.
    `item_shape` is (H, W, C); an image of another shape, or a side that `patch_size` does not divide, raises
    `UserError`.
    """

    image_size: tuple[int, int] = (8, 8)
    channels: int = 1
    patch_size: int = 4
    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    pooling: str = ""
    feature_layer: int | None = None
    positions: str = "learned"
    rope_theta: float = 100.0
    any_size: bool = False
    interpolation: str = "bicubic"
    num_registers: int = 0
    patch_dropout: float = 0.0
    embedding_norm: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (*self.image_size, self.channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self._grid(self.image_size, "image_size")

    def _grid(self, sides, what: str) -> tuple[int, int]:
        if any(side % self.patch_size for side in sides):
            raise UserError(f"ViT: patch_size={self.patch_size} does not divide {what}={tuple(sides)}")
        return tuple(side // self.patch_size for side in sides)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_extra(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return (self.pooling == "class") + self.num_registers

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool):
        grid = self._check(image)
        B, P, D = image.shape[0], grid[0] * grid[1], self.width
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(D, patch, strides=patch, padding="VALID", use_bias=self.patch_bias, dtype=self.dtype, name="patch")(
            image
        )
        x = x.reshape(B, P, D)
        extra = []
        if self.pooling == "class":
            extra.append(self.param("class_token", nn.initializers.normal(0.02), (1, D)))
        if self.positions != "rope":
            table = self._table(grid)
            x = x + table[-P:][None].astype(x.dtype)
            extra = [token + table[:-P] for token in extra]
        if self.num_registers:
            extra.append(self.param("registers", nn.initializers.normal(0.02), (self.num_registers, D)))
        kept = self._kept(B, P) if train and self.patch_dropout else None
        if kept is not None:
            x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
        if extra:
            first = jnp.concatenate(extra)[None].repeat(B, axis=0)
            x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
        if self.embedding_norm:
            x = make_norm(
                "layernorm", epsilon=self.norm_epsilon, use_bias=True, dtype=self.dtype, name="embedding_norm"
            )(x)
        call = {} if self.positions != "rope" else {"table": self._rotary(grid, kept)}
        first = x
        x, out = Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            qkv_bias=self.qkv_bias,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(x, **call, train=train)
        features = x if self.feature_layer is None else out["layers"][self.feature_layer - 1]
        features = features[:, self.num_extra :]
        out |= {"input": first} if kept is None else {"input": first, "kept": kept}
        if self.num_registers:
            out["registers"] = x[:, self.num_extra - self.num_registers : self.num_extra]
        if self.pooling == "class":
            out["class"] = out["pooled"] = x[:, 0]
        elif self.pooling == "mean":
            out["pooled"] = features.mean(axis=1)
        elif self.pooling == "map":
            pool = AttentionPooling(
                self.num_heads, self.mlp_dim, self.activation, self.norm_epsilon, self.dtype, name="pooling"
            )
            out["pooled"] = pool(features, train=train)
        return features, out

    def _check(self, image) -> tuple[int, int]:
        """The grid of an image; `UserError` for one that is refused, and for fields unknown or out of range."""
        for field, known in (("pooling", POOLINGS), ("positions", POSITIONS)):
            if getattr(self, field) not in known:
                raise unknown(field, getattr(self, field), known, "model.encoders (ViT)")
        if self.feature_layer is not None and not 1 <= self.feature_layer <= self.depth:
            raise UserError(f"ViT: feature_layer={self.feature_layer} must be from 1 to depth={self.depth}")
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"ViT: patch_dropout={self.patch_dropout} must be a share, from 0 to less than 1")
        if not self.any_size or image.ndim != 4 or image.shape[-1] != self.channels:
            check_item(self, image)
            return self.grid
        return self._grid(image.shape[1:3], "the size of the image")

    def _table(self, grid) -> jax.Array:
        """Positions float[E + P, D] of the class token, if there is one, and the patches."""
        E = int(self.pooling == "class")
        if self.positions == "sinusoidal":
            return jnp.concatenate([jnp.zeros((E, self.width)), sinusoidal_2d(grid, self.width)])
        table = self.param("positions", nn.initializers.normal(0.02), (E + self.num_tokens, self.width))
        return table if grid == self.grid else resize_positions(table, self.grid, grid, self.interpolation)

    def _rotary(self, grid, kept) -> tuple[jax.Array, jax.Array]:
        """Tables of `rotate` for all tokens, of which only patches turn."""
        head_dim = self.width // self.num_heads
        sin, cos = (jnp.asarray(table) for table in rotary_2d(grid, head_dim, self.rope_theta))
        sin, cos = (table[None] if kept is None else table[kept] for table in (sin, cos))
        still = ((0, 0), (self.num_extra, 0), (0, 0))
        return jnp.pad(sin, still), jnp.pad(cos, still, constant_values=1.0)

    def _kept(self, B: int, P: int) -> jax.Array:
        """int32[B, P']: which patches of each image stay, in order."""
        count = max(1, round(P * (1 - self.patch_dropout)))
        keys = jax.random.uniform(self.make_rng("dropout"), (B, P))
        return jnp.sort(jnp.argsort(keys, axis=1)[:, :count], axis=1)
