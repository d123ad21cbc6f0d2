"""Rows of single items, as they are: what autoencoders and generators without a backbone learn from."""

from collections.abc import Mapping

import numpy as np

from vfm.data import augment as augmentation
from vfm.data.interleave import Layout, check_shape
from vfm.data.records import CorruptRecord, stream
from vfm.data.sources import build_source
from vfm.errors import UserError, unknown

BINARIZATIONS = ("stochastic", "fixed", "threshold")


class Items:
    """One record of a source in a row: `inputs` {X: [1, *item_shape]} for the modalities of the model.

    source: a source config, whose records hold an array for each modality. modalities: which of them (): all that the
    model has). A modality "label" of the model (items of shape ()) is the record's class.
    ranges: {modality: (lowest, highest)}, what its numbers must lie in. classes: labels must be below it (0: any).
    binarize: {modality: how}, for items in [0, 1], which become 0 or 1: "stochastic", drawn anew with the number as the
      probability (Salakhutdinov & Murray 2008; outside of training always the same draw for an item); "fixed", drawn
      once for all; "threshold", whether it is above 0.5.
    augment: {modality: fields of `augment.apply`}, in training alone.
    Row: inputs, and label int32[] where the source has labels.
    Raises UserError for a modality that the model or the source has not, and for numbers outside of their range.
    """

    keys = frozenset({"label"})

    def __init__(
        self,
        source: Mapping,
        modalities: tuple[str, ...] = (),
        ranges: Mapping[str, tuple[float, float]] | None = None,
        classes: int = 0,
        binarize: Mapping[str, str] | None = None,
        augment: Mapping[str, Mapping[str, float]] | None = None,
        *,
        split: str,
        layout: Layout,
        tokenizer=None,
        train: bool | None = None,
        opened: Mapping | None = None,
    ):
        self.where, self.layout, self.split = "dataset 'items'", layout, split
        self.train = split == "train" if train is None else train
        self.names = _names(modalities, layout)
        self.ranges, self.classes, self.binarize = dict(ranges or {}), classes, dict(binarize or {})
        for field in ("ranges", "binarize"):
            for name in getattr(self, field):
                if name not in self.names:
                    raise unknown("modality", name, self.names, f"{self.where} (field `{field}`)")
        for name, how in self.binarize.items():
            if how not in BINARIZATIONS:
                raise unknown("binarization", how, BINARIZATIONS, f"{self.where}, binarize.{name}")
            self.ranges.setdefault(name, (0.0, 1.0))
        augmentation.check(augment or {}, {n: len(layout.modality(n).item_shape) for n in self.names})
        self.augment = dict(augment or {}) if self.train else {}
        self.sources = dict(opened or {}) or {"items": build_source(source, split)}
        self.source = self.sources["items"]
        if "label" in self.names and getattr(self.source, "labels", None) is None:
            raise UserError(f"{self.where}: the model has labels as items, but source {source['name']!r} gives none")

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        table = {name: layout.modality(name) for name in _names(cfg.get("modalities", ()), layout)}
        inputs = {name: np.zeros((1, *m.item_shape), m.dtype) for name, m in table.items()}
        return {"inputs": inputs, "label": np.zeros((), np.int32)}

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """Row `index`; random changes of its items are drawn from `rng`."""
        record = self.source[index]
        row: dict = {"inputs": {name: self._item(name, record, index, rng)[None] for name in self.names}}
        if getattr(self.source, "labels", None) is not None:
            row["label"] = self._label(record, index)
        return row

    def _label(self, record: Mapping, index: int) -> np.ndarray:
        label = int(record["label"])
        if label < 0:
            raise CorruptRecord(f"{self.where}: item {index} of the {self.split} split has no label")
        if self.classes and label >= self.classes:
            raise UserError(
                f"{self.where}: item {index} of the {self.split} split has label {label}, but data.classes="
                f"{self.classes}: labels are 0 to {self.classes - 1}"
            )
        return np.asarray(label, np.int32)

    def _item(self, name: str, record: Mapping, index: int, rng: np.random.Generator) -> np.ndarray:
        modality = self.layout.modality(name)
        if name == "label" and not modality.item_shape:
            return self._label(record, index)
        if name not in record:
            raise unknown("modality", name, record, f"the records of {self.where}")
        array = check_shape(name, modality, np.asarray(record[name]))
        if not modality.readable(array):
            raise CorruptRecord(f"{self.where}: {name!r} of item {index} holds numbers that are not finite")
        if name in self.augment:
            array = augmentation.apply(array, rng, self.augment[name])
        if name in self.ranges:
            check_range(f"{self.where}: {name!r} of item {index} of the {self.split} split", array, self.ranges[name])
        if name in self.binarize:
            how = self.binarize[name]
            draw = stream(0, "binarize", self.split, index) if how == "fixed" else rng
            array = array > (0.5 if how == "threshold" else draw.random(array.shape))
        return np.asarray(array, modality.dtype)


def check_range(what: str, array: np.ndarray, allowed: tuple[float, float]) -> None:
    """Refuses an array with numbers that are not within (lowest, highest)."""
    low, high = allowed
    least, most = float(np.nanmin(array)), float(np.nanmax(array))
    if least < low or most > high:
        raise UserError(f"{what} has numbers from {least:.4g} to {most:.4g}, but must be within [{low:g}, {high:g}]")


def _names(modalities: tuple[str, ...], layout: Layout) -> tuple[str, ...]:
    names = tuple(modalities) or tuple(layout.modalities)
    if not names:
        raise UserError("dataset 'items': the model has no modality")
    for name in names:
        layout.modality(name)
    return tuple(sorted(names))
