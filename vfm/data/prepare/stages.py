"""What is done to each record by itself: parse, normalise, clean, sketch; in batches that may go to other processes."""

import hashlib
import importlib
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from vfm.data.prepare import clean, lines, minhash, segment
from vfm.data.prepare.normalise import identity, normalise
from vfm.data.prepare.options import Options, names
from vfm.data.prepare.perplexity import CharNgram
from vfm.data.records import CorruptRecord, hash_split
from vfm.errors import UserError

EXCERPT = 160  # characters of an example


class Line(NamedTuple):
    """A line of an input file; both numbers as in the file list (from 0) and in the file (from 1)."""

    file: int
    number: int
    data: bytes


class Row(NamedTuple):
    """What is remembered of a record that passed."""

    content: int  # 64 bits of the text; equal for equal texts
    within: int  # 64 bits of the fields of `dedup_within`
    group: int  # 64 bits of the group, 0 without one
    split: int
    file: int
    number: int
    chars: int
    bytes: int
    source: str
    licence: str
    script: str


class Removed(NamedTuple):
    """A record that did not pass."""

    step: str
    rule: str
    file: int
    number: int
    chars: int
    excerpt: str


class Batch(NamedTuple):
    """lines, digests (16 bytes, equal for exact duplicates), rows and signatures of the records that passed, in order;
    the others; counts by source of what came in, (source, "records" or "chars" or "bytes"); and of what changed.
    """

    lines: list[bytes]
    digests: list[bytes]
    rows: list[Row]
    signatures: np.ndarray | None
    removed: list[Removed]
    seen: Counter
    changed: Counter


