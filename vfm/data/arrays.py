"""A source of arrays that the user has: any modality that is a matrix of numbers."""

import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from vfm.data.records import check_split
from vfm.errors import UserError, unknown


class Npz:
    """Rows of the arrays in one NumPy .npz file per split, read into memory.

    paths: {split: file}. dir: folder that relative paths start from. arrays: {item field: array name}, such
    as {"vector": "x"}; the arrays have the examples on their first axis. label: name of the array of classes
    (int).
    Item: {field: float32[*shape]}, label int. Raises UserError for a missing or damaged file or array.
    """

    def __init__(
        self,
        split: str,
        paths: Mapping[str, str],
        arrays: Mapping[str, str],
        label: str = "label",
        dir: str = "",
    ):
        check_split(split, paths, "source 'npz' (field `paths`)")
        path = pathlib.Path(dir).expanduser() / pathlib.Path(paths[split]).expanduser()
        if not path.is_file():
            raise UserError(f"source 'npz': file {str(path)!r} does not exist")
        try:
            with np.load(path, allow_pickle=False) as file:
                for name in (*arrays.values(), label):
                    if name not in file.files:
                        raise unknown("array", name, file.files, where=f"file {str(path)!r}")
                self.arrays = {field: file[name].astype(np.float32) for field, name in arrays.items()}
                labels = file[label]
        except UserError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"source 'npz': file {str(path)!r} is damaged: {error}") from error
        if labels.ndim != 1 or labels.dtype.kind not in "biuf" or not (labels == np.floor(labels)).all():
            raise UserError(
                f"file {str(path)!r}: {label!r} must be a whole number for each row; it is "
                f"{labels.dtype}{[*labels.shape]}"
            )
        self.labels = labels.astype(np.int32)
        for field, array in self.arrays.items():
            if not array.ndim:
                raise UserError(f"file {str(path)!r}: {arrays[field]!r} is one number, and not an array of rows")
            if len(array) != len(self.labels):
                raise UserError(
                    f"file {str(path)!r}: array {arrays[field]!r} has {len(array)} rows, {label!r} has "
                    f"{len(self.labels)}"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        item = {field: array[index] for field, array in self.arrays.items()}
        return item | {"label": int(self.labels[index])}
