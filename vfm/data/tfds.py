"""TFDS data sets in the array_record format, read without TensorFlow."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from vfm.data.audio import fit
from vfm.data.image import check_size, resized
from vfm.data.records import CorruptRecord, check_split, existing_dir
from vfm.errors import UserError, unknown

KINDS = ("audio", "image", "label", "text", "vector")


class Tfds:
    """One split of a TFDS data set on disk, by `data_source` (array_record only).

    dataset: "name:version" or "name/config:version". The version is required: with it, TFDS reads the
    features from the folder; without it, it builds the Python class, whose audio and video features need
    TensorFlow.
    data_dir: folder that holds the data sets. splits: {our split: TFDS split, with slices such as
    "train[:90%]"}; "train" and "test" map to themselves unless given.
    features: {TFDS feature: kind}, the feature's value becomes item[kind]:
      image  uint8 → float32[H, W, C] in [0, 1];   audio  integers / full_scale → float32[samples] in [-1, 1];
      label  int;   text  bytes → str;   vector  float32 as it is.
    size: (H, W) that images are resized to, bilinear; () keeps each image's own size.
    samples: length that audio is padded to with zeros or cut to, at the end; 0 keeps it. full_scale: the
    integer that stands for 1.0 in audio (32768 for 16 bits).
    where: {our split: {TFDS feature: regex}}: only records whose feature, as text, holds a match
    (`re.search`), such as {"test": {"audio/filename": "_theo_"}}. No image is decoded for it.
    cache: keep records in memory (as stored: uint8, int) once they are decoded.
    Raises UserError for a missing folder, data set, version, split or feature, and for a filter that leaves
    nothing; CorruptRecord for a record that cannot be read. `indices` are the positions in the TFDS split.
    """

    def __init__(
        self,
        split: str,
        dataset: str,
        data_dir: str,
        features: Mapping[str, str],
        splits: Mapping[str, str] | None = None,
        samples: int = 0,
        full_scale: float = 32768.0,
        where: Mapping[str, Mapping[str, str]] | None = None,
        cache: bool = False,
        size: tuple[int, ...] = (),
    ):
        splits = dict(splits or {"train": "train", "test": "test"})
        check_split(split, splits, f"source 'tfds' {dataset!r} (field `splits`)")
        self.dataset, self.features, self.tfds_split = dataset, dict(features), splits[split]
        self.size = check_size(size, f"source 'tfds' {dataset!r}")
        self.samples, self.full_scale = int(samples), float(full_scale)
        for feature, kind in self.features.items():
            if kind not in KINDS:
                raise unknown("kind", kind, KINDS, where=f"source 'tfds' {dataset!r} (feature {feature!r})")
        self.data = self._open(data_dir)
        where = dict((where or {}).get(split, {}))
        self._index({feature: re.compile(pattern) for feature, pattern in where.items()})
        self.cache: dict[int, dict] | None = {} if cache else None

    def _open(self, data_dir: str):
        root = existing_dir(data_dir, f"source 'tfds' {self.dataset!r} (field `data_dir`)")
        name, _, version = self.dataset.partition(":")
        folder = root / name
        if not folder.is_dir():
            raise unknown("TFDS data set", name, (p.name for p in root.iterdir() if p.is_dir()), where=repr(str(root)))
        versions = sorted(p.name for p in folder.iterdir() if (p / "dataset_info.json").is_file())
        if not version:
            raise UserError(
                f"source 'tfds': data set {name!r} needs a version, as in "
                f"{name}:{(versions or ['1.0.0'])[-1]}. On disk: {', '.join(versions) or 'none'}"
            )
        if version not in versions:
            raise unknown("version", version, versions, where=f"TFDS data set {str(folder)!r}")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"source 'tfds' needs the extra 'tfds' (pip install 'vfm[tfds]'): {error}") from error
        self.folder = folder / version
        try:
            self.builder = tfds.builder_from_directory(self.folder)
            known = self.builder.info.features
        except Exception as error:  # TFDS raises many kinds for a damaged or foreign folder
            raise UserError(f"TFDS data set {str(self.folder)!r} cannot be opened: {error}") from error
        for feature in self.features:
            if feature not in known:
                raise unknown("feature", feature, known, where=f"TFDS data set {self.dataset!r}")
        self.skip = {name: tfds.decode.SkipDecoding() for name in known if type(known[name]).__name__ == "Image"}
        base = re.split(r"[\[+]", self.tfds_split)[0].strip()
        check_split(base, self.builder.info.splits, f"TFDS data set {self.dataset!r}")
        try:
            return self.builder.as_data_source(split=self.tfds_split)
        except Exception as error:
            raise UserError(
                f"TFDS data set {self.dataset!r}, split {self.tfds_split!r} cannot be opened: {error}"
            ) from error

    def _index(self, where: Mapping[str, re.Pattern]) -> None:
        """Reads labels and filter fields once, with pictures left encoded."""
        for feature in where:
            if feature not in self.builder.info.features:
                raise unknown("feature", feature, self.builder.info.features, where=f"`where` of {self.dataset!r}")
        label = next((feature for feature, kind in self.features.items() if kind == "label"), None)
        self.indices = np.arange(len(self.data))
        self.labels = None
        if not where and label is None:
            return
        encoded = self.builder.as_data_source(split=self.tfds_split, decoders=self.skip)
        keep, labels = [], []
        for begin in range(0, len(encoded), 1024):
            chunk = range(begin, min(begin + 1024, len(encoded)))
            try:
                records = encoded.__getitems__(list(chunk))
            except Exception:  # a damaged chunk: find out which of its records can be read
                records = [self._try(encoded, index) for index in chunk]
            wanted = [*where, *([label] if label else [])]
            for index, record in zip(chunk, records):
                # Kept without a label, so that reading it is refused (or skipped and counted).
                if record is None or _empty(record, wanted):
                    keep.append(index)
                    labels.append(-1)
                elif all(pattern.search(_text(record[feature])) for feature, pattern in where.items()):
                    keep.append(index)
                    labels.append(int(record[label]) if label else -1)
        if not keep:
            raise UserError(f"TFDS data set {self.dataset!r}, split {self.tfds_split!r}: `where` leaves no record")
        self.indices = np.asarray(keep)
        if label:
            self.labels = np.asarray(labels, np.int32)

    @staticmethod
    def _try(data, index: int) -> dict | None:
        try:
            return data[index]
        except Exception:
            return None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        position = int(self.indices[index])
        raw = self.cache.get(position) if self.cache is not None else None
        if raw is None:
            try:
                raw = self.data[position]
            except Exception as error:  # array_record and TFDS raise many kinds for a damaged record
                raise self._corrupt(position, re.sub(r" at 0x\w+", "", str(error))) from error
            if _empty(raw, self.features):
                raise self._corrupt(position, "it is empty")
            raw = {feature: raw[feature] for feature in self.features}
            if self.cache is not None:
                self.cache[position] = raw
        return {kind: self._convert(raw[feature], kind) for feature, kind in self.features.items()}

    def _corrupt(self, position: int, why: str) -> CorruptRecord:
        return CorruptRecord(
            f"{self.folder}, split {self.tfds_split!r}, record {position} cannot be read; the file may be damaged "
            f"or truncated: {why}"
        )

    def _convert(self, value, kind: str):
        if kind == "label":
            return int(value)
        if kind == "text":
            return _text(value)
        array = np.asarray(value)
        if kind == "image" and array.dtype == np.uint8:
            return (resized(array, self.size) if self.size else array).astype(np.float32) / 255.0
        if kind == "audio":
            integers = np.issubdtype(array.dtype, np.integer)
            array = fit(array, self.samples).astype(np.float32)
            return array / np.float32(self.full_scale) if integers else array
        return array.astype(np.float32)


def _empty(record: Mapping, features: Iterable[str]) -> bool:
    """Whether a feature has no value: array_record gives such records for a file that ends too early."""
    return any(record[feature] is None for feature in features)


def _text(value) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
