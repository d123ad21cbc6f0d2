"""Real processes on this machine: they agree, share checkpoints, and end together."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vfm import distributed
from vfm.errors import UserError

WORKER = Path(__file__).with_name("distributed_worker.py")


class Processes:
    """Real processes of one task, their output collected line by line."""

    def __init__(self, task, directory, count=2, devices=1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        env = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
            "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *sys.path]),
        }
        self.all = []
        for process in range(count):
            command = [sys.executable, WORKER, task, coordinator, count, process, directory]
            self.all.append(
                subprocess.Popen(
                    list(map(str, command)),
                    env=env,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        self.lines = [[] for _ in self.all]
        self.errors = [[] for _ in self.all]
        self.readers = [
            threading.Thread(target=lambda stream=stream, lines=lines: lines.extend(iter(stream.readline, "")))
            for process, out, errors in zip(self.all, self.lines, self.errors)
            for stream, lines in ((process.stdout, out), (process.stderr, errors))
        ]
        for reader in self.readers:
            reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for process in self.all:
            process.kill()
            process.wait()
        for reader in self.readers:
            reader.join()

    def wait_for_step(self, step, seconds=60):
        deadline = time.monotonic() + seconds
        while not all(f"step {step}\n" in lines for lines in self.lines):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.all), self.errors
            time.sleep(0.01)

    def end(self, seconds=60):
        """Exit codes, last lines of output and error texts."""
        codes = [process.wait(seconds) for process in self.all]
        for reader in self.readers:
            reader.join()
        return codes, [lines[-1] if lines else "" for lines in self.lines], ["".join(e) for e in self.errors]


def run(task, directory, **options):
    with Processes(task, directory, **options) as processes:
        codes, last, errors = processes.end()
    assert codes == [0] * len(codes), errors
    assert errors == [""] * len(errors)
    return last


def test_three_processes_gather_and_end_quietly(tmp_path):
    assert run("gather", tmp_path, count=3) == ["done\n"] * 3


def test_save_on_two_processes_restore_on_one_and_on_two(tmp_path):
    run("save", tmp_path, count=2, devices=2)
    assert {path.name for path in (tmp_path / "digests" / "3").iterdir()} == {
        "files.json", "process_0-of-2.json", "process_1-of-2.json"
    }  # fmt: skip
    assert run("restore", tmp_path, count=1, devices=1) == ["restored 3\n"]
    # A flipped byte in a file that either process digests: both go back to the same step.
    for step in (3, 2):
        path = max((tmp_path / str(step) / "state").rglob("*/d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    with Processes("restore", tmp_path, count=2, devices=2) as processes:
        codes, last, errors = processes.end()
    assert codes == [0, 0] and last == ["restored 1\n"] * 2, errors
    assert errors[0].count("is damaged: file state") == 2 and errors[0].count("\n") == 2 and errors[1] == ""


@pytest.mark.parametrize("task", ["collective", "between"])
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_stops_with_one_line(tmp_path, task, victim):
    with Processes(task, tmp_path) as processes:
        processes.wait_for_step(5)
        processes.all[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        codes, _, errors = processes.end(seconds=15)
        assert time.monotonic() - start < 2
    assert codes[1 - victim] == 1
    assert errors[1 - victim] == (
        f"error: process {victim} of 2 ({socket.gethostname()}) stopped; this process stops too; "
        "start the same command again to resume from the last checkpoint\n"
    )


def test_the_one_that_died_is_named_to_all(tmp_path):
    with Processes("between", tmp_path, count=3) as processes:
        processes.wait_for_step(2)
        processes.all[2].send_signal(signal.SIGKILL)
        codes, _, errors = processes.end(seconds=15)
    assert codes[:2] == [1, 1]
    assert all(error.startswith("error: process 2 of 3") and error.count("\n") == 1 for error in errors[:2]), errors


def test_an_exception_in_one_process_is_told_there_and_stops_the_other(tmp_path):
    with Processes("error", tmp_path) as processes:
        codes, _, errors = processes.end(seconds=30)
    assert codes == [1, 1]
    assert errors[1].endswith("RuntimeError: a bug in one process\n") and "stopped" not in errors[1]
    assert errors[0].startswith("error: process 1 of 2") and errors[0].count("\n") == 1


def test_the_same_user_error_is_told_once_by_each(tmp_path):
    with Processes("user_error", tmp_path) as processes:
        codes, _, errors = processes.end(seconds=30)
    assert codes == [2, 2]
    assert errors == ["error: the same mistake in every process\n"] * 2


def test_leaving_with_a_status_stops_the_other(tmp_path):
    with Processes("exit", tmp_path) as processes:
        codes, _, errors = processes.end(seconds=30)
    assert codes == [1, 3]
    assert errors[0].startswith("error: process 1 of 2") and errors[1] == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path, number):
    with Processes("stop", tmp_path) as processes:
        processes.wait_for_step(5)
        processes.all[1].send_signal(number)
        codes, last, errors = processes.end(seconds=30)
    assert codes == [0, 0], errors
    assert last[0] == last[1] and last[0].startswith("stopped ")
    assert run("restore", tmp_path, count=1) == [last[0].replace("stopped", "restored")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1234", 2, None), "must be given together"),
        (("localhost", 2, 0), "host:port"),
        (("localhost:1234", 2, 2), "process_id must be in 0…1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)


def test_one_process_needs_nothing(monkeypatch):
    assert not distributed.initialize()
    assert not distributed.initialize("localhost:1234", 1, 0)
    assert distributed.is_main() and distributed.gather({"a": 1}) == [{"a": 1}]
    distributed.sync("alone")
    distributed.close()


def test_environment_is_detected_only_with_several_processes(monkeypatch):
    assert distributed.detect() is None
    slurm = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0")
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert distributed.detect() is None
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert distributed.detect() == "SLURM"
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # inside an allocation, but not started by srun
    assert distributed.detect() is None
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert distributed.detect() is None
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert distributed.detect() == "GKE with TPU"
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES must be a number"):
        distributed.initialize()
