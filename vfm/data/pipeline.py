"""Batches in an order that is a pure function of seed and step."""

import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vfm.data.records import CorruptRecord
from vfm.errors import UserError

_MOST_SKIPS = 1000  # corrupt records in a row


class Pipeline:
    """Training batches: row r of step s is global index s * batch_size + r, in epochs that are each
    reshuffled.

    dataset: has `len(dataset)` and `example(index, rng)`. batch_size: rows of the global batch.
    shuffle: a new order in every epoch, by grain's index shuffle (no epoch-long table in memory).
    skip_corrupt: take the next index in place of a `CorruptRecord` and count it in the batch's `skipped`;
    else the error goes up. workers: processes that build batches (0: a thread of this process). prefetch:
    batches that are built ahead, for each worker.
    The randomness of an element is Philox keyed by (seed, global index), so the batch of a step depends
    neither on the steps before it nor on the number of workers or processes: the position to checkpoint is
    the step.
    Epochs run across batches; no row is dropped.
    """

    def __init__(
        self,
        dataset,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        skip_corrupt: bool = False,
        workers: int = 0,
        prefetch: int = 2,
    ):
        if batch_size < 1 or workers < 0 or prefetch < 0:
            raise UserError(
                "pipeline needs batch_size >= 1, workers >= 0, prefetch >= 0; found "
                f"{batch_size}, {workers}, {prefetch}"
            )
        if not len(dataset):
            raise UserError(f"the data set {type(dataset).__name__} is empty")
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, int(seed), shuffle
        self.skip_corrupt, self.workers, self.prefetch = skip_corrupt, workers, prefetch
        self._order: Any = None
        self._open: weakref.WeakSet[Batches] = weakref.WeakSet()

    def index(self, position: int) -> int:
        """Index into the data set at a global position (0, 1, 2, … over all epochs)."""
        if not self.shuffle:
            return position % len(self.dataset)
        if self._order is None:
            import grain

            self._order = grain.MapDataset.range(len(self.dataset)).shuffle(seed=self.seed % 2**32).repeat(None)
        return int(self._order[position])

    def batch(self, step: int, rows: Sequence[int] | slice | None = None) -> dict:
        """The batch of a step; `rows` picks rows of the global batch (those of this process).

        Returns the examples stacked on a new first axis, example_mask float32[B] of
        ones, and skipped int32[B], the corrupt records that were replaced in each row.
        """
        begin, examples, skipped = step * self.batch_size, [], []
        for row in _rows(rows, self.batch_size):
            example, count = self._example(begin + row)
            examples.append(example)
            skipped.append(count)
        return _finish(stack(examples), np.ones((len(examples),), np.float32), skipped)

    def _example(self, position: int) -> tuple[dict, int]:
        index, size = self.index(position), len(self.dataset)
        for attempt in range(min(size, _MOST_SKIPS)):
            try:
                return self.dataset.example((index + attempt) % size, rng(self.seed, position, attempt)), attempt
            except CorruptRecord as error:
                if not self.skip_corrupt:
                    raise
                last = error
        raise UserError(f"{attempt + 1} corrupt records in a row, up to: {last}")

    def iterate(
        self, start_step: int = 0, stop_step: int | None = None, rows: Sequence[int] | slice | None = None
    ) -> "Batches":
        """Iterator over the batches of start_step, start_step + 1, … (stop_step excluded), built ahead.

        Close it (or use it in a `with`): worker processes and shared memory are freed then. With workers, the
        caller's main module must be importable (`if __name__ == "__main__":`).
        """
        batches = Batches(self, start_step, stop_step, rows)
        self._open.add(batches)
        return batches

    def close(self) -> None:
        """Closes the iterators that are still open."""
        while self._open:
            self._open.pop().close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_order": None, "_open": weakref.WeakSet()}  # a worker makes its own


class _Steps:
    """Random access to the batches of a range of steps: element i is the batch of step start + i."""

    def __init__(self, pipeline: Pipeline, start: int, stop: int | None, rows):
        self.pipeline, self.start, self.rows = pipeline, start, rows
        self.length = (sys.maxsize if stop is None else max(stop, start)) - start

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return self.pipeline.batch(self.start + int(index), self.rows)


