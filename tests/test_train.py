"""Whole runs: what they leave in their folder, and that no stop, crash or restart changes what comes out."""

import contextlib
import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from tests import tiny
from vfm import run as run_lib
from vfm import tree
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.run import run
from vfm.train.preemption import Preemption

STOP = 9  # neither a checkpoint nor an evaluation falls on this step


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@functools.cache
def experiment(devices=8, **changes):
    """Compiled once, and used for all runs of a config in this file."""
    return Experiment(tiny.config("text", **changes), jax.devices()[:devices])


def cube():
    return experiment(**tiny.CUBE)


def train(path, e=None):
    path.mkdir(exist_ok=True)
    return run_lib.train(e or cube(), path)


@contextlib.contextmanager
def sigterm_at(step):
    """The process gets a SIGTERM before a step."""
    original = Preemption.requested

    def requested(self, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preemption, "requested", requested)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a run that nothing disturbed, and what `run` returned."""
    path = tmp_path_factory.mktemp("runs") / "reference"
    return path, run(tiny.config("text", **tiny.CUBE), str(path))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The folder of a run that was stopped half-way."""
    path = tmp_path_factory.mktemp("runs") / "half"
    with sigterm_at(STOP):
        assert train(path) == {}
    return path


def copy(source, target):
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def assert_same_end(path, reference, e=None):
    """Parameters, optimizer, average and keys bit for bit, and every line of the log."""
    assert tiny.digest(e or cube(), path) == tiny.digest(cube(), reference[0])
    assert tiny.history(path) == tiny.history(reference[0])
    results = json.loads((path / "results.json").read_text())
    assert without_time(results) == without_time(reference[1])


def without_time(results):
    return {name: value for name, value in results.items() if name != "train_seconds"}


# ------------------------------------------------------------------------------------------ the folder


def test_what_a_run_leaves(reference):
    path, results = reference
    assert json.loads((path / "results.json").read_text()) == results
    assert json.loads((path / "config.json").read_text()) == json.loads(tiny.config("text", **tiny.CUBE).to_json())

    history = tiny.history(path)
    assert [r["step"] for r in history if r["split"] == "train"] == [3, 6, 9, 12, 15, 18, 20]
    assert [r["step"] for r in history if r["split"] == "validation"] == [8, 16, 20]
    assert all(np.isfinite(value) for r in history for value in r.values() if not isinstance(value, str))
    training = [r["loss"] for r in history if r["split"] == "train"]
    assert training[-1] < training[0] - 0.3 and all(
        {"grad_norm", "learning_rate", "text"} <= r.keys() for r in history if r["split"] == "train"
    )

    assert tiny.steps_on_disk(path) == [16, 20]
    assert results["step"] == tiny.STEPS and results["parameters"] == tree.count(cube().abstract_state.params)
    assert 0 < results["test_loss"] < 7 and results["train_seconds"] > 0

    page = (path / "report.html").read_text()
    assert f"{results['test_loss']:.4g}"[:4] in page and "data:image/png;base64," in page
    assert 'src="http' not in page and 'href="http' not in page  # one file, readable anywhere
    assert list((path / "figures").glob("*.png")) and list((path / "tensorboard").glob("events.*"))


def test_the_same_command_again_changes_nothing(reference, tmp_path):
    path = copy(reference[0], tmp_path / "again")
    train(path)
    assert_same_end(path, reference)


def test_evaluate_gives_the_numbers_of_the_training_run(reference, tmp_path):
    path = copy(reference[0], tmp_path / "evaluate")
    (path / "results.json").unlink()
    found = run(tiny.config("text", **tiny.CUBE, mode="evaluate"), str(path))
    assert found == without_time(reference[1]) == json.loads((path / "results.json").read_text())
    assert tiny.history(path) == tiny.history(reference[0])


def test_the_average_is_evaluated(reference):
    path, results = reference
    state, e = tiny.state(cube(), path), cube()
    measure = lambda params: e.evaluate_loss(params, state.variables, "test", e.config.eval.test_limit)["loss"]
    assert measure(state.ema) == results["test_loss"]
    assert abs(measure(state.params) - results["test_loss"]) > 1e-3


