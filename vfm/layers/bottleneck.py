"""What stands between the halves of an autoencoder."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import UserError, unknown
from vfm.layers.quantize import MultiscaleQuantizer, ResidualQuantizer, VectorQuantizer


class Plain(nn.Module):
    """No bottleneck but the width: latents float[B, P, W] are the features."""

    width: int = 4
    dtype: str = "float32"

    per_latent = 1

    def __call__(self, z: jax.Array, *, grid=None, train: bool):
        return z, {}


class Gaussian(nn.Module):
    """A normal posterior (Kingma & Welling 2014): means and log-variances float[B, P, 2W] -> (float[B, P, W], out).

    features: a draw in training (rng "noise"), else the mean. out: mean, logvar float32[B, P, W], the latter within
    [-30, 20]; rate float32[B]: KL(q(z|x) || N(0, 1)), nats of the whole item (appendix B).
    """

    width: int = 4
    dtype: str = "float32"

    per_latent = 2

    def __call__(self, z: jax.Array, *, grid=None, train: bool):
        mean, logvar = jnp.split(z.astype(jnp.float32), 2, axis=-1)
        logvar = jnp.clip(logvar, -30.0, 20.0)
        features = draw(self.make_rng("noise"), mean, logvar) if train else mean
        return features.astype(self.dtype), {"mean": mean, "logvar": logvar, "rate": gaussian_kl(mean, logvar)}


def draw(key: jax.Array, mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """A sample of N(mean, exp(logvar)), which has a gradient (Kingma & Welling 2014, section 2.4)."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


def gaussian_kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over an item: float[B, P, W] -> float[B]."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).sum(axis=(1, 2))


BOTTLENECKS = {
    "none": Plain,
    "gaussian": Gaussian,
    "vq": VectorQuantizer,
    "residual_vq": ResidualQuantizer,
    "multiscale_vq": MultiscaleQuantizer,
}


def per_latent(cfg: Mapping[str, Any], where: str) -> int:
    """Numbers that an encoder must give for one number of a latent; `UserError` for a name that is unknown."""
    if cfg.get("name") not in BOTTLENECKS:
        raise unknown("bottleneck", cfg.get("name"), BOTTLENECKS, where)
    return BOTTLENECKS[cfg["name"]].per_latent


def build(cfg: Mapping[str, Any], width: int, where: str, dtype: str) -> nn.Module:
    """The bottleneck {name, **fields} of latents of a width; call it in the `setup` of an encoder."""
    from vfm.blocks import build_block  # only here: it imports all encoders

    if "width" in cfg:
        raise UserError(f"{where}.width: the width of the latents is that of the encoder")
    per_latent(cfg, where)
    return build_block(BOTTLENECKS, {**cfg, "width": width}, where, dtype)
