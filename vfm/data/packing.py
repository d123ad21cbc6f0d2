"""Packing: which piece of which document goes to which row, planned once from the lengths alone."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vfm.errors import UserError, unknown

METHODS = ("split", "first_fit", "none")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Row i holds pieces offsets[i] … offsets[i+1]: (document, start, length), in this order."""

    document: np.ndarray  # int64[pieces]
    start: np.ndarray  # int64[pieces], first token of the piece within its document
    length: np.ndarray  # int64[pieces]
    offsets: np.ndarray  # int64[rows + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> list[tuple[int, int, int]]:
        """The (document, start, length) of each piece of a row."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return list(zip(self.document[span].tolist(), self.start[span].tolist(), self.length[span].tolist()))


def plan(
    lengths: Sequence[int],
    length: int,
    method: str,
    *,
    most: int | None = None,
    least: int = 1,
    room: Callable[[int], int] = int,
) -> Plan:
    """A plan that puts every token of every document into exactly one row of `length` positions.

    lengths: tokens per document. method:
      "split"      concatenate all documents, then cut every `length` tokens: only the last row has padding.
      "first_fit"  a document longer than a row is cut into whole rows and a rest; each rest or short document
                   goes, in order, into the first row with room: a document that fits is never cut.
      "none"       the same pieces, each in a row of its own.
    For pieces that do not take one position per token ("split" ignores this): room(n), the positions of a piece
    of n tokens; most, the tokens of the longest piece (`length` by default); pieces of fewer than `least` tokens
    are left out.
    Source: first-fit bin packing, Johnson 1974, "Fast algorithms for bin packing".
    """
    if method not in METHODS:
        raise unknown("packing method", method, METHODS)
    if length < 1:
        raise UserError(f"packing needs rows of at least 1 token, found {length}")
    sizes = np.asarray(lengths, np.int64)
    if method == "split":
        pieces = _split(sizes, length)
    else:
        cut = [p for p in _cut(sizes, length if most is None else most) if p[2] >= least]
        rows = range(len(cut)) if method == "none" else _first_fit([room(size) for _, _, size in cut], length)
        pieces = np.asarray([(row, *piece) for row, piece in zip(rows, cut)], np.int64).reshape(-1, 4)
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
    rows = int(pieces[-1, 0]) + 1 if len(pieces) else 0
    offsets = np.searchsorted(pieces[:, 0], np.arange(rows + 1))
    return Plan(document=pieces[:, 1], start=pieces[:, 2], length=pieces[:, 3], offsets=offsets)


def _split(sizes: np.ndarray, length: int) -> np.ndarray:
    """Pieces (row, document, start, length), cut at documents' ends and at multiples of `length`."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(np.concatenate([[0], ends]), np.arange(0, total, length))
    begin, end = cuts[:-1], cuts[1:]
    document = np.searchsorted(ends, begin, side="right")
    return np.stack([begin // length, document, begin - (ends - sizes)[document], end - begin], axis=1)


def _cut(sizes: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """Pieces (document, start, length) of at most `most` tokens."""
    return [
        (document, start, min(most, size - start))
        for document, size in enumerate(sizes.tolist())
        for start in range(0, size, most)
    ]


def _first_fit(sizes: Sequence[int], length: int) -> list[int]:
    """The row of each size; a tree of the greatest room finds it in O(log rows)."""
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [length] * (2 * leaves)
    rows = []
    for size in sizes:
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        rows.append(node - leaves)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
