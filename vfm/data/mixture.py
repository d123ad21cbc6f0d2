"""Several data sets in fixed proportions."""

from collections.abc import Mapping

import numpy as np

from vfm.errors import UserError, unknown


class Mixture:
    """A weighted mixture: over one epoch each data set has its exact share, evenly interleaved.

    datasets: {name: dataset config}; weights: {name: relative weight}, of rows.
    The epoch is the shortest in which every row of every data set appears: data sets that are smaller than
    their share repeat from their start. Counts are exact (largest remainder), and so, to about one row,
    are those of any run of indices. Rows get the fields that another data set has (`segment_ids` 1 and
    `positions` from 0 where it does not pack, `label` -1 where it has none, no `prefix`, and 0 for `token_types` and
    `block_positions`), so that all rows have the same structure.
    Raises UserError when datasets and weights do not name the same things, a weight is not positive, or only some
    data sets have a field that cannot be made up, such as `decoder_tokens`.
    """

    def __init__(
        self,
        datasets: Mapping[str, Mapping],
        weights: Mapping[str, float],
        *,
        split: str,
        layout,
        tokenizer,
        skip_corrupt: bool = False,
    ):
        from vfm.data import build  # here, for the table of data sets holds this class

        for name in weights:
            if name not in datasets:
                raise unknown("dataset", name, datasets, where="`weights` of the mixture")
        missing = sorted(set(datasets) - set(weights))
        if missing or not datasets or min(weights.values()) <= 0:
            raise UserError(
                f"dataset 'mixture': each data set needs a positive weight, found {dict(weights)} for "
                f"{', '.join(datasets) or 'no data sets'}"
            )
        self.datasets = [
            build(cfg, split, layout=layout, tokenizer=tokenizer, skip_corrupt=skip_corrupt)
            for cfg in datasets.values()
        ]
        self.keys = frozenset().union(*(child.keys for child in self.datasets))
        for name, child in zip(datasets, self.datasets):
            if odd := self.keys - child.keys - _FILL.keys():
                raise UserError(f"dataset 'mixture': {name!r} has no {', '.join(sorted(odd))}, which another one has")
        share = np.array([weights[name] for name in datasets], np.float64)
        share /= share.sum()
        sizes = np.array([len(child) for child in self.datasets])
        counts = _round(share * np.ceil((sizes / share).max() - 1e-9))
        counts = np.maximum(counts, 1)
        # Row j of a data set with c rows stands at (j + 1/2) / c: even spacing, merged by a stable sort.
        at = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
        order = np.argsort(at, kind="stable")
        self.child = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self.row = np.concatenate([np.arange(c) % size for c, size in zip(counts, sizes)])[order]

    @staticmethod
    def blank(cfg: Mapping, layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        from vfm.data import blank

        rows = [blank(child, layout=layout, tokenizer=tokenizer) for child in cfg["datasets"].values()]
        return {key: value for row in rows for key, value in row.items()}

    def __len__(self) -> int:
        return len(self.child)

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """Row `index` of the schedule."""
        row = self.datasets[self.child[index]].example(int(self.row[index]), rng)
        real = row["input_mask"].astype(np.int32)
        return row | {key: _FILL[key](real) for key in self.keys if key not in row}


# Field -> what a row gets that does not have it, from its input_mask int32[T].
_FILL = {
    "segment_ids": lambda real: real,
    "positions": lambda real: np.arange(len(real), dtype=np.int32) * real,
    "token_types": np.zeros_like,
    "block_positions": np.zeros_like,
    "prefix": lambda real: np.zeros(len(real), bool),
    "label": lambda real: np.asarray(-1, np.int32),
}


def _round(counts: np.ndarray) -> np.ndarray:
    """Whole numbers with the same sum, by the largest remainder."""
    whole = np.floor(counts + 1e-9).astype(np.int64)
    rest = int(round(counts.sum())) - int(whole.sum())
    whole[np.argsort(-(counts - whole), kind="stable")[:rest]] += 1
    return whole
