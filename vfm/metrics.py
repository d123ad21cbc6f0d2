"""Metrics as pairs (sum, count), so that they are exact under masks, gradient accumulation and many hosts.

A mean of means weighs a short row as much as a long one. Sums and counts just add; the division comes once,
at the end.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Metric = tuple[jax.Array, jax.Array]


def mean(values, mask=None) -> Metric:
    """The pair (sum, count) of a masked mean, both float32[].

    Args:
      values: number[...].
      mask: number or bool[...], the weight of each value. Its shape is that of `values` or of its leading
        dimensions (then it holds for all of the rest). Values under a zero do not matter, not even NaN.
    """
    values = jnp.asarray(values).astype(jnp.float32)
    if mask is None:
        return values.sum(), jnp.float32(values.size)
    mask = jnp.asarray(mask).astype(jnp.float32)
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(f"mask {mask.shape} does not fit the leading dimensions of values {values.shape}")
    mask = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values.shape)
    return (jnp.where(mask != 0, values, 0) * mask).sum(), mask.sum()


def add(a: Mapping[str, Metric], b: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics of both parts together. A name that only one part has keeps its value there."""
    both = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name in b}
    return {**a, **b, **both}


def fetch(metrics: Mapping[str, Metric]) -> dict[str, tuple[float, float]]:
    """The metrics as Python floats on the host. Add long sums there: float32 is exact to 2**24 only."""
    return {name: (float(total), float(n)) for name, (total, n) in jax.device_get(dict(metrics)).items()}


def finalize(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """name → sum / count. A metric with count 0 was not measured and is left out."""
    return {name: total / n for name, (total, n) in fetch(metrics).items() if n != 0}