class Stages:
    """Lines -> Batch. files: the input files, for messages. splits: the split of each file, or () to split by hash.

    model, limit: of the perplexity filter. sketch: whether signatures are made.
    """

    def __init__(
        self,
        options: Options,
        files: Sequence[str],
        splits: Sequence[int] = (),
        model: CharNgram | None = None,
        limit: float = 0.0,
        sketch: bool = True,
    ):
        self.options, self.files, self.splits = options, [str(file) for file in files], splits
        self.model, self.limit = model, limit
        self.hook = _hook(options.hook)
        self.cleaner = clean.Cleaner(
            clean.parse(options.clean), names(options.scripts), _bad_words(options.bad_words), options.chinese
        )
        segment.segmenter(options.chinese)  # a package that is missing is told at once
        self.minhash = minhash.MinHash(options.num_perm, options.seed) if sketch else None
        self.within = names(options.dedup_within)
        self.shares = options.fractions()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"hook": None}  # a function of a module goes by name

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.hook = _hook(self.options.hook)

    def __call__(self, batch: Sequence[Line]) -> Batch:
        result = Batch([], [], [], None, [], Counter(), Counter())
        texts = []
        for line in batch:
            where = f"{self.files[line.file]}:{line.number}"
            try:
                passed = self._record(line, where, result)
            except CorruptRecord as error:
                if not self.options.skip_malformed:
                    raise UserError(f"{error}; --skip_malformed leaves such lines out") from error
                kind = str(error).removeprefix(f"{where}: ").partition(":")[0].partition(";")[0]
                excerpt = line.data[:EXCERPT].decode(errors="replace").strip()
                result.removed.append(Removed("collect", kind, line.file, line.number, 0, excerpt))
                continue
            if passed is not None:
                texts.append(passed)
        if self.minhash is not None and texts:
            sets = [
                minhash.hash_shingles(minhash.shingles(text, self.options.shingle_words, self.options.shingle_chars))
                for text in texts
            ]
            result = result._replace(signatures=self.minhash.signatures(sets))
        return result

    def _record(self, line: Line, where: str, result: Batch) -> str | None:
        """Adds the record of a line to the result; its text if it passed. CorruptRecord if the line holds none."""
        options = self.options
        record = lines.parse(line.data, where, options.text_field)
        raw = record[options.text_field]
        group = _utf8(lines.plain_field(record, options.group_field, where)) if options.group_field else ""
        within = [lines.plain_field(record, field, where) for field in self.within]
        if options.label_noise != "off":
            lines.plain_field(record, options.label_field, where)
        source = _utf8(record.get(options.source_field) or self.files[line.file])
        result.seen.update({(source, "records"): 1, (source, "chars"): len(raw), (source, "bytes"): _size(raw)})

        remove = lambda step, rule: result.removed.append(
            Removed(step, rule, line.file, line.number, len(raw), _utf8(raw[:EXCERPT]))
        )
        text = normalise(raw, options.unicode, options.controls, options.whitespace, options.html)
        result.changed["normalise"] += text != raw
        record[options.text_field] = text
        if self.hook is not None:
            record = self._hooked(record, where)
            if record is None:
                return remove("normalise", "hook")
            text = record[options.text_field]
        kept, rule = self.cleaner(text)
        if rule:
            return remove("clean", rule)
        if kept != text:
            result.changed.update({"clean": 1, "clean_chars": len(text) - len(kept)})
            text = record[options.text_field] = kept
        if self.model is not None and self.model.bits_per_char(text) > self.limit:
            return remove("clean", "perplexity")

        within_key = repr(within).encode() if within else b""
        content = hashlib.blake2b(identity(text).encode(), digest_size=16).digest()
        # Where equal texts may stay, because other fields differ, they still fall into one split.
        digest = hashlib.blake2b(content + within_key, digest_size=16).digest() if within else content
        split = (
            self.splits[line.file]
            if self.splits
            else list(self.shares).index(hash_split(group if options.group_field else content.hex(), self.shares))
        )
        result.lines.append(lines.dump(record))
        result.digests.append(digest)
        result.rows.append(
            Row(
                int.from_bytes(content[:8], "little"),
                int.from_bytes(_hash(within_key), "little"),
                int.from_bytes(_hash(group.encode()), "little") if options.group_field else 0,
                split,
                line.file,
                line.number,
                len(text),
                _size(text),
                source,
                _utf8(record.get(options.licence_field) or ""),
                segment.script(text),
            )
        )
        return text

    def _hooked(self, record: dict[str, Any], where: str) -> dict[str, Any] | None:
        try:
            record = self.hook(record)
        except Exception as error:
            raise UserError(f"{where}: hook {self.options.hook!r}: {type(error).__name__}: {error}") from error
        if record is not None and not (
            isinstance(record, dict) and isinstance(record.get(self.options.text_field), str)
        ):
            raise UserError(
                f"{where}: hook {self.options.hook!r} must return the record, with text in "
                f"{self.options.text_field!r}, or None to remove it"
            )
        return record


def _utf8(value: Any) -> str:
    """A value as text without what UTF-8 cannot hold."""
    return str(value).encode("utf-8", "replace").decode()


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest() if data else b""


def _hook(spec: str) -> Callable | None:
    if not spec:
        return None
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"the option `hook`, {spec!r}, must be MODULE:FUNCTION of a module on the path: {error}"
        ) from error


def _bad_words(path: str) -> list[str]:
    if not path:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            words = [word for word in (line.strip().casefold() for line in file) if word]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the file of bad words, {path!r}, cannot be read: {error}") from error
    if not words:
        raise UserError(f"the file of bad words, {path!r}, is empty")
    return words


def run(stages: Stages, batches: Iterable[list[Line]], workers: int) -> Iterator[Batch]:
    """The batches through the stages, in order; in `workers` processes if more than one."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from map(stages, batches)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whatever is imported
    with ProcessPoolExecutor(workers, context, _start, (stages,)) as pool:
        pending: deque = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_work, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a worker process died, of too little memory perhaps; try fewer --workers") from error
        finally:
            for future in pending:
                future.cancel()


_stages: Stages | None = None  # of a worker process


def _start(stages: Stages) -> None:
    global _stages
    _stages = stages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent


def _work(batch: list[Line]) -> Batch:
    return _stages(batch)
