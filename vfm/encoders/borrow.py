"""Starting an encoder from the weights of another one, across modalities and numbers of channels.

A spectrogram, a depth map or a thermal image is an image with another number of channels and another grid of patches;
its encoder may start from weights that were learned on images (as ImageBind's depth encoder, Girdhar et al. 2023).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vfm import tree
from vfm.errors import UserError
from vfm.layers.positions import resize_positions


def collapse_stem(kernel: jax.Array) -> jax.Array:
    """The patch kernel float[h, w, C, D] for one channel, float[h, w, 1, D].

    The sum over the channels: on a grey image the result is what the kernel gives where all C channels are that image.
    """
    return kernel.sum(axis=-2, keepdims=True)


def inflate_stem(kernel: jax.Array, channels: int) -> jax.Array:
    """The patch kernel float[h, w, 1, D] for C channels, float[h, w, C, D].

    Each channel gets a C-th of it: the result is what the kernel gives on the mean of the channels. It is undone by
    `collapse_stem`. A kernel of more than one channel raises `UserError`: collapse it first.
    """
    if kernel.shape[-2] != 1:
        raise UserError(f"inflate_stem takes a kernel of one channel, not {kernel.shape[-2]}; use collapse_stem first")
    return jnp.repeat(kernel / channels, channels, axis=-2)


def borrow(
    own: Mapping[str, Any],
    lender: Mapping[str, Any],
    *,
    grid: tuple[int, int] | None = None,
    lender_grid: tuple[int, int] | None = None,
    keep: Sequence[str] = (),
    interpolation: str = "bicubic",
) -> dict[str, Any]:
    """The parameters of an encoder with the values of another one, by path.

    Args:
      own: parameters of the encoder, which say paths, shapes and dtypes. lender: those of the other encoder; what it
        has beyond the paths of `own` is left behind.
      grid, lender_grid: (rows, columns) of the patches of both, where learned positions are to be resized.
      keep: regexes (fullmatch) of paths that keep their own values.

    A kernel `patch/kernel` of another number of channels is collapsed and inflated. Raises `UserError` for a parameter
    that is not found, or whose shape does not fit, and for a regex that matches none.
    """
    own, lender, found = tree.flatten(own), tree.flatten(lender), {}
    for regex in keep:
        if not any(re.fullmatch(regex, path) for path in own):
            raise UserError(f"borrow: keep={regex!r} matches no parameter; there are {', '.join(sorted(own))}")
    for path, leaf in own.items():
        if any(re.fullmatch(regex, path) for regex in keep):
            found[path] = leaf
            continue
        if path not in lender:
            raise UserError(f"borrow: the lender has no parameter {path}; add it to keep, or build one that has it")
        value = jnp.asarray(lender[path])
        if path.endswith("patch/kernel") and value.shape[-2] != leaf.shape[-2]:
            value = collapse_stem(value) if value.shape[-2] > 1 else value
            value = inflate_stem(value, leaf.shape[-2])
        elif path.endswith("positions") and grid and lender_grid and tuple(grid) != tuple(lender_grid):
            value = resize_positions(value, lender_grid, grid, interpolation)
        if value.shape != leaf.shape:
            hint = "; give grid and lender_grid" if path.endswith("positions") else ""
            raise UserError(
                f"borrow: {path} has shape {tuple(leaf.shape)}, and that of the lender {tuple(lender[path].shape)} "
                f"does not fit{hint}"
            )
        found[path] = value.astype(leaf.dtype)
    return tree.unflatten(found)
