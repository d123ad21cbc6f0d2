"""Text rows: documents, tokenised, packed, and corrupted for the pretraining objective."""

import functools
import logging
from collections.abc import Mapping

import numpy as np

from vfm.data.construct import construct
from vfm.data.corrupted import CORRUPTIONS, DECODER, PACKED, NextToken, Piece, capacity
from vfm.data.interleave import Layout, interleave
from vfm.data.packing import plan
from vfm.data.sources import texts
from vfm.errors import UserError, unknown

log = logging.getLogger(__name__)


class Text:
    """Rows of T = layout.length tokens from a source of documents, packed by a plan that is made once.

    source: config of a source whose items have `text`. packing: "split", "first_fit" or "none" (`packing.plan`); "":
    what suits the corruption. corruption: config of an entry of `corrupted.CORRUPTIONS`, such as {"name": "masked"}.
    Without one, rows are for next-token prediction: each document is <bos> text <eos>, and every token of it but its
    first is the target of the position before it exactly once, also where a document is cut between rows (the row then
    knows the next token); no target crosses from one document to another. The ids are kept in memory (2 bytes per
    token for small vocabularies).
    Example: tokens, targets, loss_mask, input_mask, what the corruption adds (`keys`), and empty entries for the
    layout's modalities. Where rows may be packed: segment_ids (1, 2, … per piece, 0 padding) and positions (from 0 in
    each piece). Corruptions for an encoder and a decoder have targets and loss_mask over the decoder's positions. A
    row is a pure function of its index and the generator.
    Raises UserError for a source without text, special tokens that the tokenizer lacks, and rows too short; a damaged
    document raises CorruptRecord when the plan is made, or with skip_corrupt is left out, and a warning tells how many
    were.
    """

    def __init__(
        self,
        source: Mapping,
        *,
        split: str,
        layout: Layout,
        tokenizer,
        packing: str = "",
        corruption: Mapping | None = None,
        skip_corrupt: bool = False,
    ):
        self.layout, self.tokenizer = layout, tokenizer
        length = layout.length
        corruption = corruption or {"name": NextToken.name}
        kind = construct("corruption", CORRUPTIONS, corruption, length=length, tokenizer=tokenizer)
        self.corruption, self.keys = kind, kind.keys
        if packing and packing not in kind.packing:
            raise unknown("packing method", packing, kind.packing, f"dataset 'text' with corruption {kind.name!r}")
        self._read(source, split, skip_corrupt)
        most = length if kind.framed else capacity(kind.room, length, kind.least, kind.name)
        self.plan = plan(
            np.diff(self.starts), length, packing or kind.packing[0], most=most, least=kind.least, room=kind.room
        )
        found = len(np.unique(self.plan.document))
        if found < kind.documents:
            raise UserError(
                f"dataset 'text': corruption {kind.name!r} needs {kind.documents} document(s) of {kind.least} token(s) "
                f"or more; the {split} split has {found}"
            )

    def _read(self, source: Mapping, split: str, skip_corrupt: bool) -> None:
        """Reads and tokenises all documents: `ids`, and the `starts` of each in them."""
        tokenizer, skipped = self.tokenizer, [] if skip_corrupt else None
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        frame = ([tokenizer.bos_id], [tokenizer.eos_id]) if self.corruption.framed else ([], [])
        ids = [
            np.asarray([*frame[0], *tokenizer.encode(text), *frame[1]], dtype) for text in texts(source, split, skipped)
        ]
        if not ids:
            raise UserError(f"dataset 'text': all {len(skipped)} documents are corrupt; the first: {skipped[0]}")
        if skipped:
            log.warning(
                "dataset 'text': %d of %d documents are corrupt and left out; the first: %s",
                len(skipped),
                len(skipped) + len(ids),
                skipped[0],
            )
        self.starts = np.concatenate([[0], np.cumsum([len(piece) for piece in ids])]).astype(np.int64)
        self.ids = np.concatenate(ids)

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        corruption = cfg.get("corruption") or {"name": NextToken.name}
        kind = construct("corruption", CORRUPTIONS, corruption, length=layout.length, tokenizer=tokenizer)
        row = interleave([], layout, tokenizer)
        dtype = {"prefix": bool, "decoder_mask": bool}
        for key in (*kind.keys, *(("targets", "loss_mask") if kind.keys >= DECODER else ())):
            size = kind.decoder_length if key in DECODER or key in row else layout.length
            row[key] = np.zeros(
                () if key == "label" else size, row[key].dtype if key in row else dtype.get(key, np.int32)
            )
        return row

    def __len__(self) -> int:
        return len(self.plan)

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """Row `index`; `rng` draws the corruption, if there is one."""
        parts = []
        for number, (document, start, length) in enumerate(self.plan.row(index), start=1):
            begin, end = self.starts[document] + start, self.starts[document + 1]
            piece = Piece(
                ids=self.ids[begin : begin + length],
                following=self.ids[begin + 1 : min(begin + length + 1, end)],
                other=functools.partial(self._other, document),
            )
            part = self.corruption(piece, rng)
            part["input_mask"] = np.ones(len(part["tokens"]), bool)
            for keys, prefix in ((PACKED, ""), (DECODER, "decoder_")):
                if self.keys >= keys:
                    n = len(part[f"{prefix}tokens"])
                    part[f"{prefix}segment_ids"] = np.full(n, number, np.int32)
                    part.setdefault(f"{prefix}positions", np.arange(n, dtype=np.int32))
            parts.append(part)
        return {**interleave([], self.layout, self.tokenizer), **self._pad(parts)}

    def _pad(self, parts: list[dict]) -> dict:
        """The arrays of all pieces one behind the other, then padding."""
        row = {}
        for key, array in parts[0].items():
            if array.ndim:
                # With a decoder of its own, what is predicted stands there.
                of_decoder = key in DECODER or (self.keys >= DECODER and key in ("targets", "loss_mask"))
                size = self.corruption.decoder_length if of_decoder else self.layout.length
                array = np.concatenate([part[key] for part in parts])
                fill = self.tokenizer.pad_id if key.endswith(("tokens", "targets")) else 0
                array = np.pad(array, (0, size - len(array)), constant_values=fill)
            row[key] = array
        return row

    def _other(self, document: int, rng: np.random.Generator) -> np.ndarray:
        """The tokens of a piece of another document, at random. For plans with one piece per row."""
        documents = self.plan.document  # in order
        begin, end = np.searchsorted(documents, [document, document + 1])
        i = int(rng.integers(len(documents) - (end - begin)))
        i += (end - begin) * (i >= begin)
        first = self.starts[documents[i]] + self.plan.start[i]
        return self.ids[first : first + self.plan.length[i]]
