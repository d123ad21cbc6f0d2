"""Text sources: JSON lines (plain or gzip), and the source files of Python's own standard library."""

import collections
import gzip
import io
import json
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Mapping

import numpy as np

from vfm.data.records import CorruptRecord, check_split, existing_dir, hash_split
from vfm.errors import UserError, unknown


class Jsonl:
    """One JSON object per line, a file per split, read at random; `.gz` is unpacked into memory once.

    paths: {split: file}. dir: folder that relative paths start from. text_field: where the text is.
    label_field: where the class is (text or number; "" for none); classes: its values in label order; unless given,
    sorted, those of paths["train"] if there is such a split. Blank lines do not count as records.
    Item: text str (and label int). A malformed line raises CorruptRecord with file:line.
    """

    def __init__(
        self,
        split: str,
        paths: Mapping[str, str],
        dir: str = "",
        text_field: str = "text",
        label_field: str = "",
        classes: tuple = (),
    ):
        check_split(split, paths, "source 'jsonl' (field `paths`)")
        self.path = pathlib.Path(dir).expanduser() / pathlib.Path(paths[split]).expanduser()
        self.text_field, self.label_field = text_field, label_field
        if not self.path.is_file():
            hint = "" if dir else "; --config.data.dir=DIR says where the data are"
            raise UserError(f"source 'jsonl': file {str(self.path)!r} does not exist{hint}")
        self.data: bytes | None = None
        if self.path.suffix == ".gz":
            try:
                self.data = gzip.decompress(self.path.read_bytes())
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"source 'jsonl': gzip file {str(self.path)!r} is damaged: {error}") from error
        self.fd: int | None = None
        spans, begin = [], 0
        lines = io.BytesIO(self.data) if self.data is not None else self.path.open("rb")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                spans.append((begin, len(line), number))
            begin += len(line)
        lines.close()
        self.spans = np.asarray(spans, np.int64).reshape(-1, 3)
        if not len(spans):
            raise UserError(f"source 'jsonl': file {str(self.path)!r} holds no record")
        self.labels, self.class_names = None, tuple(classes)
        if label_field:
            if not classes and split != "train" and "train" in paths:
                classes = Jsonl("train", paths, dir, text_field, label_field).class_names
            self._index(tuple(classes))

    def _index(self, classes: tuple) -> None:
        values = []
        for index in range(len(self)):
            try:
                values.append(self._field(index, self.label_field))
            except CorruptRecord:
                values.append(None)
        self.class_names = classes or tuple(
            sorted({v for v in values if v is not None}, key=lambda v: (str(type(v)), v))
        )
        position = {name: n for n, name in enumerate(self.class_names)}
        for index, value in enumerate(values):
            if value is not None and value not in position:
                raise unknown("class", value, position, where=f"{self._where(index)} (field `classes`)")
        self.labels = np.asarray([position.get(value, -1) for value in values], np.int32)

    def _where(self, index: int) -> str:
        return f"{self.path}:{self.spans[index][2]}"

    def _line(self, index: int) -> bytes:
        begin, size, _ = map(int, self.spans[index])
        if self.data is not None:
            return self.data[begin : begin + size]
        if self.fd is None:
            self.fd = os.open(self.path, os.O_RDONLY)
        return os.pread(self.fd, size, begin)  # no shared file position: safe from several threads

    def _record(self, index: int) -> dict:
        try:
            record = json.loads(self._line(index))
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, and brackets in brackets
            raise CorruptRecord(f"{self._where(index)}: not a line of JSON: {error}") from error
        if not isinstance(record, dict):
            raise CorruptRecord(f"{self._where(index)}: expected a JSON object, found {type(record).__name__}")
        return record

    def _field(self, index: int, field: str):
        record = self._record(index)
        if field not in record:
            raise CorruptRecord(f"{self._where(index)}: no field {field!r}; it has {', '.join(sorted(record))}")
        value = record[field]
        if not isinstance(value, str | int | float):
            raise CorruptRecord(f"{self._where(index)}: field {field!r} is a {type(value).__name__}, not text")
        return value

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict:
        text = self._field(index, self.text_field)
        if not isinstance(text, str):
            raise CorruptRecord(f"{self._where(index)}: field {self.text_field!r} is not text: {text!r}")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise CorruptRecord(f"{self._where(index)}: field {self.text_field!r} has half a surrogate pair")
        item = {"text": text}
        if self.labels is not None:
            item["label"] = int(self.labels[index])
        return item

    def __getstate__(self) -> dict:
        return self.__dict__ | {"fd": None}  # a file handle does not travel to a worker process

    def __del__(self):
        if getattr(self, "fd", None) is not None:
            os.close(self.fd)


class Stdlib:
    """The .py files of the running Python's standard library: a real text corpus that is always there.

    fractions: {split: share}; a file's split is the hash of its relative path, so a file keeps its split from
    one Python version to the next. limit: only the first files of the sorted list; 0 for all.
    label: "" for none, or "package": the top folder that a file lies in, such as `asyncio`. Packages of fewer than
    class_size files, all splits together, and files in no folder are no class, label -1.
    Left out: tests, installed packages, empty files, files that are not UTF-8.
    Item: text str, path str (and label int). Source: the Python standard library, PSF licence version 2.
    """

    SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
    LABELS = ("", "package")

    def __init__(
        self,
        split: str,
        fractions: Mapping[str, float] | None = None,
        limit: int = 0,
        label: str = "",
        class_size: int = 20,
    ):
        fractions = dict(fractions or {"train": 0.9, "validation": 0.05, "test": 0.05})
        check_split(split, fractions, "source 'stdlib'")
        if label not in self.LABELS:
            raise unknown("label", label, filter(None, self.LABELS), "source 'stdlib'")
        root = existing_dir(sysconfig.get_paths()["stdlib"], "source 'stdlib'")
        paths = self._paths(root)
        self.files: list[tuple[str, str]] = []
        for path in paths:
            if hash_split(path.as_posix(), fractions) != split:
                continue
            try:
                text = (root / path).read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                self.files.append((path.as_posix(), text))
            if len(self.files) == limit:
                break
        if not self.files:
            raise UserError(f"source 'stdlib': no file under {str(root)!r} falls into split {split!r}")
        self.labels, self.class_names = None, ()
        if label:
            sizes = collections.Counter(path.parts[0] for path in paths if len(path.parts) > 1)
            self.class_names = tuple(sorted(name for name, size in sizes.items() if size >= class_size))
            numbers = {name: number for number, name in enumerate(self.class_names)}
            self.labels = np.asarray([numbers.get(path.split("/")[0], -1) for path, _ in self.files], np.int32)

    def _paths(self, root: pathlib.Path) -> list[pathlib.Path]:
        """All .py files, relative and sorted, without looking into the folders of SKIP."""
        found = []
        for folder, inner, names in os.walk(root):
            inner[:] = set(inner) - self.SKIP
            found += [pathlib.Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
        return sorted(found, key=lambda path: path.parts)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path, text = self.files[index]
        label = {} if self.labels is None else {"label": int(self.labels[index])}
        return {"text": text, "path": path, **label}
