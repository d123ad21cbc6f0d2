"""The records of a study: one JSON line per finished run, and the tables that are made of them."""

import contextlib
import fcntl
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vfm.errors import UserError
from vfm.train.logging import write_atomic


def read(path: Path) -> list[dict]:
    """The records of a file in order; [] without one. Of several records of a run the last counts.

    A last line that a crash has torn is left out. Raises UserError for any other line that is not a record.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    found: dict[str, dict] = {}
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                record = json.loads(line)
                found.pop(record["run"], None)
                found[record["run"]] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            if number < len(lines):  # the last one has no end of line
                message = f"{path} line {number} is not a JSON object with a run; mend or remove the line"
                raise UserError(message) from None
    return list(found.values())


@contextlib.contextmanager
def claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock file: whether it is this process that has it. wait: until it is, so always True.

    The lock is gone with the process that holds it, however that ends. Locks of `flock` also hold between the machines
    of a cluster that share the file system (NFS on Linux). Raises UserError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror or error}") from error
    with file:  # what fails in the caller's block is no error of this file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            ours = False
        except OSError as error:
            raise UserError(f"cannot lock {path}: {error.strerror or error}") from error
        else:
            ours = True
        yield ours


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a record, in one write; several processes may do so at once. Raises UserError for numbers that are not
    finite and for files that cannot be written."""
    try:
        line = json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    except ValueError:
        bad = [name for name, value in record.get("metrics", {}).items() if not math.isfinite(value)]
        raise UserError(f"run {record.get('run')}: {', '.join(bad) or 'a number'} is not finite") from None
    with claim(path.with_suffix(".lock"), wait=True):
        try:
            before = path.read_bytes() if path.exists() else b""
            if not before.endswith(b"\n") and before:  # a line that a crash has torn
                write_atomic(path, before[: before.rfind(b"\n") + 1])
            with open(path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error


class Spread(NamedTuple):
    """Mean, standard deviation (of the sample; 0 for one value) and number of values: what seeds gave."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        if not self.deviation:
            return f"{self.mean:.4g}"
        digits = max(1 - math.floor(math.log10(self.deviation)), 0)  # two of the deviation that are not zero
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}"


def spread(values: Iterable[float]) -> Spread:
    """The spread of values."""
    values = list(values)
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def cell(value: Any) -> str:
    """A value of a table as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one structure, {column: value}, as a table in Markdown."""
    header = list(rows[0])
    escape = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    lines = [header, ["---"] * len(header), *([cell(row[name]) for name in header] for row in rows)]
    return "\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines) + "\n"
