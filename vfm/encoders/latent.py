"""First halves of autoencoders: an item -> a few latents, with a bottleneck that makes them a code."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict

from vfm.encoders import check_item
from vfm.errors import UserError, unknown
from vfm.layers import bottleneck as bottlenecks
from vfm.layers.conv import (
    AttentionBlock,
    Downsample,
    Middle,
    ResidualBlock,
    check_groups,
    conv,
    group_norm,
)
from vfm.layers.mlp import ACTIVATIONS


class LatentFields(nn.Module):
    """The fields that `LatentEncoder` and `LatentDecoder` share.

    image_size, channels: of the item (H, W, C); a spectrogram is one of one channel (T, F, 1)
    widths: channels of each level; between two levels rows and columns are halved, so that the latents stand on a grid
      of H / 2^(levels - 1) times W / 2^(levels - 1)
    layers_per_block: residual blocks of a level (the decoder has one more). groups: of the group norms
    attention: for each level whether its blocks are followed by attention; (): none. mid_attention: whether there is
      attention between the two residual blocks on the smallest grid
    latent_channels: numbers of a latent
    embed_dim: numbers of a latent in the bottleneck, between which and latent_channels there are 1×1 convolutions
      (diffusers' quant_conv, post_quant_conv); None: there are none
    scaling_factor: of the features, which are factor · latent, so that they have a variance near 1 (Rombach et al.
      2022, appendix G)
    centred: items are in [0, 1], and the convolutions see [-1, 1]; False: they see items as they are
    """

    image_size: tuple[int, int] = (8, 8)
    channels: int = 1
    widths: tuple[int, ...] = (16, 32)
    layers_per_block: int = 1
    groups: int = 8
    attention: tuple[bool, ...] = ()
    mid_attention: bool = True
    latent_channels: int = 4
    embed_dim: int | None = None
    scaling_factor: float = 1.0
    centred: bool = False
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (*self.image_size, self.channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the latents; `UserError` for sides that the halvings do not divide."""
        factor = 2 ** (len(self.widths) - 1)
        if any(side % factor for side in self.image_size):
            raise UserError(
                f"{type(self).__name__}: image_size={tuple(self.image_size)} must be multiples of {factor}, which "
                f"{len(self.widths)} levels divide them by"
            )
        return (self.image_size[0] // factor, self.image_size[1] // factor)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    def check(self) -> None:
        """Refuses fields that do not fit each other."""
        check_groups(type(self).__name__, self.widths, self.groups)
        if self.attention and len(self.attention) != len(self.widths):
            raise UserError(
                f"{type(self).__name__}: attention={tuple(self.attention)} and widths={tuple(self.widths)} must be of "
                "one length"
            )

    def level(self, x: jax.Array, level: int, blocks: int, name: str) -> jax.Array:
        """The residual blocks of a level, each with attention if the level has it."""
        for i in range(blocks):
            x = ResidualBlock(self.widths[level], self.groups, self.dtype, name=f"{name}_{level}_block_{i}")(x)
            if self.attention and self.attention[level]:
                x = AttentionBlock(self.groups, self.dtype, name=f"{name}_{level}_attention_{i}")(x)
        return x


class LatentEncoder(LatentFields):
    """Convolutional encoder of latent diffusion (Rombach et al. 2022) and VQGAN (Esser et al. 2021).

    float[B, H, W, C] -> (features float[B, P, W'], out): P latents, rows first; W' is embed_dim, else latent_channels.
    Fields: `LatentFields`, and
      bottleneck: {"name": "none" (an autoencoder), "gaussian" (VAE), "vq", "residual_vq" or "multiscale_vq", **fields},
        see `vfm.layers.bottleneck` and `vfm.layers.quantize`; `out` is its dict

    Sides that do not divide, and images of another shape, raise `UserError`.
    """

    bottleneck: Mapping[str, Any] = FrozenDict({"name": "none"})

    @property
    def width(self) -> int:
        return self.embed_dim or self.latent_channels

    def setup(self):
        self.quantizer = bottlenecks.build(
            self.bottleneck, self.width, "model.encoders (latent).bottleneck", self.dtype
        )

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool):
        check_item(self, image)
        self.check()
        grid, factor = self.grid, self.quantizer.per_latent
        x = image.astype(self.dtype)
        x = conv(self.widths[0], self.dtype, "conv_in")(2 * x - 1 if self.centred else x)
        for level in range(len(self.widths)):
            x = self.level(x, level, self.layers_per_block, "down")
            if level < len(self.widths) - 1:
                x = Downsample(self.dtype, name=f"down_{level}")(x)
        x = Middle(self.groups, self.mid_attention, self.dtype, name="mid")(x)
        x = nn.silu(group_norm(self.groups, self.dtype, "norm_out")(x))
        x = conv(factor * self.latent_channels, self.dtype, "conv_out")(x)
        if self.embed_dim is not None:
            x = conv(factor * self.embed_dim, self.dtype, "conv_quant", size=1)(x)
        features, out = self.quantizer(x.reshape(len(x), self.num_tokens, -1), grid=grid, train=train)
        return features * self.scaling_factor, out


class MLPEncoder(nn.Module):
    """Perceptron of an autoencoder: float[B, *item_shape] -> (features float[B, num_tokens, width], out).

    Dense layers of `hidden` sizes with the activation, then one that gives the latents. With
    `{"name": "gaussian"}` this is the first half of the VAE of Burda et al. (2016, section 5). bottleneck: see
    `LatentEncoder`.
    """

    item_shape: tuple[int, ...] = (8, 8, 1)
    hidden: tuple[int, ...] = (200, 200)
    activation: str = "tanh"
    num_tokens: int = 1
    width: int = 50
    bottleneck: Mapping[str, Any] = FrozenDict({"name": "none"})
    dtype: str = "float32"

    def setup(self):
        self.quantizer = bottlenecks.build(self.bottleneck, self.width, "model.encoders (mlp).bottleneck", self.dtype)

    @nn.compact
    def __call__(self, item: jax.Array, *, train: bool):
        check_item(self, item)
        x = perceptron(item.reshape(len(item), -1), self.hidden, self.activation, self.dtype, "model.encoders (mlp)")
        x = nn.Dense(self.num_tokens * self.width * self.quantizer.per_latent, dtype=self.dtype, name="projection")(x)
        return self.quantizer(x.reshape(len(x), self.num_tokens, -1), train=train)


def perceptron(x: jax.Array, hidden, activation: str, dtype: str, where: str) -> jax.Array:
    """Dense layers with an activation behind each, float[B, F] -> float[B, hidden[-1]]; in a compact method."""
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS, where)
    for i, width in enumerate(hidden):
        x = ACTIVATIONS[activation](nn.Dense(width, dtype=dtype, name=f"hidden_{i}")(x))
    return x
