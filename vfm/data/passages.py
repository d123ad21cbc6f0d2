"""Passages of documents, uncorrupted: what evaluators read."""

import logging

import numpy as np

from vfm.data.interleave import Layout, interleave
from vfm.data.records import CorruptRecord, stream
from vfm.data.sources import build_source
from vfm.errors import UserError

log = logging.getLogger(__name__)


class Passages:
    """Passages of `length` tokens, at most `per_document` of each document of a source, at even distances in it.

    A document of fewer tokens is one passage; one of fewer than `least` is left out, and with `labelled` one without a
    label as well. most: documents are taken in random order, always the same, until there are so many passages (0:
    all), so that any number of passages is a fair sample of the split.
    Example: tokens int32[length], input_mask; label int32[] (-1 where the source has none), document int32[] (the
    number of its document, for splits that keep documents whole), loss_mask (zeros: nothing is to be predicted).
    `ids`, `labels` and `documents` hold the same for all passages.
    Raises UserError where nothing is left; a damaged document raises CorruptRecord, or with skip_corrupt is left out.
    """

    def __init__(
        self,
        source,
        *,
        split: str,
        tokenizer,
        length: int,
        per_document: int = 4,
        most: int = 0,
        least: int = 2,
        labelled: bool = False,
        skip_corrupt: bool = False,
    ):
        found = build_source(source, split)
        if labelled and found.labels is None:
            raise UserError(
                f"source {source['name']!r} has no labels; jsonl has the field `label_field`, stdlib `label`"
            )
        self.class_names = tuple(getattr(found, "class_names", ()))
        self.layout, self.tokenizer = Layout(length), tokenizer
        self.ids, labels, documents, skipped = [], [], [], 0
        for index in stream(0, "passages").permutation(len(found)):
            if labelled and found.labels[index] < 0:
                continue
            if most and len(self.ids) >= most:
                break
            try:
                ids = tokenizer.encode(found[int(index)]["text"])
            except CorruptRecord:
                if not skip_corrupt:
                    raise
                skipped += 1
                continue
            if len(ids) < least:
                continue
            count = max(min(per_document, len(ids) // length), 1)
            for start in np.linspace(0, max(len(ids) - length, 0), count).round().astype(int):
                self.ids.append(np.asarray(ids[start : start + length], np.int32))
                labels.append(-1 if found.labels is None else int(found.labels[index]))
                documents.append(int(index))
        if skipped:
            log.warning("passages: %d documents of the %s split are corrupt and left out", skipped, split)
        keep = slice(most or None)
        self.ids = self.ids[keep]
        self.labels, self.documents = (np.asarray(values, np.int32)[keep] for values in (labels, documents))
        if not self.ids:
            kind = "labelled document" if labelled else "document"
            raise UserError(f"the {split} split of source {source['name']!r} has no {kind} of {least} tokens or more")

    def __len__(self) -> int:
        return len(self.ids)

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """Passage `index`, padded."""
        row = interleave([], self.layout, self.tokenizer)
        n = len(self.ids[index])
        row["tokens"][:n], row["input_mask"][:n] = self.ids[index], True
        return {**row, "label": self.labels[index], "document": self.documents[index]}
