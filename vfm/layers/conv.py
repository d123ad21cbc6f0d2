"""Convolutional blocks of the autoencoders of VQGAN (Esser et al. 2021) and latent diffusion (Rombach et al. 2022)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import UserError
from vfm.layers.attention import Attention

EPSILON = 1e-6  # of the group norms


def conv(width: int, dtype: str, name: str, size: int = 3) -> nn.Conv:
    """A square convolution that keeps rows and columns."""
    pad = (size // 2, size // 2)
    return nn.Conv(width, (size, size), padding=(pad, pad), dtype=dtype, name=name)


def group_norm(groups: int, dtype: str, name: str) -> nn.GroupNorm:
    """Group normalisation (Wu & He 2018) with two passes over the numbers."""
    return nn.GroupNorm(groups, epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


def check_groups(what: str, widths, groups: int) -> None:
    """Refuses groups that do not divide the channels."""
    for width in widths:
        if width % groups:
            raise UserError(f"{what}: groups={groups} does not divide the {width} channels of a level")


class ResidualBlock(nn.Module):
    """Norm, swish, 3×3 convolution, twice, added to the input: float[B, H, W, C] -> float[B, H, W, width]."""

    width: int
    groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = conv(self.width, self.dtype, "conv_0")(nn.silu(group_norm(self.groups, self.dtype, "norm_0")(x)))
        h = conv(self.width, self.dtype, "conv_1")(nn.silu(group_norm(self.groups, self.dtype, "norm_1")(h)))
        if x.shape[-1] != self.width:
            x = conv(self.width, self.dtype, "conv_shortcut", size=1)(x)
        return x + h


class AttentionBlock(nn.Module):
    """Norm and attention of one head among all places, added to the input: float[B, H, W, C] -> the same."""

    groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        h = group_norm(self.groups, self.dtype, "norm")(x).reshape(B, H * W, C)
        h, _ = Attention(1, dtype=self.dtype, name="attention")(h)
        return x + h.reshape(B, H, W, C)


class Downsample(nn.Module):
    """3×3 convolution of stride 2, with zeros below and to the right: half the rows and columns."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = ((0, 1), (0, 1))
        return nn.Conv(x.shape[-1], (3, 3), strides=(2, 2), padding=pad, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Every place four times, then a 3×3 convolution: twice the rows and columns."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
        return conv(C, self.dtype, "conv")(x)


class Middle(nn.Module):
    """Residual block, attention if wanted, residual block: float[B, H, W, C] -> the same."""

    groups: int
    attention: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResidualBlock(x.shape[-1], self.groups, self.dtype, name="block_0")(x)
        if self.attention:
            x = AttentionBlock(self.groups, self.dtype, name="attention_0")(x)
        return ResidualBlock(x.shape[-1], self.groups, self.dtype, name="block_1")(x)
