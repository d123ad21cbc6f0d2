"""Texts of files, read piece by piece, so that they may be larger than memory."""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

from vfm.errors import UserError
from vfm.tokenizers.split import Splitter

BLOCK = 1 << 22  # characters read at a time


def read(paths: Iterable[str | pathlib.Path], splitter: Splitter, field: str = "text") -> Iterator[str]:
    """The texts of files in turn; each may be plain text or JSON lines (.jsonl), and packed (.gz).

    A plain file is one text. It comes in parts, which are cut where words end in any case; with a split pattern that
    is not known to have such places, behind line ends. field: of the JSON objects. Bytes that are not UTF-8 are kept.
    Raises UserError for a file that does not exist or is damaged, with the line.
    """
    for path in map(pathlib.Path, paths):
        if not path.is_file():
            raise UserError(f"text file {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
        packed = path.suffix == ".gz"
        try:
            # Line ends stay as they are, and so do bytes that are not UTF-8.
            options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
            with gzip.open(path, "rt", **options) if packed else path.open(**options) as file:
                if (path.with_suffix("") if packed else path).suffix == ".jsonl":
                    yield from _records(file, str(path), field)
                else:
                    yield from _parts(file, splitter)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read the text file {str(path)!r}: {error}") from error


def _records(file: IO[str], where: str, field: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}:{number}: not a line of JSON: {error}") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{where}:{number}: no text in a field {field!r}: {line.strip()[:80]!r}")
        yield text


def _parts(file: IO[str], splitter: Splitter) -> Iterator[str]:
    rest = ""
    while block := file.read(BLOCK):
        rest += block
        if splitter.local:
            *parts, rest = splitter.blocks(rest)
        else:
            end = rest.rfind("\n") + 1
            parts, rest = ([rest[:end]] if end else []), rest[end:]
        yield from parts
    if rest:
        yield rest
