"""Rows of sequences that tell their later symbols themselves (`vfm.data.patterns`), for next-token prediction."""

from collections.abc import Mapping

import numpy as np

from vfm.data.interleave import Layout, interleave
from vfm.data.sources import build_source
from vfm.errors import UserError, unknown

LOSSES = ("all", "asked")


class InContext:
    """Rows of a source of `vfm.data.patterns`: <bos> and the symbols; the last one is a target only.

    Symbol i is the token that stands for the text "i". loss: "all" trains on every symbol, "asked" on those alone that
    can be told (shots >= 0).
    Example: tokens, targets, loss_mask, input_mask, and empty entries for the layout's modalities.
    Raises UserError for a source without symbols, a tokenizer without tokens for them, and rows that are too short.
    """

    def __init__(self, source: Mapping, *, split: str, layout: Layout, tokenizer, loss: str = "all"):
        where = "dataset 'in_context'"
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES, where)
        self.source, self.layout, self.tokenizer, self.loss = build_source(source, split), layout, tokenizer, loss
        if not hasattr(self.source, "symbols"):
            raise UserError(f"{where}: source {source['name']!r} gives no symbols; use repeated, lookup or functions")
        if self.source.length > layout.length:
            raise UserError(
                f"{where}: the sequences of source {source['name']!r} have {self.source.length} symbols, "
                f"config.data.length is {layout.length}"
            )
        ids = [tokenizer.encode(str(i)) for i in range(self.source.symbols)]
        if any(len(found) != 1 for found in ids):
            raise UserError(
                f"{where} needs a token for each of {self.source.symbols} numbers: "
                f"config.tokenizer={{'name': 'symbols', 'numbers': {self.source.symbols}, 'separator': ' '}}"
            )
        self.ids = np.array(ids, np.int32)[:, 0]

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone."""
        return interleave([], layout, tokenizer)

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """Row `index`."""
        return self._row(self.source[index])

    def asked(self, index: int) -> dict:
        """Row `index` with `shots` int32[T] of its targets, -1 where nothing tells them, and at padding."""
        item = self.source[index]
        shots = np.pad(item["shots"], (0, self.layout.length - len(item["shots"])), constant_values=-1)
        return {**self._row(item), "shots": shots}

    def _row(self, item: Mapping) -> dict:
        row, ids = interleave([], self.layout, self.tokenizer), self.ids[item["symbols"]]
        n = len(ids)
        row["tokens"][0], row["tokens"][1:n] = self.tokenizer.bos_id, ids[:-1]
        row["targets"][:n] = ids
        row["loss_mask"][:n] = 1 if self.loss == "all" else item["shots"] >= 0
        row["input_mask"][:n] = True
        return row
