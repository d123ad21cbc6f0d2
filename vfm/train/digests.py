"""Digests of every file of a checkpoint: what makes a step complete, and what finds a flipped byte.

Orbax restores a flipped byte silently. So every step has a folder beside it:

    <directory>/digests/<step>/                     made before the step is written
    <directory>/digests/<step>/files.json           {file: size}, by process 0, after the step is written
    <directory>/digests/<step>/process_i-of-n.json  {file: sha256} of every n-th file, by process i

A step is committed when all of these exist. Only plain files: nothing here knows of JAX or of processes.
"""

import hashlib
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WAIT_SECONDS = 600  # for a file that another process writes on a shared file system


class Incomplete(Exception):
    """The commit of the step was interrupted."""


def folder(directory: Path, step: int) -> Path:
    return directory / "digests" / str(step)


def begin(directory: Path, step: int) -> None:
    """Marks that this step is about to be written: from here on, no digests means not committed."""
    shutil.rmtree(folder(directory, step), ignore_errors=True)
    folder(directory, step).mkdir(parents=True)


def write_list(directory: Path, step: int) -> None:
    """Process 0 lists the files: a listing by each process could differ on a network file system."""
    _write(folder(directory, step) / "files.json", _files(directory / str(step)))


def write_share(directory: Path, step: int, process: int, count: int) -> None:
    """Digests the files that fall to this process of `count`."""
    here = folder(directory, step)
    _wait(lambda: (here / "files.json").exists(), here / "files.json")
    names = sorted(_read(here / "files.json"))[process::count]
    digests = {}
    for name in names:
        path = directory / str(step) / name
        _wait(path.exists, path)
        digests[name] = _digest(path)
    _write(here / f"process_{process}-of-{count}.json", digests)


def wait_committed(directory: Path, step: int) -> None:
    """Waits until every process has written its share."""
    _wait(lambda: committed(directory, step), folder(directory, step))


def committed(directory: Path, step: int) -> bool:
    """Whether all digest files of the step exist."""
    here = folder(directory, step)
    if not (here / "files.json").exists():
        return False
    shares = {path.name for path in here.glob("process_*-of-*.json")}
    counts = {int(match[1]) for name in shares if (match := re.fullmatch(r"process_\d+-of-(\d+)\.json", name))}
    return any(all(f"process_{i}-of-{n}.json" in shares for i in range(n)) for n in counts)


def check_list(directory: Path, step: int) -> str | None:
    """What is wrong with the names and sizes of the step's files, or None. Raises Incomplete."""
    if not folder(directory, step).is_dir():
        return "it has no digests"
    if not committed(directory, step):
        raise Incomplete
    try:
        expected = _read(folder(directory, step) / "files.json")
        recorded = set(_recorded(directory, step))
    except (ValueError, AttributeError):
        return "its digest files are damaged"
    found = _files(directory / str(step))
    for name in sorted(expected.keys() | found.keys() | recorded):
        if name not in found:
            return f"file {name} is missing"
        if name not in expected or name not in recorded:
            return f"file {name} has no digest"
        if found[name] != expected[name]:
            return f"file {name} has {found[name]} bytes, not {expected[name]}"
    return None


def check_share(directory: Path, step: int, process: int, count: int) -> str | None:
    """What is wrong with the contents of the files that fall to this process of `count`, or None."""
    recorded = _recorded(directory, step)
    names = sorted(recorded)[process::count]
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda name: _digest(directory / str(step) / name), names))
    except OSError as error:
        return f"file {error.filename} cannot be read ({error.strerror})"
    for name, digest in zip(names, found):
        if digest != recorded[name]:
            return f"file {name} differs from its digest"
    return None


def _recorded(directory: Path, step: int) -> dict[str, str]:
    shares = folder(directory, step).glob("process_*-of-*.json")
    return {name: digest for path in shares for name, digest in _read(path).items()}


def _files(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict:
    return json.loads(path.read_bytes())


def _write(path: Path, value: dict) -> None:
    """Writes a whole file or none, also when the process is killed."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=0, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _wait(ready, what: Path) -> None:
    deadline, pause = time.monotonic() + WAIT_SECONDS, 0.01
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not appear within {WAIT_SECONDS} s")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
