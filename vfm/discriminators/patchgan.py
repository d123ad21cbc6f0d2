"""PatchGAN: a convolutional discriminator that judges every patch of an image or spectrogram."""

import flax.linen as nn
import jax

from vfm.errors import UserError, unknown
from vfm.layers.norm import BatchNorm

NORMS = ("batch", "group", "none")


class PatchGAN(nn.Module):
    """PatchGAN (Isola et al. 2017, appendix 6.1.2): items float[B, H, W, C] -> (logits float[B, h, w, 1], out).

    4×4 convolutions with leaky ReLU (slope 0.2): `depth` of stride 2, with `width` channels in the first and twice as
    many in each next, at most 8 · width; one of stride 1; and the logits, so that h = H / 2^depth - 2. Each logit sees
    a patch of 16, 34 and 70 rows and columns for depth 1, 2 and 3. Spectrograms may come without channels, as
    float[B, T, F]. Items that are too small for the depth raise `UserError`.

    norm: of all layers but the first and the last: "batch" (the paper; real and reconstructed items are normalised
      apart, as they come in calls of their own), "group" (Wu & He 2018, with `groups` groups), which has no state and
      looks at one item, or "none".
    out["features"]: the activations of each layer.
    """

    width: int = 64
    depth: int = 3
    norm: str = "batch"
    groups: int = 8
    dtype: str = "float32"

    @nn.compact
    def __call__(self, items: jax.Array, *, train: bool):
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS, "model.discriminators (PatchGAN)")
        if items.ndim == 3:
            items = items[..., None]
        self._check(items)
        features, x = [], items.astype(self.dtype)
        for i in range(self.depth + 1):
            width = self.width * min(2**i, 8)
            x = self._convolve(x, width, f"conv_{i}", 2 if i < self.depth else 1, bias=i == 0 or self.norm == "none")
            if i and self.norm == "batch":
                x = BatchNorm(scale_init=_around_one, dtype=self.dtype, name=f"norm_{i}")(x, train=train)
            elif i and self.norm == "group":
                x = nn.GroupNorm(
                    self.groups, epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=f"norm_{i}"
                )(x)
            x = nn.leaky_relu(x, 0.2)
            features.append(x)
        return self._convolve(x, 1, "conv_out", 1, bias=True), {"features": tuple(features)}

    def _convolve(self, x, width: int, name: str, stride: int, bias: bool):
        return nn.Conv(
            width,
            (4, 4),
            strides=(stride, stride),
            padding=((1, 1), (1, 1)),
            use_bias=bias,
            kernel_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name=name,
        )(x)

    def _check(self, items) -> None:
        what = "model.discriminators (PatchGAN)"
        if items.ndim != 4:
            raise UserError(f"{what} takes items [B, H, W, C] or [B, T, F], not {list(items.shape)}")
        smallest = 3 * 2**self.depth
        if min(items.shape[1:3]) < smallest:
            raise UserError(
                f"{what}: items of {items.shape[1]} × {items.shape[2]} are too small for depth={self.depth}, which "
                f"needs sides of at least {smallest}; lower the depth"
            )
        for i in range(1, self.depth + 1):
            if self.norm == "group" and self.width * min(2**i, 8) % self.groups:
                raise UserError(
                    f"{what}: groups={self.groups} does not divide the {self.width * min(2**i, 8)} channels of a layer"
                )


def _around_one(key, shape, dtype=None):
    """1 and a little noise, as the paper's code starts its norms."""
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype or "float32")
