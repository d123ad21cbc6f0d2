"""Rows for fusion encoders: items and a text that are read together, with a label of the whole row."""

from collections.abc import Mapping, Sequence

import numpy as np

from vfm.data.corrupted import MaskedLM
from vfm.data.interleave import Input, Layout, Text, interleave
from vfm.data.labelled import Labelled
from vfm.errors import UserError, unknown


class Fused:
    """How items and a text stand in a row.

    decoder_length 0: one sequence, <bos>, the items, the text, <eos> (fusion by concatenated self-attention, VL-BERT).
    Else the sequence of the layout's length holds the items alone, and a second one, `decoder_tokens` int32[U] with
    U = decoder_length, is <bos> text <eos> (fusion by cross-attention). `targets` and `loss_mask` stand where the text
    does, and each token is the target of its own place.
    """

    def __init__(self, layout: Layout, tokenizer, decoder_length: int = 0):
        self.layout, self.tokenizer, self.decoder_length = layout, tokenizer, decoder_length
        self.keys = frozenset({"decoder_tokens", "decoder_mask"} if decoder_length else ())

    def row(self, items: Mapping[str, np.ndarray], text: str | None, corrupt=None) -> dict:
        """The row of {modality: item} and a text (None: none). corrupt: ids -> tokens, targets, loss_mask of the text.

        Raises UserError for a row that is too long.
        """
        tokenizer = self.tokenizer
        ids = np.asarray(tokenizer.encode(text or ""), np.int32)
        found = {"tokens": ids} if corrupt is None or not len(ids) else corrupt(ids)
        written = [tokenizer.bos_id, *found["tokens"].tolist(), tokenizer.eos_id]
        segments = [Input(name, item) for name, item in items.items()]
        if not self.decoder_length:
            row = interleave([Text(written[:1]), *segments, Text(written[1:])], self.layout, tokenizer)
            begin, length = int(row["input_mask"].sum()) - len(ids) - 1, self.layout.length
        else:
            row = interleave(segments, self.layout, tokenizer)
            begin, length = 1, self.decoder_length
            if len(written) > length:
                raise UserError(f"a text of {len(ids)} tokens, <bos> and <eos> are longer than decoder_length={length}")
            row["decoder_tokens"] = _padded(written, length, 0, tokenizer.pad_id)
            row["decoder_mask"] = np.arange(length) < len(written)
        row["targets"] = _padded(found.get("targets", ()), length, begin, tokenizer.pad_id)
        row["loss_mask"] = _padded(found.get("loss_mask", ()), length, begin, 0).astype(np.float32)
        return row


def _padded(values: Sequence[int], length: int, begin: int, fill: int) -> np.ndarray:
    row = np.full(length, fill, np.int32)
    row[begin : begin + len(values)] = values
    return row


