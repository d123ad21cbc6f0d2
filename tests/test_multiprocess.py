"""Training in two real processes of this machine: the same curves and checkpoints, and ends that can be resumed."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import jax
import pytest

from tests import tiny
from vfm import run as run_lib
from vfm.experiment import Experiment
from vfm.train.preemption import Preemption

KILLED, STOPPED = 6, 9  # steps; a checkpoint is written every 4


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


class Pair:
    """Two processes of one command line, one device each."""

    def __init__(self, workdir, events=(None, None), arg="text", by_environment=False):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        self.workdir, self.all = workdir, []
        for process, event in enumerate(events):
            env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
            fields = {"coordinator": coordinator, "num_processes": 2, "process_id": process}
            if by_environment:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": coordinator,
                    "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": str(process),
                }
                fields = {}
            command = tiny.command(
                workdir, arg=arg, event=event, **{f"distributed.{name}": value for name, value in fields.items()}
            )
            # Files, not pipes: nobody has to read them for the processes to go on.
            files = [open(workdir.with_name(f"{workdir.name}.{kind}{process}"), "w+") for kind in ("out", "err")]  # noqa: SIM115
            self.all.append(subprocess.Popen(command, cwd=tiny.ROOT, env=env, stdout=files[0], stderr=files[1]))
            self.all[-1].files = files

    def end(self, seconds=300):
        """[(exit status, standard output, standard error)] of the two."""
        try:
            codes = [process.wait(seconds) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
                process.wait()
        found = []
        for code, process in zip(codes, self.all):
            texts = []
            for file in process.files:
                file.seek(0)
                texts.append(file.read())
                file.close()
            found.append((code, *texts))
        return found


def finish(workdir, **options):
    """Runs to the end; returns the output of process 0."""
    (first, out, errors), (second, other, other_errors) = Pair(workdir, **options).end()
    assert (first, second) == (0, 0), errors + other_errors
    assert "Traceback" not in errors + other_errors
    assert all(line.startswith("[Gloo]") for line in other.splitlines())  # process 0 speaks for all
    assert "on 2 device(s), mesh {'data': 2}" in errors and f"wrote {workdir / 'results.json'}" in out
    return errors


@functools.cache
def one_device(arg="text"):
    return Experiment(tiny.config(arg), jax.devices()[:1])


def alone(path, arg="text", stop=None):
    """Trains in this process, on one device; until a step, if one is given."""
    path.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preemption, "requested", lambda self, step: step == stop)
        run_lib.train(one_device(arg), path)
    return path


def assert_same_curve(path, other, limit, after=0):
    found, expected = tiny.losses(path, after), tiny.losses(other, after)
    assert found.keys() == expected.keys() and len(found) > 1
    worst = max(abs(found[key] - expected[key]) for key in found)
    print(f"largest difference of a loss: {worst:.1e}")
    assert worst < limit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The folder of a run in two processes."""
    finish(folder / "undisturbed")
    return folder / "undisturbed"


def assert_same_run(pair, single):
    assert_same_curve(pair, single, 1e-4)
    results = [json.loads((path / "results.json").read_text()) for path in (pair, single)]
    assert results[0].keys() == results[1].keys()
    assert all(abs(results[0][name] - results[1][name]) < 1e-4 for name in results[0] if name != "train_seconds")


def test_loss_curve_is_that_of_one_process(undisturbed, tmp_path):
    assert_same_run(undisturbed, alone(tmp_path / "single"))
    # Each process holds a share of the digests.
    shares = {path.name for path in (undisturbed / "checkpoints" / "digests" / "20").iterdir()}
    assert shares == {"files.json", "process_0-of-2.json", "process_1-of-2.json"}


@pytest.mark.slow
def test_loss_curve_of_three_modalities_is_that_of_one_process(tmp_path):
    finish(tmp_path / "pair", arg="")
    assert_same_run(tmp_path / "pair", alone(tmp_path / "single", arg=""))


@pytest.fixture(scope="module")
def killed(folder):
    """A folder, what its process 0 gave when process 1 was killed, and the seconds in between."""
    pair = Pair(folder / "killed", (None, ("SIGKILL", "step", KILLED)))
    assert pair.all[1].wait(300) == -signal.SIGKILL
    begin = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        pair.all[0].wait(60)
    seconds = time.monotonic() - begin
    return folder / "killed", pair.end()[0], seconds


@pytest.fixture(scope="module")
def stopped(killed, folder):
    """The same command again, now with a SIGTERM to process 0: the folder, and what both processes gave."""
    path = shutil.copytree(killed[0], folder / "stopped")
    return path, Pair(path, (("SIGTERM", "step", STOPPED), None)).end()


def test_when_one_is_killed_the_other_ends_with_one_line(killed):
    _, (code, _, errors), seconds = killed
    print(f"the other one ended after {seconds:.2f} s")
    assert code == 1 and seconds < 15
    assert errors.endswith(
        f"error: process 1 of 2 ({socket.gethostname()}) stopped; this process stops too; "
        "start the same command again to resume from the last checkpoint\n"
    )
    assert errors.count("error") == 1 and "Traceback" not in errors


def test_sigterm_to_one_stops_both_at_one_step(stopped):
    path, ((first, _, errors), (second, _, other)) = stopped
    assert (first, second) == (0, 0), errors + other
    # The write of step 4 may have been cut by the kill.
    assert "resuming at step 4 of 20" in errors or "training 20 steps" in errors
    step = tiny.steps_on_disk(path)[-1]
    told = f"stopped at step {step} of 20; the checkpoint is saved, and the same command resumes\n"
    assert STOPPED <= step < tiny.STEPS
    assert errors.endswith(told) and other.endswith(told) and "Traceback" not in errors + other


def test_killed_and_stopped_ends_as_if_undisturbed(undisturbed, stopped, tmp_path):
    path = shutil.copytree(stopped[0], tmp_path / "finished")
    assert f"resuming at step {tiny.steps_on_disk(path)[-1]} of 20" in finish(path, by_environment=True)
    assert tiny.digest(one_device(), path) == tiny.digest(one_device(), undisturbed)
    assert tiny.history(path) == tiny.history(undisturbed)


def test_a_checkpoint_of_two_processes_continues_in_one(undisturbed, stopped, tmp_path):
    path = shutil.copytree(stopped[0], tmp_path / "two-then-one")
    step = tiny.steps_on_disk(path)[-1]
    alone(path)
    assert_same_curve(path, undisturbed, 1e-5, after=step)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_continues_in_two(undisturbed, tmp_path):
    path = alone(tmp_path / "one-then-two", stop=STOPPED)
    assert f"resuming at step {STOPPED} of 20" in finish(path)
    assert_same_curve(path, undisturbed, 1e-5, after=STOPPED)
