"""Second halves of autoencoders: a few latents -> an item."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.encoders.latent import LatentFields, perceptron
from vfm.errors import UserError, unknown
from vfm.layers.conv import Middle, Upsample, conv, group_norm

OUTPUTS = ("linear", "sigmoid")


def check_features(decoder, x: jax.Array) -> None:
    """Refuses features that are not as many, or not as wide, as the decoder takes."""
    P, W = decoder.num_tokens, decoder.in_width
    if x.shape[1] != P or (W is not None and x.shape[2] != W):
        raise UserError(
            f"{type(decoder).__name__} takes {P} latents of width {W or 'any'}, not {x.shape[1]} of width {x.shape[2]}"
        )


def finish(decoder, y: jax.Array, centred: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(item, out) of what the last layer of a decoder gives, as its fields output and learned_scale say."""
    if decoder.output not in OUTPUTS:
        raise unknown("output", decoder.output, OUTPUTS, f"model.decoders ({type(decoder).__name__})")
    out = {}
    if decoder.learned_scale:
        out["log_scale"] = decoder.param("log_scale", nn.initializers.zeros, (), jnp.float32)
    if decoder.output == "sigmoid":
        return nn.sigmoid(y), {**out, "logits": y}
    return (0.5 * y + 0.5 if centred else y), out


class LatentDecoder(LatentFields):
    """Convolutional decoder of latent diffusion (Rombach et al. 2022) and VQGAN: the mirror of `LatentEncoder`.

    features float[B, P, W'] -> (item float[B, H, W, C], out). Fields: `LatentFields`, as the encoder has them, and
      in_width: W', checked if it is given
      output: "linear", what the last convolution gives, y (with `centred` (y + 1) / 2); "sigmoid": sigmoid(y), and
        out["logits"] is y, for the Bernoulli likelihood
      learned_scale: out["log_scale"] float32[], the learned logarithm of the scale of the noise of a likelihood

    Another number of features raises `UserError`.
    """

    in_width: int | None = None
    output: str = "linear"
    learned_scale: bool = False

    last_layer = "conv_out"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        check_features(self, x)
        self.check()
        x = (x / self.scaling_factor).astype(self.dtype).reshape(len(x), *self.grid, -1)
        if self.embed_dim is not None:
            x = conv(self.latent_channels, self.dtype, "conv_quant", size=1)(x)
        x = conv(self.widths[-1], self.dtype, "conv_in")(x)
        x = Middle(self.groups, self.mid_attention, self.dtype, name="mid")(x)
        for level in reversed(range(len(self.widths))):
            x = self.level(x, level, self.layers_per_block + 1, "up")
            if level:
                x = Upsample(self.dtype, name=f"up_{level}")(x)
        x = nn.silu(group_norm(self.groups, self.dtype, "norm_out")(x))
        x = conv(self.channels, self.dtype, "conv_out")(x)
        return finish(self, x, self.centred)


class MLPDecoder(nn.Module):
    """Perceptron of an autoencoder: features float[B, num_tokens, W] -> (item float[B, *item_shape], out).

    The mirror of `MLPEncoder`: dense layers of `hidden` sizes with the activation, then one that gives the item's
    numbers. in_width, output, learned_scale: see `LatentDecoder`.
    """

    item_shape: tuple[int, ...] = (8, 8, 1)
    hidden: tuple[int, ...] = (200, 200)
    activation: str = "tanh"
    num_tokens: int = 1
    in_width: int | None = None
    output: str = "linear"
    learned_scale: bool = False
    dtype: str = "float32"

    last_layer = "projection"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        check_features(self, x)
        x = perceptron(x.reshape(len(x), -1), self.hidden, self.activation, self.dtype, "model.decoders (mlp)")
        x = nn.Dense(math.prod(self.item_shape), dtype=self.dtype, name="projection")(x)
        return finish(self, x.reshape(len(x), *self.item_shape))
