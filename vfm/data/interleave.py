"""One sequence out of text and items of any modality, in any order."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vfm.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Modality:
    """What the model takes and gives for one modality.

    item_shape: shape of a raw item, e.g. (8, 8, 1) or (4000,).
    slots:      sequence positions that one input item takes.
    signals:    sequence positions that one generated item takes; 0: cannot be generated.
    items:      most items of this modality in one row (N).
    dtype:      of an item's numbers: "float32", or "int32" for ids.
    takes_missing: NaN in an item is a missing value, which the encoder knows to read.
    """

    item_shape: tuple[int, ...]
    slots: int
    signals: int = 0
    items: int = 1
    dtype: str = "float32"
    takes_missing: bool = False

    def readable(self, array) -> bool:
        """Whether all numbers of an item are finite, or missing where that may be."""
        return not np.isinf(array).any() if self.takes_missing else bool(np.isfinite(array).all())


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sequence length T and the modalities other than text, as the model has them."""

    length: int
    modalities: Mapping[str, Modality] = dataclasses.field(default_factory=dict)

    def modality(self, name: str) -> Modality:
        """The modality's entry; an unknown name raises UserError."""
        if name not in self.modalities:
            raise unknown("modality", name, self.modalities, where="the model's layout")
        return self.modalities[name]


@dataclasses.dataclass(frozen=True)
class Text:
    """Text, or ids (which may hold special tokens). target: the model must predict these tokens."""

    text: str | bytes | Sequence[int]
    target: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """An item that the model reads: `slots` positions."""

    modality: str
    array: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """An item that the model must generate: `signals` positions. array None: no target is known (zeros).

    When `array` is the very object of an `Input` in the same row, both share one item.
    """

    modality: str
    array: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Carry:
    """An item that travels in `inputs` and takes no position: neither read nor generated in the sequence."""

    modality: str
    array: Any


class _Items:
    """The items of one modality in one row, each with its two positions."""

    def __init__(self, name: str, modality: Modality):
        self.name, self.modality = name, modality
        shape = tuple(modality.item_shape)
        self.inputs = np.zeros((modality.items, *shape), modality.dtype)
        self.starts = np.full((modality.items,), -1, np.int32)
        self.signal_starts = np.full((modality.items,), -1, np.int32)
        self.arrays: list[Any] = []

    def add(self, array) -> int:
        """Index of the item; the same object is stored once."""
        for n, known in enumerate(self.arrays):
            if array is not None and known is array:
                return n
        n = len(self.arrays)
        if n == self.modality.items:
            raise UserError(
                f"modality {self.name!r}: found more than {n} item(s) in one row; the model's layout has "
                f"items={self.modality.items}"
            )
        if array is not None:
            self.inputs[n] = check_shape(self.name, self.modality, np.asarray(array))
        self.arrays.append(array)
        return n


def check_shape(name: str, modality: Modality, array: np.ndarray) -> np.ndarray:
    """The item, if its shape is the modality's; else raises UserError with both shapes."""
    wanted = tuple(modality.item_shape)
    if array.shape != wanted:
        hint = ""
        if array.ndim == len(wanted) == 3 and array.shape[:2] != wanted[:2]:
            hint = f"; size={wanted[:2]} of a source of images (image_folder, tfds) resizes them"
        raise UserError(
            f"modality {name!r}: found an item of shape {array.shape} (rank {array.ndim}), "
            f"expected {wanted} (rank {len(wanted)}){hint}"
        )
    return array


def interleave(segments: Sequence[Text | Input | Output | Carry], layout: Layout, tokenizer) -> dict:
    """One example (a row of the batch) from segments in any order.

    The row is the segments one after the other, padded at the right end to T = layout.length. A `Text` with
    target=True is predicted: loss_mask is 1 at the position just before each of its tokens (whatever stands
    there), so its first token has no loss when it opens the row. An item is stored once, in the order of
    first appearance. <bos> and marker tokens are the caller's choice.

    Returns tokens, targets int32[T]; loss_mask float32[T]; input_mask bool[T]; inputs {m: float32[N, *item]};
    starts, signal_starts {m: int32[N]}. Every modality of the layout has its entry.
    Raises UserError for an unknown modality, a wrong item shape, more items than fit, a modality that cannot
    be read or generated, and a row longer than T; it names what was found and what was expected.
    """
    items = {name: _Items(name, modality) for name, modality in layout.modalities.items()}
    ids: list[int] = []
    target: list[bool] = []
    lengths: dict[str, int] = {}
    pad = tokenizer.pad_id
    for segment in segments:
        if isinstance(segment, Text):
            text = segment.text
            piece = tokenizer.encode(text) if isinstance(text, str | bytes) else [int(i) for i in text]
            name, count = "text", len(piece)
            target.extend([segment.target] * count)
        elif isinstance(segment, Input | Output | Carry):
            name = segment.modality
            modality = layout.modality(name)
            entry = items[name]
            n = entry.add(segment.array)
            if isinstance(segment, Carry):
                continue
            reads = isinstance(segment, Input)
            count = modality.slots if reads else modality.signals
            if count < 1:
                verb, field = ("read", "slots") if reads else ("generated", "signals")
                raise UserError(f"modality {name!r} cannot be {verb}: the model's layout has {field}={count}")
            positions = entry.starts if reads else entry.signal_starts
            if positions[n] >= 0:
                raise UserError(
                    f"modality {name!r}: one item is {'an Input' if reads else 'an Output'} twice in a row; "
                    "pass a copy to make it a second item"
                )
            positions[n] = len(ids)
            piece = [pad] * count
            target.extend([False] * count)
        else:
            raise TypeError(f"segment must be Text, Input, Output or Carry, found {type(segment).__name__}")
        ids.extend(piece)
        lengths[name] = lengths.get(name, 0) + count
    used = len(ids)
    if used > layout.length:
        parts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise UserError(
            f"sequence of {used} positions ({parts}) is longer than the layout's length {layout.length}; "
            "shorten the text or raise the length"
        )

    tokens = np.full((layout.length,), pad, np.int32)
    tokens[:used] = ids
    loss_mask = np.zeros((layout.length,), np.float32)
    targets = np.full((layout.length,), pad, np.int32)
    if used > 1:
        targets[: used - 1] = ids[1:]
        loss_mask[: used - 1] = target[1:]
    input_mask = np.zeros((layout.length,), bool)
    input_mask[:used] = True
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": loss_mask,
        "input_mask": input_mask,
        "inputs": {name: entry.inputs for name, entry in items.items()},
        "starts": {name: entry.starts for name, entry in items.items()},
        "signal_starts": {name: entry.signal_starts for name, entry in items.items()},
    }
