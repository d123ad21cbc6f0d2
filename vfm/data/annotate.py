"""Annotations of images by procedure: what a visual sentence asks for (LVM, Bai et al. 2024, section 3)."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vfm.errors import UserError, unknown

_RESERVED = 4  # one permutation of colours in so many is for held-out sentences


class Step(NamedTuple):
    """One step of a task: draw(rng, shape, colors, held_out) -> its parameters; apply(image, parameters, colors)."""

    draw: Callable[..., Any]
    apply: Callable[..., np.ndarray]


def _none(rng, shape, colors, held_out):
    return None


def _neighbours(image: np.ndarray) -> np.ndarray:
    """float[9, H, W, C]: the pixels of the 3×3 window, with the edges of the image continued."""
    padded, (H, W, _) = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge"), image.shape
    return np.stack([padded[i : i + H, j : j + W] for i in range(3) for j in range(3)])


def _turns(rng, shape, colors, held_out):
    if shape[0] != shape[1]:
        raise UserError(f"the annotation 'rotate' needs square images, not {shape[0]} × {shape[1]}")
    return int(rng.integers(1, 4))


def _offset(rng, shape, colors, held_out):
    offsets = int(rng.integers(1, shape[0] * shape[1]))
    return divmod(offsets, shape[1])


def _permutation(rng, shape, colors, held_out):
    if colors is None:
        raise UserError("the annotation 'recolor' permutes the colours of a palette: set config.tokenizer.name=palette")
    while True:
        order = rng.permutation(len(colors))
        moved = (order != np.arange(len(colors))).any()
        if moved and (len(colors) < 4 or reserved(order) == held_out):
            return order


def reserved(order: np.ndarray) -> bool:
    """Whether a permutation is one of those (a quarter, by a hash) that training never sees."""
    return zlib.crc32(np.asarray(order, np.uint8).tobytes()) % _RESERVED == 0


def _channels(rng, shape, colors, held_out):
    if shape[2] < 2:
        raise UserError(f"the annotation 'channels' needs images of more than one channel, not {shape[2]}")
    while True:
        order = rng.permutation(shape[2])
        if (order != np.arange(shape[2])).any():
            return order


def _recolor(image, order, colors):
    distance = np.square(image[..., None, :] - colors[None, None]).sum(axis=-1)
    return colors[order[distance.argmin(axis=-1)]]


STEPS = {
    "copy": Step(_none, lambda image, _, colors: image),
    "invert": Step(_none, lambda image, _, colors: 1 - image),
    "dilate": Step(_none, lambda image, _, colors: _neighbours(image).max(axis=0)),
    "edges": Step(_none, lambda image, _, colors: np.ptp(_neighbours(image), axis=0)),
    "flip": Step(lambda rng, *_: int(rng.integers(2)), lambda image, axis, colors: np.flip(image, axis)),
    "rotate": Step(_turns, lambda image, turns, colors: np.rot90(image, turns)),
    "shift": Step(_offset, lambda image, offset, colors: np.roll(image, offset, axis=(0, 1))),
    "channels": Step(_channels, lambda image, order, colors: image[..., order]),
    "recolor": Step(_permutation, _recolor),
}


class Task:
    """A function image float[H, W, C] -> annotation of the same shape, the same for all pairs of a sentence.

    name: steps joined by "+", done from left to right: copy, invert (1 - x), dilate (the brightest of 3×3), edges (the
    range of 3×3), flip (rows or columns), rotate (quarter turns), shift (cyclic), channels (a permutation of them),
    recolor (a permutation of the palette's colours; a quarter of all permutations is for held-out sentences alone).
    What a step leaves open is drawn.
    colors: float[K, C] of a palette, or None. Raises UserError for unknown steps, and steps that do not fit.
    """

    def __init__(self, name: str, rng: np.random.Generator, shape: Sequence[int], colors=None, held_out: bool = False):
        self.name, self.colors = name, colors
        self.steps = [(part, STEPS[part].draw(rng, shape, colors, held_out)) for part in check_task(name)]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        for part, parameters in self.steps:
            image = STEPS[part].apply(image, parameters, self.colors)
        return np.asarray(image, np.float32)


def check_task(name: str) -> list[str]:
    """The steps of a task; `UserError` for one that is unknown."""
    parts = name.split("+")
    for part in parts:
        if part not in STEPS:
            raise unknown("annotation", part, STEPS, "config.data.tasks")
    return parts
