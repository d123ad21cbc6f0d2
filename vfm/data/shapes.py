"""Images that are drawn: simple shapes in few colours."""

from collections.abc import Mapping

import numpy as np

from vfm.data.records import SPLITS, check_split, stream
from vfm.errors import UserError

SHAPES = ("rectangle", "frame", "cross", "diagonal", "stripes", "dots")
_CUBE = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(8, 3).astype(np.float32)


class Shapes:
    """Two shapes over each other on a ground, in three different colours out of `colors` corners of the RGB cube.

    noise: the share of the pixels that have any of the colours instead. sizes: {split: items}. The splits are drawn
    independently, from `seed`. Item: image float32[size, size, 3] of 0 and 1, label int: the class of the upper shape,
    by `SHAPES`.
    """

    class_names = SHAPES

    def __init__(
        self,
        split: str,
        size: int = 6,
        colors: int = 8,
        noise: float = 0.0,
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        where = "source 'shapes'"
        check_split(split, SPLITS, where)
        if not 3 <= colors <= len(_CUBE) or size < 3 or not 0 <= noise <= 1:
            raise UserError(
                f"{where}: colors={colors} must be from 3 to {len(_CUBE)}, size={size} at least 3, and noise={noise} "
                "from 0 to 1"
            )
        count = int({"train": 20_000, "validation": 1000, "test": 1000, **(sizes or {})}[split])
        rng, masks = stream(seed, "shapes", split), [_masks(kind, size) for kind in SHAPES]
        chosen = rng.permuted(np.tile(np.arange(colors), (count, 1)), axis=1)[:, :3]
        kinds = rng.integers(len(SHAPES), size=(count, 2))
        self.labels = kinds[:, 1].astype(np.int32)
        index = np.broadcast_to(chosen[:, 0, None, None], (count, size, size)).copy()
        for layer in range(2):
            for kind, choices in enumerate(masks):
                rows = np.flatnonzero(kinds[:, layer] == kind)
                drawn = choices[rng.integers(len(choices), size=len(rows))]
                index[rows] = np.where(drawn, chosen[rows, layer + 1, None, None], index[rows])
        index = np.where(rng.random(index.shape) < noise, rng.integers(colors, size=index.shape), index)
        self.images = index.astype(np.uint8)  # numbers of colours

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": _CUBE[self.images[index]], "label": int(self.labels[index])}


def _masks(kind: str, size: int) -> np.ndarray:
    """bool[n, size, size]: a shape at every place, of every side from 3 (rectangles: 2) below the image's."""
    found = []
    for side in range(2 if kind == "rectangle" else 3, max(size, 4)):
        for top, left in np.ndindex(size - side + 1, size - side + 1):
            y, x = np.indices((size, size)) - np.array([top, left])[:, None, None]
            drawn = {
                "rectangle": True,
                "frame": (y == 0) | (y == side - 1) | (x == 0) | (x == side - 1),
                "cross": (y == side // 2) | (x == side // 2),
                "diagonal": y == x,
                "stripes": y % 2 == 0,
                "dots": (y + x) % 2 == 0,
            }[kind]
            found.append((y >= 0) & (y < side) & (x >= 0) & (x < side) & drawn)
    return np.stack(found)