# ------------------------------------------------------------------------------------------ stop and resume


def test_stopped_many_times_ends_as_if_never_stopped(reference, tmp_path, capfd):
    path = tmp_path / "stopped"
    # Before anything was done; between two log lines; where a checkpoint, an evaluation and a log line
    # fall; the step after; and before the last step.
    for step in (0, 5, 8, 9, 12, 19):
        with sigterm_at(step):
            assert train(path) == {}
        assert f"stopped at step {step} of 20; the checkpoint is saved" in capfd.readouterr().err
        assert (tiny.steps_on_disk(path) or [0])[-1] == step
        assert not (path / "results.json").exists()
    assert train(path)["step"] == tiny.STEPS
    assert_same_end(path, reference)


@pytest.mark.slow
def test_killed_many_times_ends_as_if_never_killed(reference, tmp_path):
    path = tmp_path / "killed"
    for event, most in (
        (("SIGKILL", "step", 6), 4),  # in training; the write of step 4 may be under way or done
        (("SIGKILL", "write", 8), 4),  # the arrays of step 8 are being written
        (("SIGKILL", "digests", 8), 4),  # they are written, but nothing says that they are whole
        (("SIGKILL", "collect", 12), 12),  # step 12 is whole, and the one before it is being deleted
        (("SIGTERM", "step", 17), 17),
        (None, tiny.STEPS),
    ):
        done = subprocess.run(
            tiny.command(path, arg="text", event=event, **tiny.CUBE),
            cwd=tiny.ROOT,
            text=True,
            capture_output=True,
            timeout=300,
        )
        killed = event is not None and event[0] == "SIGKILL"
        assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
        assert "Traceback" not in done.stderr and "damaged" not in done.stderr
        assert max(committed(path), default=0) <= most and (most in committed(path) or event[2] == 6), event
    assert_same_end(path, reference)


def committed(path):
    """Steps of which every file has its digest."""
    return [
        step
        for step in tiny.steps_on_disk(path)
        if (path / "checkpoints" / "digests" / str(step) / "process_0-of-1.json").exists()
    ]


@pytest.mark.parametrize("file", ["largest", "list"])
def test_a_flipped_byte_in_the_newest_checkpoint(reference, tmp_path, caplog, file):
    path = copy(reference[0], tmp_path / "flipped")
    newest = path / "checkpoints" / str(tiny.STEPS)
    if file == "largest":
        victim = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    else:
        victim = path / "checkpoints" / "digests" / str(tiny.STEPS) / "files.json"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert train(path)["step"] == tiny.STEPS
    told = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert len(told) == 1 and f"checkpoint of step {tiny.STEPS}" in told[0] and "moved to" in told[0]
    assert (path / "checkpoints" / "corrupt" / str(tiny.STEPS)).is_dir()
    assert_same_end(path, reference)


@pytest.mark.parametrize("devices, mesh", [(1, {}), (2, {"mesh.fsdp": 2}), (4, {"mesh.tensor": 2})])
def test_a_checkpoint_of_eight_devices_continues_on_fewer(reference, half, tmp_path, devices, mesh):
    path = copy(half, tmp_path / "fewer")
    e = experiment(devices, **mesh)
    train(path, e)
    for leaf in jax.tree.leaves(tiny.state(e, path)):
        assert len(leaf.sharding.device_set) == devices
    found, expected = tiny.losses(path, STOP), tiny.losses(reference[0], STOP)
    assert found.keys() == expected.keys() and len(found) == 6
    worst = max(abs(found[key] - expected[key]) for key in found)
    print(f"largest difference of a loss: {worst:.1e}")
    assert worst < 1e-5
    assert tiny.history(path)[:4] == tiny.history(reference[0])[:4]


def test_workers_and_logging_do_not_change_the_run(reference, tmp_path):
    changes = {"data.workers": 1, "log.every": 7, "log.tensorboard": False}
    run(tiny.config("text", **tiny.CUBE, **changes), str(tmp_path))
    assert tiny.digest(cube(), tmp_path) == tiny.digest(cube(), reference[0])
    lines = [r["step"] for r in tiny.history(tmp_path) if r["split"] == "train"]
    assert lines == [7, 14, 20] and not (tmp_path / "tensorboard").exists()
    validation = lambda path: [r for r in tiny.history(path) if r["split"] == "validation"]
    assert validation(tmp_path) == validation(reference[0])


