"""Position encodings: rotary with its scalings, sinusoidal, linear biases, and relative buckets."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm.errors import UserError, unknown

# The fields of `scaling` by type; a mark * means that the field has a default.
SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_len"),
    "yarn": (
        "factor",
        "original_max_len",
        "beta_fast*",
        "beta_slow*",
        "attention_factor*",
        "mscale*",
        "mscale_all_dim*",
        "truncate*",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_len"),
    "longrope": ("short_factor", "long_factor", "original_max_len", "factor*", "attention_factor*"),
}


def check_scaling(scaling: Mapping[str, Any], rotary_dim: int) -> None:
    """Refuses an unknown type, unknown or missing fields, and factor lists of the wrong length."""
    kind = scaling.get("type")
    if kind not in SCALINGS:
        raise unknown("type", kind, SCALINGS, "model.backbone.rope_scaling")
    known = {field.rstrip("*"): field.endswith("*") for field in SCALINGS[kind]}
    for field in scaling:
        if field != "type" and field not in known:
            raise unknown("field", field, known, f"model.backbone.rope_scaling of type {kind!r}")
    for field, optional in known.items():
        if not optional and field not in scaling:
            raise UserError(f"model.backbone.rope_scaling of type {kind!r} needs the field {field!r}")
    for field in ("short_factor", "long_factor"):
        if field in scaling and len(scaling[field]) != rotary_dim // 2:
            raise UserError(
                f"model.backbone.rope_scaling.{field} has {len(scaling[field])} factors; {rotary_dim} rotated "
                f"dimensions need {rotary_dim // 2}"
            )


def rotary_frequencies(
    rotary_dim: int, theta: float = 10_000.0, scaling: Mapping[str, Any] | None = None, length: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array | float]:
    """Angles per position float32[K / 2] of rotary embeddings, and the factor of their sines and cosines.

    scaling: {"type": …} (None: the plain theta^(-2i/K) of Su et al. 2021, eq. 15):
      linear    position interpolation: all frequencies divided by `factor` (Chen et al. 2023)
      dynamic   NTK-aware: theta grows with `length` beyond `original_max_len` (bloc97 2023)
      yarn      interpolates the long wavelengths and keeps the short ones, with a ramp between, and scales the
                attention logits (Peng et al. 2023, eqs. 17 to 22)
      llama3    the same idea with the ramp of Llama 3.1 (Grattafiori et al. 2024)
      longrope  a searched factor per frequency, other ones beyond `original_max_len` (Ding et al. 2024)
    length: tokens so far (largest position of the batch + 1), which "dynamic" and "longrope" depend on. Beyond
    `original_max_len` rows of one batch depend on the longest one, and decoding with a cache keeps keys as they were
    turned when they were written, as in transformers: both differ from each row alone and without a cache.
    `original_max_len` is the length that the model was trained at.
    """
    if rotary_dim % 2:
        raise UserError(f"rotary positions need an even number of rotated dimensions, not {rotary_dim}")
    exponent = jnp.asarray(np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim))
    plain = 1.0 / jnp.float32(theta) ** exponent
    if scaling is None:
        return plain, 1.0
    check_scaling(scaling, rotary_dim)
    kind, factor = scaling["type"], scaling.get("factor", 1.0)
    original = scaling.get("original_max_len", 0)
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "dynamic":
        grown = jnp.maximum(jnp.asarray(length, jnp.float32), original)
        base = theta * ((factor * grown / original) - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
        return 1.0 / base**exponent, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * plain / (2 * math.pi)  # of the whole original length
        smooth = jnp.clip((turns - low) / (high - low), 0, 1)
        return plain * (smooth + (1 - smooth) / factor), 1.0
    if kind == "longrope":
        short, long = (jnp.asarray(scaling[f"{name}_factor"], jnp.float32) for name in ("short", "long"))
        attention = scaling.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return plain / jnp.where(jnp.asarray(length) > original, long, short), attention
    # YaRN: where does a frequency make `turns` turns within the original length?
    dimension = lambda turns: rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = dimension(scaling.get("beta_fast", 32.0)), dimension(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = jnp.clip((jnp.arange(rotary_dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0, 1)
    grow = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
    attention = scaling.get("attention_factor")
    if attention is None:
        one, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = grow(one) / grow(all_dims) if one and all_dims else grow(1.0)
    return plain / factor * ramp + plain * (1 - ramp), attention


def rotary(
    positions: jax.Array, rotary_dim: int, theta: float = 10_000.0, scaling: Mapping[str, Any] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine tables of rotary embeddings (RoPE, Su et al. 2021): positions int32[B, T] -> two
    float32[B, T, K / 2]. `scaling` as in `rotary_frequencies`."""
    frequency, attention = rotary_frequencies(rotary_dim, theta, scaling, positions.max() + 1)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
    return jnp.sin(angle) * attention, jnp.cos(angle) * attention


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array], interleaved: bool = False) -> jax.Array:
    """Turns pairs of the leading dimensions of each head by their angles; float[B, T, N, K].

    The pairs are (i, i + R/2) of the R rotated dimensions (LLaMA), or (2i, 2i + 1) if `interleaved` (GPT-J, GLM).
    Dimensions beyond the tables stay as they are (partial rotation).
    """
    sin, cos = (t[:, :, None, :] for t in table)
    R = 2 * sin.shape[-1]
    x, rest = x[..., :R], x[..., R:]
    wide = x.astype(jnp.float32)
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def sinusoidal(length: int, width: int, step: float = 1.0) -> np.ndarray:
    """Fixed positions float32[length, D] (Vaswani et al. 2017, section 3.5), all sines before all cosines.

    step: distance of neighbours, less than 1 where a longer sequence covers what a shorter one did.
    """
    half = (width + 1) // 2
    angle = step * np.arange(length)[:, None] / 10_000.0 ** (2 * np.arange(half)[None] / width)
    return np.concatenate([np.sin(angle), np.cos(angle[:, : width // 2])], axis=1).astype(np.float32)


def timestep_embedding(
    t: jax.Array, width: int, *, cosine_first: bool = True, max_period: float = 10_000.0, shift: float = 1.0
) -> jax.Array:
    """Features float32[B, D] of times float[B] or int32[B]: cosines and sines of them at D / 2 frequencies.

    The frequencies fall from 1 to 1 / max_period; with shift 1 the last is reached (Ho et al. 2020), with 0 it would be
    the next. An odd D ends with a zero.
    """
    half = width // 2
    frequency = np.exp(-math.log(max_period) * np.arange(half) / (half - shift)).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequency[None]
    parts = [jnp.cos(angle), jnp.sin(angle)]
    parts = parts if cosine_first else parts[::-1]
    return jnp.concatenate([*parts, jnp.zeros((len(t), width % 2), jnp.float32)], axis=-1)


def sinusoidal_2d(grid: tuple[int, int], width: int, base: tuple[int, int] | None = None) -> np.ndarray:
    """Fixed positions float32[rows · columns, D] of a grid, rows first (MAE, He et al. 2022).

    The first half of the dimensions is `sinusoidal` of the column, the second half that of the row. base: another grid,
    whose first rows and columns mean the same share of the item. `UserError` unless 4 divides D.
    """
    if width % 4:
        raise UserError(f"sinusoidal positions of a grid need a width that 4 divides, not {width}")
    rows, columns = (sinusoidal(side, width // 2, old / side) for side, old in zip(grid, base or grid))
    table = [np.broadcast_to(columns[None], (*grid, width // 2)), np.broadcast_to(rows[:, None], (*grid, width // 2))]
    return np.concatenate(table, axis=-1).reshape(-1, width)


def rotary_2d(grid: tuple[int, int], rotary_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine tables float32[rows · columns, K / 2] of a grid, rows first, for `rotate`.

    The first half of the pairs turns by the row, the second half by the column (axial RoPE, Heo et al. 2024), so
    that the logit of two patches depends on where one lies as seen from the other. `UserError` unless 4 divides K.
    """
    if rotary_dim % 4:
        raise UserError(f"rotary positions of a grid need a head_dim that 4 divides, not {rotary_dim}")
    frequency = float(theta) ** -(np.arange(0, rotary_dim, 4) / rotary_dim)
    angle = np.indices(grid).reshape(2, -1)[:, :, None] * frequency
    angle = np.concatenate(list(angle), axis=-1)
    return np.sin(angle).astype(np.float32), np.cos(angle).astype(np.float32)


INTERPOLATIONS = ("bicubic", "bilinear")


def resize_positions(
    table: jax.Array, grid: tuple[int, int], to: tuple[int, int], interpolation: str = "bicubic"
) -> jax.Array:
    """A table of learned positions float[R + rows · columns, D] for another grid: float[R + rows' · columns', D].

    The first R rows (class token) stay. A value is taken where the middle of its cell falls in the old grid, whose
    edges are continued; nothing is smoothed where the grid shrinks (as ViT, DINO and their relatives resize).
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)
    first = table.shape[0] - grid[0] * grid[1]
    cells = table[first:].reshape(*grid, -1)
    rows, columns = (jnp.asarray(_interpolate(a, b, interpolation), table.dtype) for a, b in zip(grid, to))
    # Exact products: on an accelerator the default ones would round the table.
    cells = jnp.einsum("ip,jq,pqd->ijd", rows, columns, cells, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table[:first], cells.reshape(to[0] * to[1], -1)])


def _interpolate(old: int, new: int, interpolation: str) -> np.ndarray:
    """The matrix float64[new, old] that resizes a signal of `old` samples to `new` (Keys 1981, with a = -3/4)."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    before = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        distance = np.abs(at - before - tap)
        if interpolation == "bilinear":
            weight = np.maximum(1 - distance, 0)
        else:
            near = 1.25 * distance**3 - 2.25 * distance**2 + 1
            far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            weight = np.where(distance <= 1, near, far)
        np.add.at(matrix, (np.arange(new), np.clip(before + tap, 0, old - 1)), weight)
    return matrix


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes float32[N] of linear position biases (ALiBi, Press et al. 2022): 2^(-8/N), 2^(-16/N), ….

    For numbers of heads between powers of two: those of the power below, then every other one of the power above.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    powers = lambda n: 2.0 ** (-8.0 / n * np.arange(1, n + 1))
    return np.concatenate([powers(below), powers(2 * below)[0::2][: num_heads - below]]).astype(np.float32)


def relative_buckets(distance: jax.Array, *, bidirectional: bool, num_buckets: int, max_distance: int) -> jax.Array:
    """Buckets int32 of relative positions key - query (T5, Raffel et al. 2020): near ones exact, far ones logarithmic.

    Half of the buckets are for keys behind the query if `bidirectional`; else such keys fall into bucket 0. All
    distances from `max_distance` on share the last bucket.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return (offset + jnp.where(distance < exact, distance, far)).astype(jnp.int32)
