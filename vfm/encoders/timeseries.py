"""Patched Transformer for multi-channel sensor streams with missing values."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.encoders import check_item
from vfm.errors import UserError
from vfm.layers.attention import make_mask
from vfm.layers.transformer import Transformer


class TimeSeries(nn.Module):
    """Transformer on patches of a series (PatchTST, Nie et al. 2023): float[B, T, C] -> (float[B, P, D], out).

    NaN is a missing value. It enters as zero, beside an indicator of what is there, and no gradient flows through it. A
    patch with no value at all is seen by no other patch; its features are zero, and `out["pooled"]` leaves it out.

    Fields:
      length, channels: T and C of an item
      patch_length, stride (None: patch_length): time steps of a patch, and from one patch to the next. The patches must
        end with the series, else `UserError`.
      mix_channels: a patch holds all channels, and P = (T - patch_length) / stride + 1. False: each channel has patches
        of its own (the channel independence of PatchTST): all channels share the weights, see only their own patches,
        and differ by a learned embedding; then P is C times as large, first all patches of channel 0.
      window: a patch sees only the patches fewer than `window` places away; None: all
      normalise: each channel of an item is shifted and scaled to mean 0 and variance 1 over its present values, as the
        first half of RevIN (Kim et al. 2022, eq. 2). Its level and scale are then not in the features, but in `out`.

    Args of the call: present: bool[B, T, C], False where a value is to be missing too, such as in masked training.

    out: pooled float[B, D], the mean over patches that have a value (zero if there is none); mask bool[B, P], which
    patches those are; mean, std float32[B, C] of the normalisation; layers, see `Transformer`.
    """

    length: int = 128
    channels: int = 3
    patch_length: int = 16
    stride: int | None = None
    mix_channels: bool = True
    window: int | None = None
    normalise: bool = False
    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    takes_missing = True  # NaN in an item is a missing value

    @property
    def item_shape(self) -> tuple[int, int]:
        return (self.length, self.channels)

    @property
    def num_patches(self) -> int:
        """Patches along time."""
        stride = self.stride or self.patch_length
        if self.length < self.patch_length or (self.length - self.patch_length) % stride:
            raise UserError(
                f"TimeSeries: length={self.length} must be patch_length + k · stride = {self.patch_length} + "
                f"k · {stride}, so that the last patch ends with the series"
            )
        return (self.length - self.patch_length) // stride + 1

    @property
    def num_tokens(self) -> int:
        return self.num_patches * (1 if self.mix_channels else self.channels)

    @nn.compact
    def __call__(self, series: jax.Array, *, present: jax.Array | None = None, train: bool):
        check_item(self, series)
        B, T, C = series.shape
        P, D = self.num_patches, self.width
        there = ~jnp.isnan(series) if present is None else present & ~jnp.isnan(series)
        # `where` before any arithmetic: the gradient of what is missing is zero, not 0 · NaN.
        x = jnp.where(there, series, 0).astype(jnp.float32)
        out = {}
        if self.normalise:
            x, out = normalise(x, there)
        x = jnp.stack([x, there.astype(x.dtype)], axis=-1)
        if not self.mix_channels:
            x, there = (a.swapaxes(1, 2).reshape(B * C, T, 1, *a.shape[3:]) for a in (x, there))
        stride = self.stride or self.patch_length
        mask = cut(there.any(axis=2), self.patch_length, stride).any(axis=2)
        x = cut(x.reshape(*x.shape[:2], -1).astype(jnp.dtype(self.dtype)), self.patch_length, stride)
        x = nn.Dense(D, dtype=self.dtype, name="projection")(x.reshape(*x.shape[:2], -1))
        x = x + self.param("positions", nn.initializers.normal(0.02), (P, D))[None].astype(x.dtype)
        if not self.mix_channels:
            channel = self.param("channel_table", nn.initializers.normal(0.02), (C, D)).astype(x.dtype)
            x = (x.reshape(B, C, P, D) + channel[None, :, None]).reshape(B * C, P, D)
        index = jnp.arange(P)
        x, stack = Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(x, mask=make_mask(index, index, causal=False, window=self.window, kv_mask=mask), train=train)
        mask = mask.reshape(B, -1)
        x = jnp.where(mask[:, :, None], x.reshape(B, -1, D), 0)
        pooled = x.sum(axis=1, dtype=jnp.float32) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        return x, {**out, "layers": stack["layers"], "mask": mask, "pooled": pooled.astype(x.dtype)}


def normalise(x: jax.Array, there: jax.Array, epsilon: float = 1e-5) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean 0 and variance 1 over time, of the values that are there: float[B, T, C], bool[B, T, C] -> the same float,
    zero elsewhere, and {mean, std: float[B, C]}. A channel with no value has mean 0."""
    count = jnp.maximum(there.sum(axis=1, keepdims=True), 1)
    mean = jnp.where(there, x, 0).sum(axis=1, keepdims=True) / count
    x = jnp.where(there, x - mean, 0)
    std = jnp.sqrt(jnp.square(x).sum(axis=1, keepdims=True) / count + epsilon)
    return x / std, {"mean": mean[:, 0], "std": std[:, 0]}


def cut(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Patches along time: [B, T, ...] -> [B, P, size, ...]; patch p begins at p · stride."""
    if stride == size:  # a gather has a slow gradient
        return x.reshape(x.shape[0], -1, size, *x.shape[2:])
    starts = jnp.arange(0, x.shape[1] - size + 1, stride)
    return x[:, starts[:, None] + jnp.arange(size)[None, :]]
