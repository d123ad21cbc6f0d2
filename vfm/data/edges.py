"""Images with their edges: what a control branch of a generative decoder is trained with."""

from collections.abc import Mapping

import numpy as np

from vfm.errors import UserError


class Edges:
    """The records of another source, and `edges` float32[H, W, 1] in [0, 1] of their `image` float[H, W, C].

    source: a source config with images in [0, 1]. Edges are the magnitude of Sobel's gradient, the mean over the
    channels, over 4 (the response to a step from 0 to 1), at most 1.
    """

    def __init__(self, split: str, source: Mapping):
        from vfm.data.sources import build_source  # which has this source in its table

        self.source = build_source(source, split)
        self.labels = getattr(self.source, "labels", None)
        self.class_names = getattr(self.source, "class_names", ())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        record = self.source[index]
        if "image" not in record:
            raise UserError(f"source 'edges' needs a source with images, not one with {', '.join(sorted(record))}")
        return {**record, "edges": edges(record["image"])}


def edges(image: np.ndarray) -> np.ndarray:
    """float32[H, W, 1] of an image float[H, W, C]: see `Edges`."""
    from scipy.ndimage import sobel

    channels = np.moveaxis(np.asarray(image, np.float32), -1, 0)  # one by one: the filter smooths along all other axes
    size = np.mean([np.hypot(sobel(x, axis=0), sobel(x, axis=1)) for x in channels], axis=0)
    return np.minimum(size / 4, 1)[..., None].astype(np.float32)
