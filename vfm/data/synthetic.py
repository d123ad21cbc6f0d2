"""What sources of synthesised sounds of the ten digits share."""

from collections.abc import Mapping

import numpy as np

from vfm.data.records import check_split, stream


class SyntheticDigits:
    """Sounds that are made when they are asked for: {"audio": float32[samples], "label": int}, label = i % 10.

    Item i of a split is a pure function of (seed, name, split, i). sizes: items per split. cache: keep items in memory
    once they are made. A source has a `name`, and a method `make(label, rng)` that gives an item's audio.
    """

    name = ""

    def __init__(self, split: str, sample_rate: int, duration: float, sizes: Mapping[str, int] | None, seed: int,
                 cache: bool):  # fmt: skip
        sizes = dict(sizes or {"train": 2000, "validation": 500, "test": 1000})
        self.split = check_split(split, sizes, f"source {self.name!r}")
        self.sample_rate, self.samples = int(sample_rate), round(sample_rate * duration)
        self.seed = seed
        self.labels = (np.arange(sizes[split]) % 10).astype(np.int32)
        self.cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        audio = None if self.cache is None else self.cache.get(index)
        if audio is None:
            audio = self.make(index % 10, stream(self.seed, self.name, self.split, index))
            if self.cache is not None:
                self.cache[index] = audio
        return {"audio": audio, "label": int(self.labels[index])}
