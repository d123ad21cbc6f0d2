"""Position encodings."""

import jax
import jax.numpy as jnp

from vfm.errors import UserError


def rotary(positions: jax.Array, head_dim: int, theta: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine tables of rotary embeddings (RoPE, Su et al. 2021, eq. 15).

    positions: int32[B, T]; returns two float32[B, T, K / 2]. `head_dim` must be even.
    """
    if head_dim % 2:
        raise UserError(f"rotary positions need an even head_dim, not {head_dim}")
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x[i], x[i + K/2]) by its angle (the half-split layout of LLaMA); float[B, T, N, K]."""
    sin, cos = (t[:, :, None, :] for t in table)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
