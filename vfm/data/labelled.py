"""Items of several single-modality sources, drawn by the class that they show."""

from collections.abc import Mapping, Sequence

import numpy as np

from vfm.data import augment as augmentation
from vfm.data.interleave import Layout, check_shape
from vfm.data.records import CorruptRecord
from vfm.data.sources import build_source
from vfm.errors import UserError, unknown


class Labelled:
    """One source per modality, all with labels of the same classes.

    sources: {modality: source config}. words: the class names, by label; None: they have none. anchor: the
    modality whose items are the epoch ("": the first source); the others must have items of all its classes. augment:
    {modality: fields of `augment.apply`}, for `train` alone. opened: `sources` of another one of the same split, to
    share what they hold in memory. where: whose sources they are, for messages.
    Raises UserError for a modality that the layout has not, a source without labels, and labels that do not match.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping],
        words: Sequence[str] | None,
        *,
        split: str,
        layout: Layout,
        where: str,
        train: bool,
        anchor: str = "",
        augment: Mapping[str, Mapping[str, float]] | None = None,
        opened: Mapping | None = None,
    ):
        if not sources:
            raise UserError(f"{where} has no source")
        for modality in sources:
            layout.modality(modality)
        self.anchor = anchor or next(iter(sources))
        if self.anchor not in sources:
            raise unknown("anchor", self.anchor, sources, where=where)
        augmentation.check(augment or {}, {m: len(layout.modality(m).item_shape) for m in sources})
        self.augment = {m: dict(fields) for m, fields in (augment or {}).items()} if train else {}
        self.words, self.layout, self.where = words, layout, where
        self.sources = dict(opened or {})
        for modality, cfg in sources.items():
            if modality in self.sources:
                continue
            try:
                self.sources[modality] = build_source(cfg, split)
            except UserError as error:
                raise UserError(f"data.sources.{modality}: {error}") from error
        self.rows = {modality: self._by_label(modality) for modality in self.sources}
        self._check_labels()

    def _by_label(self, modality: str) -> dict[int, np.ndarray]:
        labels = getattr(self.sources[modality], "labels", None)
        if labels is None:
            raise UserError(f"{self.where}: the source of {modality!r} gives no labels to pair by")
        if self.words is not None and len(labels) and labels.max() >= len(self.words):
            raise UserError(
                f"{self.where}: the source of {modality!r} has label {labels.max()}, but `words` names "
                f"only {len(self.words)} classes"
            )
        return {label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist() if label >= 0}

    def _check_labels(self) -> None:
        named = {m: s.class_names for m, s in self.sources.items() if getattr(s, "class_names", ())}
        for modality, names in named.items():
            first = next(iter(named))
            if names != named[first]:
                raise UserError(
                    f"{self.where}: classes of {modality!r} {names} differ from those of {first!r} "
                    f"{named[first]}; set the field `classes` of both sources"
                )
        for modality, rows in self.rows.items():
            if missing := set(self.rows[self.anchor]) - set(rows):
                raise UserError(
                    f"{self.where}: the source of {modality!r} has no item of label(s) {sorted(missing)}, "
                    f"which the anchor {self.anchor!r} has"
                )

    def __len__(self) -> int:
        return len(self.sources[self.anchor])

    def label(self, index: int) -> int:
        """The class of item `index` of the anchor; an item without one raises CorruptRecord."""
        label = int(self.sources[self.anchor].labels[index])
        if label < 0:
            self.sources[self.anchor][index]  # raises for a damaged record, naming it
            raise CorruptRecord(f"{self.where}: item {index} of {self.anchor!r} has no label")
        return label

    def draw(self, modality: str, label: int, rng: np.random.Generator) -> int:
        """Index of an item of the class, at random."""
        rows = self.rows[modality][label]
        return int(rows[rng.integers(len(rows))])

    def item(self, modality: str, index: int, rng: np.random.Generator, change: bool = True) -> np.ndarray:
        """Item `index` of a modality, checked; with the random changes of `augment`, unless change=False."""
        record = self.sources[modality][index]
        arrays = [name for name in record if isinstance(record[name], np.ndarray)]
        if modality not in arrays and len(arrays) != 1:
            raise UserError(f"modality {modality!r}: its source gives {sorted(record)}, not {modality!r}")
        array = record[modality if modality in arrays else arrays[0]]
        check_shape(modality, self.layout.modality(modality), array)  # changes want the right rank
        if not self.layout.modality(modality).readable(array):
            raise CorruptRecord(f"modality {modality!r}: item {index} of its source holds numbers that are not finite")
        fields = self.augment.get(modality) if change else None
        return augmentation.apply(array, rng, fields) if fields else array
