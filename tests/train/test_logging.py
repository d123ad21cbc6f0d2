import io
import json
import os
import types

import pytest

from vfm.errors import UserError
from vfm.train import logging
from vfm.train.logging import TIME_FIELDS, Logger, peak_flops


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """What a terminal would show: a carriage return goes back to the start of the line."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = []
            for part in line.split("\r"):
                shown[: len(part)] = part
            lines.append("".join(shown).rstrip())
        return lines


@pytest.fixture
def clock(monkeypatch):
    """time.time() that moves only when told."""
    now = types.SimpleNamespace(value=1000.0)
    monkeypatch.setattr(logging.time, "time", lambda: now.value)
    return now


def make(workdir, start_step=0, **kwargs):
    fields = {"total_steps": 100, "examples_per_step": 8, "tokens_per_step": 800, "tensorboard": False}
    return Logger(workdir, start_step=start_step, **{**fields, "stream": io.StringIO(), **kwargs})


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(workdir):
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in read(workdir)]


def write_run(logger, steps):
    for step in steps:
        logger.log(step, {"loss": 1 / step, "accuracy": step / 100})
        if step % 4 == 0:
            logger.log(step, {"loss": 2 / step}, split="validation")


def test_lines_and_rates(tmp_path, clock):
    logger = make(tmp_path, flops_per_step=1e12, peak_flops=4e12)
    logger.log(1, {"loss": 2.0})
    clock.value += 5.0
    logger.log(11, {"loss": 1.5})
    with logger.paused():
        clock.value += 1000.0
    clock.value += 10.0
    logger.log(21, {"loss": float("nan"), "x": float("inf")})
    logger.log(21, {"loss": 1.25}, split="validation")
    logger.close()
    logger.close()
    first, second, third, fourth = read(tmp_path)
    assert first == {"step": 1, "split": "train", "loss": 2.0, "time": 1000.0}
    assert second == {
        "step": 11, "split": "train", "loss": 1.5, "time": 1005.0, "seconds_per_step": 0.5,
        "examples_per_second": 16.0, "tokens_per_second": 1600.0, "mfu": 0.5,
    }  # fmt: skip
    assert third["loss"] is None and third["x"] is None and third["seconds_per_step"] == 1.0
    assert fourth == {"step": 21, "split": "validation", "loss": 1.25, "time": 2015.0}
    with pytest.raises(ValueError, match="step"):
        logger.log(22, {"step": 1.0})


def test_resume_equals_an_uninterrupted_run(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_run(make(whole), range(1, 21))
    write_run(make(broken), range(1, 16))
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "split": "tra')  # killed in the middle of a write
    write_run(make(broken, start_step=12), range(13, 21))
    assert without_times(broken) == without_times(whole)
    assert not list(broken.glob("*.tmp"))


def test_torn_line_at_the_checkpoint_and_fresh_start(tmp_path):
    write_run(make(tmp_path), range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    make(tmp_path, start_step=3)
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
    make(tmp_path, start_step=0)
    assert read(tmp_path) == []


def test_corrupt_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not a JSON object"):
        make(tmp_path, start_step=2)


def test_terminal_line_is_redrawn_and_not_torn(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    logger = make(tmp_path, stream=stream, flops_per_step=1e12, peak_flops=10e12)
    logger.log(1, {"loss": 123456.0})
    assert stream.screen() == ["step 1/100  1%  loss 1.235e+05"]
    clock.value += 10.0
    logger.log(11, {"loss": 1.5})
    line = "step 11/100  11%  loss 1.5  8 examples/s  800 tokens/s  MFU 10.0%  ETA 1:29"
    assert stream.screen() == [line]
    logger.message("saved")
    assert stream.screen() == ["saved", line]
    clock.value += 0.01
    logger.log(100, {"loss": 0.5})
    logger.close()
    saved, last, empty = stream.screen()
    assert saved == "saved" and last.startswith("step 100/100  100%  loss 0.5") and empty == ""
    assert last.endswith("ETA 0:00")


def test_a_narrow_terminal_does_not_wrap(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    stream = Terminal()
    logger = make(tmp_path, stream=stream)
    logger.log(1, {"loss": 0.123456})
    assert max(map(len, stream.screen())) == 23


def test_plain_stream_gets_a_line_now_and_then(tmp_path, clock):
    stream = io.StringIO()
    logger = make(tmp_path, stream=stream)
    for step in range(1, 101):
        clock.value += 1.0
        logger.log(step, {"loss": 1.0})
    logger.close()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in stream.getvalue().splitlines()]
    assert steps == [*range(1, 101, 5), 100]
    assert "\r" not in stream.getvalue()
    stream.close()
    logger.message("the reader is gone")  # must not raise


def test_tensorboard_events(tmp_path):
    loader = pytest.importorskip("tensorboardX.proto.event_pb2")
    logger = make(tmp_path, tensorboard=True)
    logger.log(1, {"loss": 0.5})
    logger.log(2, {"loss": 0.25}, split="validation")
    logger.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # a TFRecord: length, its CRC, the event, its CRC
        length = int.from_bytes(data[:8], "little")
        events.append(loader.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(1, "train/loss", 0.5), (2, "validation/loss", 0.25)]


def test_other_processes_write_nothing(tmp_path):
    stream = io.StringIO()
    logger = make(tmp_path / "run", is_main=False, tensorboard=True, stream=stream)
    logger.log(1, {"loss": 1.0})
    logger.message("hello")
    with logger.paused():
        pass
    logger.close()
    assert not (tmp_path / "run").exists() and not stream.getvalue()


def test_unwritable_workdir_and_full_disk_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/run: Not a directory"):
        make(tmp_path / "file" / "run")
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    logger = make(tmp_path / "run")
    logger._file.close()
    logger._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left on device"):
        logger.log(1, {"loss": 1.0})


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("cpu", None),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peak_flops(kind, tera):
    expected = None if tera is None else tera * 1e12
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == expected
