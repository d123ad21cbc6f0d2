"""Some rows of another data set: how much data a model gets is a number of rows."""

from collections.abc import Mapping

import numpy as np

from vfm.data.records import SPLITS, check_split, stream
from vfm.errors import UserError


class Subset:
    """The first rows of another data set, in an order that is drawn once for all: a smaller subset is a part of a
    larger one.

    of: config of a data set, without its source; source: that of its items. rows: {split: how many}; 0, or a split that
    is not named: all. With rows of T tokens, a training set of n rows is one of n · T tokens.
    Raises UserError for more rows than there are.
    """

    def __init__(self, of: Mapping, source: Mapping, rows: Mapping[str, int], *, split: str, layout, tokenizer,
                 skip_corrupt: bool = False):  # fmt: skip
        from vfm.data import build  # here, for the table of data sets holds this class

        for name in rows:
            check_split(name, SPLITS, "dataset 'subset' (field `rows`)")
        cfg = {**of, "source": source}
        self.dataset = build(cfg, split, layout=layout, tokenizer=tokenizer, skip_corrupt=skip_corrupt)
        found, wanted = len(self.dataset), int(rows.get(split, 0))
        if not 0 <= wanted <= found:
            raise UserError(f"dataset 'subset': rows.{split}={wanted} must be from 0 to the {found} rows of the split")
        self.keys = self.dataset.keys
        self.index = stream(0, "subset", split).permutation(found)[: wanted or found]

    @staticmethod
    def blank(cfg: Mapping, layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        from vfm.data import blank

        return blank({**cfg["of"], "source": cfg["source"]}, layout=layout, tokenizer=tokenizer)

    def __len__(self) -> int:
        return len(self.index)

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """Row `index` of the subset."""
        return self.dataset.example(int(self.index[index]), rng)
