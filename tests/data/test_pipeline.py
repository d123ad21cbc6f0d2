import gc

import numpy as np
import pytest

from vfm.data.pipeline import Pipeline, eval_batches
from vfm.data.records import CorruptRecord
from vfm.errors import UserError


class Numbers:
    """Rows that tell their index and one random draw; `bad` ones are corrupt."""

    def __init__(self, size=10, bad=(), shapes=None):
        self.size, self.bad, self.shapes = size, bad, shapes or {}

    def __len__(self):
        return self.size

    def example(self, index, rng):
        if index in self.bad:
            raise CorruptRecord(f"numbers.bin: record {index}")
        shape = self.shapes.get(index, (2,))
        row = {
            "index": np.int32(index),
            "loss_mask": np.ones(3, np.float32),
            "inputs": {"x": rng.random(shape)},
        }
        return row | ({"label": np.int32(index)} if self.shapes.get("label") != index else {})


def same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        if isinstance(one[key], dict):
            same(one[key], two[key])
        else:
            assert one[key].dtype == two[key].dtype
            np.testing.assert_array_equal(one[key], two[key])


def test_batch_is_a_pure_function_of_seed_and_step():
    one, two = Pipeline(Numbers(), 4, seed=3), Pipeline(Numbers(), 4, seed=3)
    later = [one.batch(step) for step in (9, 2, 0)]
    for batch, step in zip(later, (9, 2, 0)):
        same(batch, two.batch(step))
    assert not np.array_equal(later[2]["index"], Pipeline(Numbers(), 4, seed=4).batch(0)["index"])
    assert later[0]["inputs"]["x"].shape == (4, 2) and later[0]["label"].shape == (4,)
    np.testing.assert_array_equal(later[0]["example_mask"], np.ones(4, np.float32))
    assert not later[0]["skipped"].any() and later[0]["skipped"].dtype == np.int32


def test_every_epoch_has_every_index_once_in_a_new_order():
    pipeline = Pipeline(Numbers(12), 4, seed=0)
    epochs = [np.concatenate([pipeline.batch(3 * e + s)["index"] for s in range(3)]) for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    plain = Pipeline(Numbers(5), 4, seed=0, shuffle=False)
    assert plain.batch(1)["index"].tolist() == [4, 0, 1, 2]


def test_epochs_run_across_batches_without_loss():
    pipeline = Pipeline(Numbers(10), 4, seed=1)
    stream = np.concatenate([pipeline.batch(step)["index"] for step in range(5)])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))


