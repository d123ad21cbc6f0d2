"""What all sources share: splits, class folders, and the error for a record that cannot be read."""

import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vfm.errors import UserError, unknown

SPLITS = ("train", "validation", "test")


class CorruptRecord(UserError):
    """A record that is damaged or malformed; the pipeline can skip it (`skip_corrupt`), and counts it."""


def check_split(split: str, known: Iterable[str], where: str) -> str:
    """The split, if it is one of `known`."""
    if split not in (known := tuple(known)):
        raise unknown("split", split, known, where=where)
    return split


def hash_split(key: str, fractions: Mapping[str, float]) -> str:
    """The split of `key` by the first 64 bits of its SHA-256, so that it never depends on the other files."""
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2.0**64 * sum(fractions.values())
    for split, fraction in fractions.items():
        point -= fraction
        if point < 0:
            return split
    return split


def stream(seed: int, *keys: int | str) -> np.random.Generator:
    """An independent random stream for each (seed, *keys): Philox keyed by a SHA-256 of them."""
    digest = hashlib.sha256(repr((int(seed), *keys)).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


def existing_dir(path: str, where: str) -> pathlib.Path:
    """The folder, or a UserError that names it."""
    folder = pathlib.Path(path).expanduser()
    if not str(path):  # it would be the current folder
        raise UserError(f"{where}: no folder is given; --config.data.dir=DIR says where the data are")
    if not folder.is_dir():
        raise UserError(f"{where}: folder {str(path)!r} does not exist")
    return folder


def class_files(
    where: str,
    dir: str,
    split: str,
    extensions: Sequence[str],
    classes: Sequence[str] = (),
    fractions: Mapping[str, float] | None = None,
) -> tuple[list[pathlib.Path], np.ndarray, tuple[str, ...]]:
    """Files of one split out of class sub-folders: (paths, labels int32[n], class names).

    Without fractions the layout is dir/<split>/<class>/<file>; with them it is dir/<class>/<file>, and each
    file falls into a split by the hash of its relative path. Classes are the sorted folder names, of the split "train"
    if there is one, so that a number is the same class in every split; unless given.
    """
    root = existing_dir(dir, where)
    known = tuple(fractions) if fractions else sorted(p.name for p in root.iterdir() if p.is_dir())
    check_split(split, known, f"{where} {str(dir)!r}")
    top = root if fractions else root / split
    found = sorted(p.name for p in top.iterdir() if p.is_dir())
    trained = root / "train" if not fractions and "train" in known else top
    names = tuple(classes) or tuple(sorted(p.name for p in trained.iterdir() if p.is_dir()))
    for name in found:
        if name not in names:
            raise unknown("class folder", name, names, where=f"{where} {str(top)!r} (field `classes`)")
    paths, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((top / name).rglob("*")) if name in found else ():
            if path.suffix.lower() not in extensions:
                continue
            if fractions and hash_split(path.relative_to(top).as_posix(), fractions) != split:
                continue
            paths.append(path)
            labels.append(label)
    if not paths:
        raise UserError(
            f"{where}: no {'/'.join(extensions)} file in the class folders of {str(top)!r}, split {split!r}"
        )
    return paths, np.asarray(labels, np.int32), names
