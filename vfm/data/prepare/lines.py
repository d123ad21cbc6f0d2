"""JSON lines in and out: plain or gzip, one line at a time, with the hash of the file."""

import difflib
import glob
import gzip
import hashlib
import io
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vfm.data.records import CorruptRecord
from vfm.errors import UserError


def expand(patterns: Sequence[str]) -> list[pathlib.Path]:
    """The files of paths and patterns, each once, patterns in sorted order. UserError if there is none."""
    found: list[pathlib.Path] = []
    for pattern in patterns:
        path = pathlib.Path(pattern).expanduser()
        if glob.has_magic(pattern) and not path.exists():
            paths = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
            if not paths:
                raise UserError(f"no file matches the input pattern {pattern!r}")
        elif path.is_dir():
            raise UserError(f"input {pattern!r} is a folder; give its files, such as {str(path / '*.jsonl')!r}")
        elif not path.is_file():
            near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")], n=1)
            hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
            raise UserError(f"input file {pattern!r} does not exist{hint}")
        else:
            paths = [path]
        for path in filter(pathlib.Path.is_file, paths):
            if path in found:
                raise UserError(f"the input file {str(path)!r} is given twice")
            found.append(path)
    if not found:
        raise UserError("no input file; give JSON lines, plain or .gz, such as --input=a.jsonl,b.jsonl.gz")
    return found


class LineReader:
    """The lines of a file, as bytes, with their numbers; blank ones are left out.

    `consumed` is how many bytes of the file have been read, `sha256` its hash once all are.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.consumed, self._hash = path, 0, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            with (
                self.path.open("rb", buffering=0) as raw,
                io.BufferedReader(_Observed(raw, self._saw), 1 << 18) as file,
            ):
                packed = file.peek(2)[:2] == b"\x1f\x8b"
                with gzip.GzipFile(fileobj=file) if packed else file as lines:
                    for number, line in enumerate(lines, start=1):
                        if line.strip():
                            yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"file {str(self.path)!r} cannot be read beyond line {number}: {error}") from error

    def _saw(self, data: memoryview) -> None:
        self.consumed += len(data)
        self._hash.update(data)


class _Observed(io.RawIOBase):
    """A raw file that shows all it reads to a function."""

    def __init__(self, raw: io.RawIOBase, saw: Callable[[memoryview], None]):
        self.raw, self.saw = raw, saw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.raw.readinto(buffer)
        self.saw(memoryview(buffer)[:count])
        return count


def parse(line: bytes, where: str, text_field: str) -> dict[str, Any]:
    """The record of a line, with a string in `text_field`. CorruptRecord with `where` (file:line) if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(record, dict):
        raise CorruptRecord(f"{where}: expected a JSON object, found {type(record).__name__}")
    text = plain_field(record, text_field, where)
    if not isinstance(text, str):
        raise CorruptRecord(f"{where}: field {text_field!r} is not text: {text!r}")
    return record


def plain_field(record: dict[str, Any], field: str, where: str) -> str | int | float | bool:
    """A field that holds text or a number. CorruptRecord if it is missing or something else."""
    if field not in record:
        raise CorruptRecord(f"{where}: no field {field!r}; it has {', '.join(sorted(record)) or 'none'}")
    if not isinstance(value := record[field], str | int | float):
        raise CorruptRecord(f"{where}: field {field!r} is a {type(value).__name__}, not text or a number")
    return value


def dump(record: dict[str, Any]) -> bytes:
    """A record as a line of UTF-8 JSON; escaped where a string holds a lone surrogate."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"
