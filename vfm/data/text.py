"""Text rows for next-token training: documents, tokenised and packed."""

import logging
from collections.abc import Mapping

import numpy as np

from vfm.data.interleave import Layout, interleave
from vfm.data.packing import plan
from vfm.data.records import CorruptRecord
from vfm.data.sources import build_source
from vfm.errors import UserError

log = logging.getLogger(__name__)


class Text:
    """Rows of T = layout.length tokens from a source of documents, packed by a plan that is made once.

    source: config of a source whose items have `text`. packing: "split" or "first_fit" (see `packing.plan`).
    Each document is <bos> text <eos>. Every token of a document but its first is the target of the position
    before it exactly once, also where a document is cut between rows (the row then knows the next token); no
    target crosses from one document to another. The ids are kept in memory (2 bytes per token for small
    vocabularies).
    Example: tokens, targets, loss_mask, input_mask, segment_ids (1, 2, … per piece, 0 padding), positions
    (from 0 in each piece), and empty entries for the layout's modalities. Row i is a pure function of i.
    Raises UserError for a source without text; a damaged document raises CorruptRecord when the plan is made,
    or with skip_corrupt is left out, and a warning tells how many were.
    """

    keys = frozenset({"segment_ids", "positions"})

    def __init__(
        self,
        source: Mapping,
        *,
        split: str,
        layout: Layout,
        tokenizer,
        packing: str = "split",
        skip_corrupt: bool = False,
    ):
        documents = build_source(source, split)
        self.layout, self.tokenizer = layout, tokenizer
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        ids, skipped = [], []
        for index in range(len(documents)):
            try:
                item = documents[index]
            except CorruptRecord as error:
                if not skip_corrupt:
                    raise
                skipped.append(str(error))
                continue
            if "text" not in item:
                raise UserError(f"dataset 'text': source {source['name']!r} gives {sorted(item)}, no 'text'")
            ids.append(np.asarray([tokenizer.bos_id, *tokenizer.encode(item["text"]), tokenizer.eos_id], dtype))
        if not ids:
            raise UserError(f"dataset 'text': all {len(skipped)} documents are corrupt; the first: {skipped[0]}")
        if skipped:
            log.warning(
                "dataset 'text': %d of %d documents are corrupt and left out; the first: %s",
                len(skipped),
                len(documents),
                skipped[0],
            )
        lengths = np.asarray([len(piece) for piece in ids], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.ids = np.concatenate(ids)
        self.plan = plan(lengths, layout.length, packing)

    def __len__(self) -> int:
        return len(self.plan)

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """Row `index`; `rng` is not used."""
        row = interleave([], self.layout, self.tokenizer)
        row["segment_ids"] = np.zeros((self.layout.length,), np.int32)
        row["positions"] = np.zeros((self.layout.length,), np.int32)
        at = 0
        for number, (document, start, length) in enumerate(self.plan.row(index), start=1):
            begin, end = self.starts[document] + start, self.starts[document + 1]
            span = slice(at, at + length)
            following = self.ids[begin + 1 : min(begin + length + 1, end)]
            row["tokens"][span] = self.ids[begin : begin + length]
            row["targets"][at : at + len(following)] = following
            row["loss_mask"][at : at + len(following)] = 1
            row["input_mask"][span] = True
            row["segment_ids"][span] = number
            row["positions"][span] = np.arange(length)
            at += length
        return row
