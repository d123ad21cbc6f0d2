"""The records of all input files that passed the first stages: texts in a file, what is compared in memory."""

import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vfm.data.prepare import lines, minhash, stages
from vfm.errors import UserError

_BATCH = 1 << 20  # bytes of the lines that are worked on together
_BATCH_LINES = 2000
RECORD = np.dtype(
    [
        ("content", "u8"),
        ("within", "u8"),
        ("group", "u8"),
        ("split", "u1"),
        ("file", "u4"),
        ("number", "u8"),
        ("chars", "u4"),
        ("bytes", "u4"),
        ("source", "u2"),
        ("licence", "u2"),
        ("script", "u2"),
    ]
)
_NAMES = ("source", "licence", "script")
_MAX_NAMES = 1000


class Removals:
    """How much each rule of each step removed, with the first examples."""

    def __init__(self, examples: int):
        self.examples = examples
        self.rules: dict[tuple[str, str], dict] = {}

    def add(self, step: str, rule: str, records: int, chars: int, example: Callable[[], dict] | None = None) -> None:
        """Counts records; `example` is called only while the rule has too few examples."""
        entry = self.rules.setdefault((step, rule), {"records": 0, "chars": 0, "examples": []})
        entry["records"] += records
        entry["chars"] += chars
        if example is not None and len(entry["examples"]) < self.examples:
            entry["examples"].append(example())

    def of(self, step: str) -> dict[str, dict]:
        """{rule: entry} of a step, most frequent first."""
        found = {rule: entry for (name, rule), entry in self.rules.items() if name == step}
        return dict(sorted(found.items(), key=lambda item: (-item[1]["records"], item[0])))

    def summary(self) -> str:
        return ", ".join(f"{step} ({rule}) removed {entry['records']}" for (step, rule), entry in self.rules.items())


class Collected:
    """records: structured array (RECORD) in the order of the input, its names as indices into `names[field]`.

    seen, changed: counts as in `stages.Batch`. sha256: of the input files.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[pathlib.Path], make: stages.Stages):
        self.folder, self.files, self.make = folder, list(files), make
        self.names: dict[str, list[str]] = {}
        self.seen, self.changed = Counter(), Counter()
        self.removed = Removals(make.options.examples)
        self.sha256: list[str] = []
        self.records = np.empty(0, RECORD)
        self.signatures: np.ndarray | None = None
        self._offsets = np.zeros(1, np.int64)

    def read(self, progress: Callable[[str, int, int], None]) -> "Collected":
        """Reads all files; with the option exact_dedup, leaves out records that equal an earlier one."""
        known: dict[str, dict[str, int]] = {name: {} for name in _NAMES}
        seen: dict[bytes, int] = {}  # digest -> index of the first record
        rows, sizes = [self.records], []
        count = 0
        with (self.folder / "lines").open("wb") as texts, (self.folder / "signatures").open("wb") as signatures:
            for batch in stages.run(self.make, self._batches(progress), self.make.options.workers):
                self.seen.update(batch.seen)
                self.changed.update(batch.changed)
                for item in batch.removed:
                    example = lambda item=item: {"where": self._place(item.file, item.number), "text": item.excerpt}
                    self.removed.add(item.step, item.rule, 1, item.chars, example)
                keep = []
                for n, (row, digest) in enumerate(zip(batch.rows, batch.digests)):
                    if self.make.options.exact_dedup and (index := seen.setdefault(digest, count)) != count:
                        example = lambda row=row, line=batch.lines[n], index=index: {
                            "where": self._place(row.file, row.number),
                            "text": self._excerpt(line),
                            "same_as": index,
                        }
                        self.removed.add("exact_dedup", "equal text", 1, row.chars, example)
                        continue
                    keep.append(n)
                    count += 1
                rows.append(_as_records([batch.rows[n] for n in keep], known))
                sizes.append(np.array([len(batch.lines[n]) for n in keep], np.int64))
                texts.writelines(batch.lines[n] for n in keep)
                if batch.signatures is not None:
                    signatures.write(np.ascontiguousarray(batch.signatures[keep]).data)
        self.records = np.concatenate(rows)
        self.names = {name: list(numbers) for name, numbers in known.items()}
        self._offsets = np.concatenate([[0], np.cumsum(np.concatenate([[], *sizes]).astype(np.int64))])
        for entry in self.removed.of("exact_dedup").values():
            for example in entry["examples"]:
                example["same_as"] = self.where(example["same_as"])
        if self.make.minhash is not None:
            shape = (len(self.records), self.make.options.num_perm)
            if len(self.records):
                self.signatures = np.memmap(self.folder / "signatures", np.uint32, "r", shape=shape)
            else:
                self.signatures = np.empty(shape, np.uint32)
        return self

    def _batches(self, progress: Callable[[str, int, int], None]) -> Iterator[list[stages.Line]]:
        total, before = sum(path.stat().st_size for path in self.files), 0
        for number, path in enumerate(self.files):
            reader, batch, size = lines.LineReader(path), [], 0
            for line, data in reader:
                batch.append(stages.Line(number, line, data))
                size += len(data)
                if size >= _BATCH or len(batch) == _BATCH_LINES:
                    yield batch
                    batch, size = [], 0
                    progress("read", before + reader.consumed, total)
            yield batch
            self.sha256.append(reader.sha256)
            before += reader.consumed
        progress("read", total, total)

    def _place(self, file: int, number: int) -> str:
        return f"{self.files[file]}:{number}"

    def where(self, index: int) -> str:
        """file:line of a record."""
        record = self.records[index]
        return self._place(record["file"], record["number"])

    def _excerpt(self, line: bytes) -> str:
        return json.loads(line)[self.make.options.text_field][: stages.EXCERPT]

    def excerpt(self, index: int) -> str:
        """The beginning of the text of a record."""
        with (self.folder / "lines").open("rb") as file:
            file.seek(self._offsets[index])
            return self._excerpt(file.readline())

    def lines(self, kept: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """Index and line of the records that a mask keeps, in order."""
        with (self.folder / "lines").open("rb") as file:
            yield from ((index, line) for index, line in enumerate(file) if kept[index])

    def keys(self, threshold: float, within: np.ndarray | None = None) -> np.ndarray:
        """uint64[bands, n] of all records, for near-duplicates from this similarity on; within as in `band_keys`."""
        bands, rows = minhash.bands_and_rows(self.make.options.num_perm, threshold)
        return minhash.band_keys(self.signatures, bands, rows, within)

    def discard(self) -> None:
        """Removes the files, once the texts have been written elsewhere."""
        self.signatures = None
        for name in ("lines", "signatures"):
            (self.folder / name).unlink()


def _as_records(rows: list[stages.Row], known: dict[str, dict[str, int]]) -> np.ndarray:
    records = np.empty(len(rows), RECORD)
    for field in RECORD.names:
        values = [getattr(row, field) for row in rows]
        if (numbers := known.get(field)) is not None:
            values = [numbers.setdefault(value, len(numbers)) for value in values]
            if len(numbers) > _MAX_NAMES:
                raise UserError(
                    f"more than {_MAX_NAMES} values of the field for the {field} of a record, such as {values[-1]!r}; "
                    f"--{field}_field names what is the same for many records, or a field that there is not"
                )
        records[field] = values
    return records