def test_an_index_draws_anew_in_each_epoch_and_each_position():
    pipeline = Pipeline(Numbers(4), 4, seed=0, shuffle=False)
    draws = [pipeline.batch(step)["inputs"]["x"] for step in range(3)]
    assert len(np.unique(np.stack(draws))) == 24
    assert not np.array_equal(draws[0], Pipeline(Numbers(4), 4, seed=1, shuffle=False).batch(0)["inputs"]["x"])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_the_processes_make_the_global_batch(processes):
    whole = Pipeline(Numbers(bad=(3,)), 8, seed=5, skip_corrupt=True)
    for step in range(4):
        parts = []
        for process in range(processes):
            rows = range(process * 8 // processes, (process + 1) * 8 // processes)
            parts.append(Pipeline(Numbers(bad=(3,)), 8, seed=5, skip_corrupt=True).batch(step, rows))
        batch = whole.batch(step)
        for key in ("index", "label", "example_mask"):
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), batch[key])
        np.testing.assert_array_equal(np.concatenate([part["inputs"]["x"] for part in parts]), batch["inputs"]["x"])
        assert sum(part["skipped"].sum() for part in parts) == batch["skipped"].sum()
    same(whole.batch(1, slice(2, 5)), whole.batch(1, [2, 3, 4]))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_iteration_equals_batches_from_any_step(prefetch):
    pipeline = Pipeline(Numbers(), 3, seed=2, prefetch=prefetch)
    for start in (0, 1, 5):
        with pipeline.iterate(start, 8) as batches:
            found = list(batches)
        assert len(found) == 8 - start
        for step, batch in enumerate(found, start=start):
            same(batch, pipeline.batch(step))
    endless = pipeline.iterate(10**6, rows=range(1, 3))
    same(next(endless), pipeline.batch(10**6, range(1, 3)))
    pipeline.close()
    assert list(endless) == [] and list(pipeline.iterate(4, 4)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_batches(workers):
    pipeline = Pipeline(Numbers(bad=(2,)), 3, seed=2, skip_corrupt=True, workers=workers)
    with pipeline.iterate(3, 10, range(0, 3)) as batches:
        found = list(batches)
    assert len(found) == 7
    for step, batch in enumerate(found, start=3):
        same(batch, pipeline.batch(step))


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_record_is_named_by_default(workers):
    pipeline = Pipeline(Numbers(bad=(4,)), 5, seed=0, shuffle=False, workers=workers)
    with pipeline.iterate(0, 2) as batches, pytest.raises(UserError, match="numbers.bin: record 4"):
        list(batches)


def test_skipped_records_are_replaced_by_the_next_and_counted():
    pipeline = Pipeline(Numbers(6, bad=(1, 4, 5)), 6, seed=0, shuffle=False, skip_corrupt=True)
    batch = pipeline.batch(0)
    assert batch["index"].tolist() == [0, 2, 2, 3, 0, 0] and batch["skipped"].sum() == 1 + 2 + 1
    assert len(np.unique(batch["inputs"]["x"])) == 12
    same(batch, Pipeline(Numbers(6, bad=(1, 4, 5)), 6, 0, shuffle=False, skip_corrupt=True).batch(0))
    with pytest.raises(UserError, match="6 corrupt records in a row, up to: numbers.bin: record"):
        Pipeline(Numbers(6, bad=range(6)), 2, seed=0, skip_corrupt=True).batch(0)


def test_only_corrupt_records_are_skipped():
    class Wrong(Numbers):
        def example(self, index, rng):
            raise UserError("modality 'image': wrong rank")

    with pytest.raises(UserError, match="wrong rank"):
        Pipeline(Wrong(), 2, seed=0, skip_corrupt=True).batch(0)


def test_evaluation_sees_each_example_once_in_order():
    batches = list(eval_batches(Numbers(10), 4))
    assert len(batches) == 3 and all(len(batch["index"]) == 4 for batch in batches)
    mask = np.concatenate([batch["example_mask"] for batch in batches])
    assert np.concatenate([batch["index"] for batch in batches])[mask == 1].tolist() == list(range(10))
    assert mask.tolist() == [1] * 10 + [0] * 2
    assert batches[2]["loss_mask"].sum(axis=1).tolist() == [3, 3, 0, 0]
    assert batches[0].keys() == Pipeline(Numbers(), 2, 0).batch(0).keys()
    for one, two in zip(batches, eval_batches(Numbers(10), 4)):
        same(one, two)
    found = np.concatenate([b["inputs"]["x"] for b in eval_batches(Numbers(10), 5)])
    wanted = np.concatenate([b["inputs"]["x"] for b in batches])[:10]
    np.testing.assert_array_equal(found, wanted)  # the batch size changes nothing
    limited = list(eval_batches(Numbers(10), 4, limit=5))
    assert [batch["example_mask"].sum() for batch in limited] == [4, 1]
    parts = [list(eval_batches(Numbers(10), 4, rows=rows)) for rows in (range(0, 2), range(2, 4))]
    for batch, first, second in zip(batches, *parts):
        np.testing.assert_array_equal(np.concatenate([first["index"], second["index"]])[:2], batch["index"][:2])
        for part, rows in ((first, slice(0, 2)), (second, slice(2, 4))):
            np.testing.assert_array_equal(part["example_mask"], batch["example_mask"][rows])


def test_evaluation_with_corrupt_records():
    with pytest.raises(UserError, match="record 0"):
        list(eval_batches(Numbers(4, bad=(0,)), 2))
    batches = list(eval_batches(Numbers(4, bad=(0, 1)), 2, skip_corrupt=True))
    assert [batch["example_mask"].tolist() for batch in batches] == [[0, 0], [1, 1]]
    assert [int(batch["skipped"].sum()) for batch in batches] == [2, 0] and batches[0]["loss_mask"].sum() == 0
    with pytest.raises(UserError, match="no record of the data set can be read"):
        list(eval_batches(Numbers(2, bad=(0, 1)), 2, skip_corrupt=True))


@pytest.mark.parametrize(
    "shapes, words",
    [({2: (3,)}, ("'inputs/x'", "[2]", "row 2", "[3]")), ({"label": 1}, ("row 0", "label", "row 1"))],
)
def test_rows_that_differ_are_named(shapes, words):
    with pytest.raises(UserError) as error:
        Pipeline(Numbers(shapes=shapes), 4, seed=0, shuffle=False).batch(0)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_arguments():
    for make, words in (
        (lambda: Pipeline(Numbers(0), 4, seed=0), "empty"),
        (lambda: Pipeline(Numbers(), 0, seed=0), "batch_size"),
        (lambda: Pipeline(Numbers(), 4, seed=0).batch(0, range(2, 6)), "outside the batch of 4"),
        (lambda: Pipeline(Numbers(), 4, seed=0).batch(0, ()), "no rows"),
    ):
        with pytest.raises(UserError, match=words):
            make()


def test_a_dropped_iterator_is_closed():
    pipeline = Pipeline(Numbers(), 3, seed=0)
    batches = pipeline.iterate(0)
    next(batches)
    finalizer = batches._finalizer
    assert finalizer.alive
    del batches
    gc.collect()
    assert not finalizer.alive and not pipeline._open