# ---------------------------------------------------------------------------------- what is kept, and failures


def test_the_newest_and_the_best_are_kept(tmp_path):
    # The loss falls from evaluation to evaluation, so that the largest is that of the first checkpoint.
    # There are checkpoints in between that were not evaluated: none of them can be the best.
    changes = {"eval.every": 6, "checkpoint.every": 3, "checkpoint.keep": 1, "checkpoint.best_mode": "max"}
    config = tiny.config("text", **tiny.CUBE, **changes)
    run(config, str(tmp_path))
    validation = {r["step"]: r["loss"] for r in tiny.history(tmp_path) if r["split"] == "validation"}
    best = max(validation, key=validation.get)
    assert list(validation) == [6, 12, 18, 20] and best < 18
    assert tiny.steps_on_disk(tmp_path) == [best, 20]
    with config.unlocked():
        config.mode, config.eval.checkpoint = "evaluate", "best"
    assert run(config, str(tmp_path))["step"] == best


def test_a_loss_that_is_not_finite_stops_the_run(reference, tmp_path, monkeypatch):
    original = Experiment.train_batches

    def poisoned(self, start):
        with contextlib.closing(original(self, start)) as batches:
            for step, batch in enumerate(batches, start):
                yield {**batch, "loss_mask": batch["loss_mask"] * np.nan} if step == 11 else batch

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "train_batches", poisoned)
        with pytest.raises(
            UserError, match=r"step 11: .*loss.* not finite; last finite metrics \(step 10: .*loss [\d.]+"
        ):
            train(tmp_path)
    assert committed(tmp_path)[-1] == 8 and not (tmp_path / "results.json").exists()
    assert tiny.history(tmp_path) == tiny.history(reference[0])[:4]  # steps 3 and 6, the evaluation at 8, step 9
    assert train(tmp_path)["step"] == tiny.STEPS  # the checkpoint is a good one
    assert_same_end(tmp_path, reference)


def test_frozen_parameters_do_not_move(tmp_path):
    frozen = r"encoders_text/.*|.*/attention/.*"
    e = experiment(**tiny.CUBE, **{"optimizer.frozen": (frozen,), "train.steps": 4})
    before = e.init_state()
    train(tmp_path, e)
    after = tiny.state(e, tmp_path)
    for part in ("params", "ema"):
        old, new = getattr(before, part), getattr(after, part)
        assert tree.digest(new, frozen) == tree.digest(old, frozen)
        moved = [path for path, leaf in tree.flatten(new).items() if not np.array_equal(leaf, tree.flatten(old)[path])]
        assert sorted(moved) == sorted(
            path for path in tree.flatten(old) if not (path.startswith("encoders_text") or "/attention/" in path)
        )


def newest(path):
    return max(committed(path), default=0) if (path / "checkpoints").exists() else 0


@pytest.mark.slow
def test_killed_at_random_moments_as_a_user_runs_it(tmp_path):
    """One device, all optimisations, no compilation cache, and a checkpoint at every step."""
    drop = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    changes = {"train.steps": 100, "checkpoint.every": 1, "eval.every": 30}
    options = dict(cwd=tiny.ROOT, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(tiny.command(tmp_path / "calm", arg="text", **changes), check=True, **options)
    path, rng, last = tmp_path / "killed", random.Random(0), 0
    for _ in range(5):
        with subprocess.Popen(tiny.command(path, arg="text", **changes), **options) as process:
            while process.poll() is None and newest(path) <= last:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        assert process.returncode == -signal.SIGKILL, "it came to the end: more steps are needed"
        last = newest(path)
        print(f"killed; step {last} is the newest that is committed")
    subprocess.run(tiny.command(path, arg="text", **changes), check=True, **options)
    e = Experiment(tiny.config("text", **changes), jax.devices()[:1])
    assert tiny.digest(e, path) == tiny.digest(e, tmp_path / "calm")
    assert tiny.history(path) == tiny.history(tmp_path / "calm")
