"""Rows for contrastive alignment: items of several modalities that show the same thing."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vfm.data.interleave import Layout, check_shape
from vfm.data.labelled import Labelled
from vfm.data.records import CorruptRecord
from vfm.data.sources import build_source
from vfm.errors import UserError, unknown


def parse_pairs(pairs: Iterable[str], known: Iterable[str], where: str) -> tuple[tuple[str, str], ...]:
    """(("image", "text"), …) of ("image-text", …), each of two different modalities; no pair twice."""
    known, found = tuple(known), []
    for pair in pairs:
        names = tuple(part.strip() for part in str(pair).split("-"))
        if len(names) != 2 or names[0] == names[1]:
            raise UserError(
                f"{where}: pair {pair!r} must have the form 'a-b' with two modalities, such as 'image-text'"
            )
        for name in names:
            if name not in known:
                raise unknown("modality", name, known, f"{where}, pair {pair!r}")
        if names in found or names[::-1] in found:
            raise UserError(f"{where}: pair {pair!r} is there twice")
        found.append(names)
    if not found:
        raise UserError(f"{where}: no pairs; give some, such as ('image-text',)")
    return tuple(found)


def slots(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[int, int], ...]:
    """For each pair, which item of each of its two modalities in a row is its own."""
    seen: dict[str, int] = {}
    found = []
    for pair in pairs:
        found.append(tuple(seen.get(name, 0) for name in pair))
        seen.update({name: seen.get(name, 0) + 1 for name in pair})
    return tuple(found)


def text_item(text: str, layout: Layout, tokenizer, where: str) -> np.ndarray:
    """A whole text as an item, int32[T]: its ids, the end token, padding. One that is too long raises UserError."""
    (length,) = layout.modality("text").item_shape
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    if len(ids) > length:
        raise UserError(
            f"{where}: a text of {len(ids)} tokens, the end token included, is longer than model.encoders.text.length="
            f"{length}: {text[:40]!r}"
        )
    return np.asarray(ids + [tokenizer.pad_id] * (length - len(ids)), np.int32)


class _Rows:
    """What rows of pairs have in common: `inputs` {X: [N, *item_shape]}, N the number of pairs that name X, and `label`
    int32[P], what the items of each pair show."""

    def __init__(self, pairs: tuple[str, ...], layout: Layout, where: str):
        self.layout, self.where = layout, where
        self.pairs = parse_pairs(pairs, layout.modalities, where)
        self.slots = slots(self.pairs)

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        return _Rows(cfg["pairs"], layout, f"dataset {cfg['name']!r}").zeros()

    def zeros(self) -> dict:
        counts = {name: sum(name in pair for pair in self.pairs) for pair in self.pairs for name in pair}
        table = {name: self.layout.modality(name) for name in sorted(counts)}
        return {
            "inputs": {name: np.zeros((counts[name], *m.item_shape), m.dtype) for name, m in table.items()},
            "label": np.zeros((len(self.pairs),), np.int32),
        }


class Composed(_Rows):
    """Rows whose items show a string of classes, such as "three seven": single items of the sources side by side.

    sources: {modality: source config}, single items with labels; `text` has none, it is made of the words. words: the
    class names, by label. pairs: ("image-text", …), see `objectives.contrastive`. compose: classes in a string, which
    stand along the width of images [H, W, C] and along the first axis of other items. size: pairs of the training
    split, of each kind; what they show, and with which single items, is drawn once: a pair of modalities learns from
    `size` sets of data. held_out: share of all strings that training never shows; the other splits show only these
    (0: all strings, in all splits), in items of their own split, each string `repeats` times; gallery: at most so many
    strings (0: all).
    shuffled: pairs whose two items show strings that have nothing to do with each other in training, as a control.
    augment: see `Labelled`.
    Raises UserError for sources that do not fit, unknown pairs, and texts that are too long.
    """

    keys = frozenset({"label"})

    def __init__(
        self,
        sources: Mapping[str, Mapping],
        words: tuple[str, ...],
        pairs: tuple[str, ...],
        compose: int = 1,
        size: int = 10_000,
        held_out: float = 0.0,
        gallery: int = 0,
        repeats: int = 1,
        shuffled: tuple[str, ...] = (),
        augment: Mapping[str, Mapping[str, float]] | None = None,
        *,
        split: str,
        layout: Layout,
        tokenizer,
        train: bool | None = None,
        opened: Mapping | None = None,
    ):
        super().__init__(pairs, layout, "dataset 'composed'")
        if min(compose, size, repeats) < 1 or not 0 <= held_out < 1 or gallery < 0:
            raise UserError(
                f"{self.where}: compose={compose}, size={size} and repeats={repeats} must be at least 1, "
                f"held_out={held_out} a share, and gallery={gallery} at least 0"
            )
        self.train = split == "train" if train is None else train
        self.words, self.tokenizer, self.compose, self.size = tuple(words), tokenizer, compose, size
        self.repeats = repeats
        named = {name for pair in self.pairs for name in pair}
        missing = named - {"text", *sources}
        if missing:
            raise UserError(f"{self.where}: the pairs name {', '.join(sorted(missing))}, which has no source")
        used = {name: cfg for name, cfg in sources.items() if name in named}
        parts = {name: self._part(name) for name in used}
        single = Layout(layout.length, parts)
        self.items = Labelled(
            used,
            self.words,
            split=split,
            layout=single,
            where=self.where,
            train=self.train,
            augment=augment,
            opened=opened,
        )
        self.sources = self.items.sources
        known = parse_pairs(shuffled, layout.modalities, f"{self.where}, shuffled") if shuffled else ()
        self.shuffled = [pair in known or pair[::-1] in known for pair in self.pairs]
        strings = len(self.words) ** compose
        order = np.random.default_rng(0).permutation(strings)  # the same for every run
        first = round(strings * held_out)
        if held_out and not 0 < first < strings:
            raise UserError(f"{self.where}: held_out={held_out} of {strings} strings must be one at least, and not all")
        self.strings = order if not first else order[first:] if self.train else order[:first]
        if not self.train and gallery:
            self.strings = self.strings[:gallery]
        if "text" in named:
            longest = max(self.words, key=lambda word: len(tokenizer.encode(word)))
            text_item(" ".join([longest] * compose), layout, tokenizer, self.where)

    def _part(self, name: str):
        """The modality as a source gives it: one of `compose` parts of the item."""
        whole = self.layout.modality(name)
        shape, axis = list(whole.item_shape), self._axis(name)
        if shape[axis] % self.compose:
            raise UserError(
                f"{self.where}: items of {name!r} have shape {whole.item_shape}, which does not divide into "
                f"compose={self.compose} parts along axis {axis}"
            )
        shape[axis] //= self.compose
        return dataclasses.replace(whole, item_shape=tuple(shape))

    def _axis(self, name: str) -> int:
        return 1 if len(self.layout.modality(name).item_shape) == 3 else 0

    def digits(self, string: int) -> list[int]:
        """The classes of a string, from left to right."""
        return [string // len(self.words) ** i % len(self.words) for i in reversed(range(self.compose))]

    def text(self, string: int) -> str:
        """The words of a string."""
        return " ".join(self.words[label] for label in self.digits(string))

    def __len__(self) -> int:
        return self.size if self.train else len(self.strings) * self.repeats

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """Row `index`; random changes of its items are drawn from `rng`."""
        row = self.zeros()
        for k, (pair, places) in enumerate(zip(self.pairs, self.slots)):
            fixed = np.random.default_rng((index, k, self.train))
            place = fixed.integers(len(self.strings)) if self.train else index % len(self.strings)
            string = int(self.strings[place])
            row["label"][k] = string
            for i, (name, slot) in enumerate(zip(pair, places)):
                if i and self.train and self.shuffled[k]:
                    string = int(self.strings[fixed.integers(len(self.strings))])
                row["inputs"][name][slot] = self.item(name, string, fixed, rng)
        return row

    def item(self, name: str, string: int, fixed: np.random.Generator, rng: np.random.Generator) -> np.ndarray:
        """An item of a modality that shows the string; which single items make it up is drawn from `fixed`."""
        if name == "text":
            return text_item(self.text(string), self.layout, self.tokenizer, self.where)
        parts = [self.items.item(name, self.items.draw(name, label, fixed), rng) for label in self.digits(string)]
        return np.concatenate(parts, axis=self._axis(name))


class Records(_Rows):
    """Rows of a source whose records hold several modalities that belong together, such as image and text.

    source: a source config; its items hold an array for each modality that is not text, and `text` or `caption` for
    text. pairs: ("image-text", …), see `objectives.contrastive`: each takes the two from one record, the k-th pair from
    the k-th record counted from the row's own, so that pairs that share a modality show different records; in training
    only, elsewhere all show the row's own. A record without one of the modalities raises CorruptRecord.
    """

    keys = frozenset({"label"})

    def __init__(
        self,
        source: Mapping,
        pairs: tuple[str, ...],
        *,
        split: str,
        layout: Layout,
        tokenizer,
        train: bool | None = None,
    ):
        super().__init__(pairs, layout, "dataset 'records'")
        self.train = split == "train" if train is None else train
        self.source, self.tokenizer = build_source(source, split), tokenizer

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """Row `index`."""
        row = self.zeros()
        for k, (pair, places) in enumerate(zip(self.pairs, self.slots)):
            number = (index + (k if self.train else 0)) % len(self.source)
            record = self.source[number]
            row["label"][k] = number
            for name, place in zip(pair, places):
                row["inputs"][name][place] = self._item(name, record, number)
        return row

    def _item(self, name: str, record: Mapping, number: int) -> np.ndarray:
        found = record.get(name, record.get("caption") if name == "text" else None)
        if found is None:
            raise CorruptRecord(f"{self.where}: record {number} has no {name!r}; it has {', '.join(sorted(record))}")
        if name == "text":
            return text_item(found, self.layout, self.tokenizer, f"{self.where}, record {number}")
        modality = self.layout.modality(name)
        array = check_shape(name, modality, np.asarray(found))
        if not modality.readable(array):
            raise CorruptRecord(f"{self.where}: {name!r} of record {number} holds numbers that are not finite")
        return array