class Batches:
    """Iterator over batches; see `Pipeline.iterate`."""

    def __init__(self, pipeline: Pipeline, start: int, stop: int | None, rows):
        import grain

        steps = grain.MapDataset.source(_Steps(pipeline, start, stop, rows))
        ahead = pipeline.prefetch if pipeline.workers == 0 else 0
        options = grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead)
        batches = steps.to_iter_dataset(options)
        if pipeline.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain reads its own flags when it starts processes
                flags.FLAGS.mark_as_parsed()
            # Worker w of W builds the elements w, w + W, … and they are taken in turn: the order is that of
            # i.
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(pipeline.workers, per_worker_buffer_size=max(pipeline.prefetch, 1))
            )
        self._iterator = iter(batches)
        # Also when it is dropped, or the program ends: otherwise workers and shared memory stay behind.
        self._finalizer = weakref.finalize(self, self._iterator.close)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    def close(self) -> None:
        """Stops the thread or the worker processes; a second call does nothing."""
        self._iterator = None
        self._finalizer()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def eval_batches(
    dataset,
    batch_size: int,
    limit: int | None = None,
    rows: Sequence[int] | slice | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
) -> Iterator[dict]:
    """Batches in which each of the first `limit` examples (all if None) appears once, in order.

    The randomness of example i is fixed by (seed, i). The last batch is filled with copies whose example_mask
    and loss_mask are 0. A corrupt record goes up, or with skip_corrupt is such a filling row, counted in
    `skipped`.
    """
    size = len(dataset) if limit is None else min(limit, len(dataset))
    mine, blank = _rows(rows, batch_size), None
    for begin in range(0, size, batch_size):
        examples: list[dict | None] = []
        skipped = np.zeros(len(mine), np.int32)
        for place, row in enumerate(mine):
            example = None
            if begin + row < size:
                try:
                    example = dataset.example(begin + row, rng(seed, begin + row))
                except CorruptRecord:
                    if not skip_corrupt:
                        raise
                    skipped[place] = 1
            examples.append(example)
        if blank is None:
            blank = _blank(dataset, next((e for e in examples if e is not None), None), seed)
        mask = np.array([example is not None for example in examples], np.float32)
        yield _finish(stack([blank if example is None else example for example in examples]), mask, skipped)


def _blank(dataset, example: dict | None, seed: int) -> dict:
    """A row that only fills a batch: some good example, with an empty loss_mask if it has one."""
    for index in range(min(len(dataset), _MOST_SKIPS)) if example is None else ():
        try:
            example = dataset.example(index, rng(seed, index))
            break
        except CorruptRecord as error:
            last = error
    if example is None:
        raise UserError(f"no record of the data set can be read: {last}")
    return example | {name: np.zeros_like(x) for name, x in example.items() if name == "loss_mask"}


def rng(seed: int, position: int, attempt: int = 0) -> np.random.Generator:
    """Randomness for each (seed, position, attempt): Philox, counter-based (Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, position], counter=[0, 0, 0, attempt]))


def _rows(rows: Sequence[int] | slice | None, batch_size: int) -> Sequence[int]:
    if rows is None or isinstance(rows, slice):
        return range(batch_size)[rows or slice(None)]
    rows = [int(row) for row in rows]
    if rows and not 0 <= min(rows) <= max(rows) < batch_size:
        raise UserError(f"rows {min(rows)} … {max(rows)} are outside the batch of {batch_size}")
    return rows


def _finish(batch: dict, mask: np.ndarray, skipped: Sequence[int] | np.ndarray) -> dict:
    return batch | {"example_mask": mask, "skipped": np.asarray(skipped, np.int32)}


def stack(examples: Sequence[Any], path: str = "") -> Any:
    """Nested dicts of arrays stacked on a new first axis; rows that differ raise UserError."""
    if not examples:
        raise UserError("a batch of no rows: the batch size must be at least the number of processes")
    first = examples[0]
    if isinstance(first, dict):
        for row, example in enumerate(examples):
            if not isinstance(example, dict) or example.keys() != first.keys():
                found = sorted(example) if isinstance(example, dict) else type(example).__name__
                raise UserError(
                    f"rows of a batch differ in {path or 'their fields'}: row 0 has {sorted(first)}, "
                    f"row {row} has {found}"
                )
        return {k: stack([e[k] for e in examples], f"{path}/{k}" if path else k) for k in first}
    arrays = [np.asarray(example) for example in examples]
    for row, array in enumerate(arrays):
        if array.shape != arrays[0].shape or array.dtype != arrays[0].dtype:
            raise UserError(
                f"rows of a batch differ in {path!r}: row 0 is {arrays[0].dtype}{list(arrays[0].shape)}, "
                f"row {row} is {array.dtype}{list(array.shape)}"
            )
    return np.stack(arrays)