class Matching:
    """Rows of a fusion encoder's pretraining: items and the name of their class, some of which do not match.

    sources, words, anchor, augment: see `Labelled`. inputs: what a row holds, in this order; "text" is the name of the
    class. Every row is about one item of the anchor. mismatched: share of the rows in which one of the other inputs is
    of another class; label int32[]: 1 where all match, 0 else. text_rate, unit, mask: the text is corrupted as by
    `corrupted.MaskedLM`. region_rate: each slot of an item is masked with this probability, `masked` {m: bool[N,
    slots]}; the first item of a modality is the row's. What was masked is to be predicted in rows that match alone
    (`loss_mask`, and `region_mask` {m: float32[N, slots]}), for elsewhere the other modality tells nothing of it; rows
    that do not match are corrupted all the same, or the corruption would give them away. decoder_length: see `Fused`;
    the text alone can then be masked, for the items do not see it.
    Raises UserError for inputs that have no source or are not two or more, rates that are no shares, and rows that are
    too long.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping],
        words: Sequence[str],
        inputs: Sequence[str] = ("image", "text"),
        anchor: str = "",
        mismatched: float = 0.5,
        text_rate: float = 0.15,
        unit: str = "token",
        mask: str = "<mask>",
        region_rate: float = 0.15,
        augment: Mapping[str, Mapping[str, float]] | None = None,
        decoder_length: int = 0,
        *,
        split: str,
        layout: Layout,
        tokenizer,
        train: bool | None = None,
        opened: Mapping | None = None,
    ):
        where = "dataset 'matching'"
        for field, value in {"mismatched": mismatched, "text_rate": text_rate, "region_rate": region_rate}.items():
            if not 0 <= value <= 1:
                raise UserError(f"{where}: {field}={value} must be a share, from 0 to 1")
        if decoder_length and region_rate:
            raise UserError(
                f"{where}: with decoder_length the items do not see the text, so region_rate={region_rate} must be 0"
            )
        self.inputs, self.words = _inputs(inputs, sources, where), tuple(words)
        if len(self.inputs) < 2:
            raise UserError(f"{where}: inputs={self.inputs} must name two modalities or more")
        train = split == "train" if train is None else train
        self.items = Labelled(
            {name: sources[name] for name in self.inputs if name != "text"},
            self.words,
            split=split,
            layout=layout,
            where=where,
            train=train,
            anchor=anchor,
            augment=augment,
            opened=opened,
        )
        self.sources = self.items.sources
        self.mismatched, self.region_rate = mismatched, region_rate
        self.fused = Fused(layout, tokenizer, decoder_length)
        self.corrupt = None
        if text_rate and "text" in self.inputs:
            self.corrupt = MaskedLM(rate=text_rate, unit=unit, mask=mask, length=layout.length, tokenizer=tokenizer)
        self.keys = self.fused.keys | {"label"} | ({"masked", "region_mask"} if region_rate else set())
        _check_length(self.fused, self.inputs, self.words, where)

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        row = {**_blank(cfg, layout, tokenizer), "label": np.zeros((), np.int32)}
        if cfg.get("region_rate", 0.15):
            names = [name for name in cfg.get("inputs", ("image", "text")) if name != "text"]
            row["masked"] = {name: _slots(layout, name, bool) for name in names}
            row["region_mask"] = {name: _slots(layout, name, np.float32) for name in names}
        return row

    def __len__(self) -> int:
        return len(self.items)

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """The row of anchor item `index`; partners, mismatch and corruption are drawn from `rng`."""
        label = self.items.label(index)
        labels = dict.fromkeys(self.inputs, label)
        matches = rng.random() >= self.mismatched
        if not matches:
            others = [name for name in self.inputs if name != self.items.anchor]
            name = others[rng.integers(len(others))]
            known = range(len(self.words)) if name == "text" else self.items.rows[name]
            wrong = [other for other in known if other != label]
            labels[name] = int(wrong[rng.integers(len(wrong))])
        items, text = {}, None
        for name in self.inputs:
            if name == "text":
                text = self.words[labels[name]]
                continue
            chosen = index if name == self.items.anchor else self.items.draw(name, labels[name], rng)
            items[name] = self.items.item(name, chosen, rng)
        corrupt = None if self.corrupt is None else lambda ids: self.corrupt.masked(ids, rng)
        row = self.fused.row(items, text, corrupt)
        row["loss_mask"] *= matches
        row["label"] = np.asarray(matches, np.int32)
        if self.region_rate:
            row["masked"] = {name: self._regions(name, rng) for name in items}
            row["region_mask"] = {name: mask.astype(np.float32) * matches for name, mask in row["masked"].items()}
        return row

    def _regions(self, name: str, rng: np.random.Generator) -> np.ndarray:
        masked = _slots(self.items.layout, name, bool)
        masked[0] = rng.random(masked.shape[1]) < self.region_rate
        return masked


class Parity:
    """A task that no modality solves alone: is one of two digits odd and the other even (exclusive or)?

    sources, words, augment: see `Labelled`; a class is odd or even by its label. inputs: the two modalities, one of
    which may be "text", the name of a class. Row 2i + k shows item i of the first that has a source, and a class of
    parity k of the other one, drawn at random with an item of it: so each item is seen as often with either label, and
    who sees it alone is right in half of the rows. label int32[]: 1 if the two parities differ. shown: which of the
    inputs the row holds, ("image",) for example; empty: both. decoder_length: see `Fused`.
    Raises UserError for inputs that are not two or have no source, and rows that are too long.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping],
        words: Sequence[str] = (),
        inputs: Sequence[str] = ("image", "text"),
        shown: Sequence[str] = (),
        augment: Mapping[str, Mapping[str, float]] | None = None,
        decoder_length: int = 0,
        *,
        split: str,
        layout: Layout,
        tokenizer,
        train: bool | None = None,
        opened: Mapping | None = None,
    ):
        where = "dataset 'parity'"
        self.inputs, self.words = _inputs(inputs, sources, where), tuple(words)
        if len(self.inputs) != 2:
            raise UserError(f"{where}: inputs={self.inputs} must name two modalities")
        for name in shown:
            if name not in self.inputs:
                raise unknown("input", name, self.inputs, f"{where}, field `shown`")
        self.shown = tuple(shown) or self.inputs
        self.items = Labelled(
            {name: sources[name] for name in self.inputs if name != "text"},
            self.words if "text" in self.inputs else None,
            split=split,
            layout=layout,
            where=where,
            train=split == "train" if train is None else train,
            augment=augment,
            opened=opened,
        )
        self.sources = self.items.sources
        (self.other,) = (name for name in self.inputs if name != self.items.anchor)
        known = range(len(self.words)) if self.other == "text" else self.items.rows[self.other]
        self.classes = tuple(np.array([label for label in known if label % 2 == k]) for k in range(2))
        if not all(map(len, self.classes)):
            raise UserError(f"{where}: the classes of {self.other!r}, {list(known)}, must be odd ones and even ones")
        self.fused = Fused(layout, tokenizer, decoder_length)
        self.keys = self.fused.keys | {"label"}
        _check_length(self.fused, self.shown, self.words, where)

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        return {**_blank(cfg, layout, tokenizer), "label": np.zeros((), np.int32)}

    def __len__(self) -> int:
        return 2 * len(self.items)

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """Row `index`; the class and the item of the other input are drawn from `rng`."""
        anchor, parity = self.items.anchor, index % 2
        first, second = self.items.label(index // 2), int(rng.choice(self.classes[parity]))
        items, text = {}, None
        for name in self.inputs:
            if name == "text":
                text = self.words[second]
            else:
                chosen = index // 2 if name == anchor else self.items.draw(name, second, rng)
                items[name] = self.items.item(name, chosen, rng)
        shown = {name: item for name, item in items.items() if name in self.shown}
        row = self.fused.row(shown, text if "text" in self.shown else None)
        return {**row, "label": np.asarray(first % 2 != parity, np.int32)}


def _inputs(inputs: Sequence[str], sources: Mapping, where: str) -> tuple[str, ...]:
    for name in inputs:
        if name not in ("text", *sources):
            raise unknown("input", name, ("text", *sources), f"{where} (is there a source for it?)")
    if len(set(inputs)) != len(inputs):
        raise UserError(f"{where}: inputs={tuple(inputs)} names a modality twice")
    return tuple(inputs)


def _slots(layout: Layout, name: str, dtype) -> np.ndarray:
    modality = layout.modality(name)
    return np.zeros((modality.items, modality.slots), dtype)


def _blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
    return Fused(layout, tokenizer, cfg.get("decoder_length", 0)).row({}, None)


def _check_length(fused: Fused, inputs: Sequence[str], words: Sequence[str], where: str) -> None:
    """Refuses the longest row if it has no room."""
    items = {m: np.zeros(fused.layout.modality(m).item_shape, np.float32) for m in inputs if m != "text"}
    longest = max(words, key=lambda word: len(fused.tokenizer.encode(word)), default=None)
    try:
        fused.row(items, longest if "text" in inputs else None)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
