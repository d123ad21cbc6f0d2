"""Normalisation by name. Statistics are taken in fp32 whatever the compute dtype (Linen does this)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import unknown

NORMS = ("layernorm", "rmsnorm", "layernorm_fixed")


def make_norm(kind: str, *, epsilon: float, use_bias: bool, dtype, name: str) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019); float[..., D] -> float[..., D].

    `use_bias` is for LayerNorm; RMSNorm has no bias. `layernorm_fixed` is LayerNorm without scale and bias (OLMo,
    Groeneveld et al. 2024). An unknown kind raises `UserError`.
    """
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    if kind == "rmsnorm":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)
    learned = kind == "layernorm"
    return nn.LayerNorm(
        epsilon=epsilon,
        use_bias=use_bias and learned,
        use_scale=learned,
        dtype=dtype,
        # The two-pass variance: E[x²] - E[x]² loses digits where the mean is far from zero.
        use_fast_variance=False,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) of every channel, float[..., C] -> the same, as torch.nn.BatchNorm2d.

    In training mean and variance are those of the batch, of all its rows on all devices; the averages of the collection
    `batch_stats`, mean and var float32[C], move by `momentum` towards them (towards the unbiased variance), for which
    the collection must be mutable. Else the averages are used. With gradient accumulation a batch is a micro-batch.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        C, axes = x.shape[-1], tuple(range(x.ndim - 1))
        average = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, (C,), jnp.float32),
            "var": self.variable("batch_stats", "var", jnp.ones, (C,), jnp.float32),
        }
        mean, var = average["mean"].value, average["var"].value
        if train:
            wide, n = x.astype(jnp.float32), x.size // C
            mean = wide.mean(axis=axes)
            var = jnp.square(wide - mean.reshape((1,) * len(axes) + (C,))).mean(axis=axes)
            if not self.is_initializing():
                for name, new in (("mean", mean), ("var", var * (n / max(n - 1, 1)))):
                    average[name].value += self.momentum * (new - average[name].value)
        factor = self.param("scale", self.scale_init, (C,)) * jax.lax.rsqrt(var + self.epsilon)
        bias = self.param("bias", nn.initializers.zeros, (C,))
        mean, factor, bias = (a.reshape((1,) * len(axes) + (C,)) for a in (mean, factor, bias))
        return ((x.astype(jnp.float32) - mean) * factor + bias).astype(jnp.dtype(self.dtype))
