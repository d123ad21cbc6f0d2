"""metrics.jsonl, TensorBoard events and the live progress line of a run."""

import contextlib
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from vfm.errors import UserError

# The fields of a line of metrics.jsonl that differ from one run to the next, all else equal.
TIME_FIELDS = ("time", "seconds_per_step", "examples_per_second", "tokens_per_second", "mfu")
# On a stream that is no terminal, seconds between two progress lines.
PLAIN_INTERVAL = 5.0

# Peak dense bf16 FLOP/s of one JAX device, by `device_kind`. The first row that matches wins. Nvidia's data
# sheets quote most values with 2:4 sparsity; these are the dense halves.
PEAK_FLOPS = (
    # Google Cloud TPU documentation, "peak compute per chip". A JAX device of v2, v3 and TPU7x is half a
    # chip.
    (r"TPU v2", 45e12 / 2),
    (r"TPU v3", 123e12 / 2),
    (r"TPU v4 lite", 138e12),
    (r"TPU v4", 275e12),
    (r"TPU v5( lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6( lite|e)", 918e12),
    (r"TPU7x?", 2307e12 / 2),
    # Nvidia A100 data sheet (all forms); A10 and A30 data sheets; L4, L40 and L40S data sheets.
    (r".*\bA100\b.*", 312e12),
    (r".*\bA30\b.*", 165e12),
    (r".*\bA10\b.*", 125e12),
    (r".*\bL40S\b.*", 362e12),
    (r".*\bL40\b.*", 181e12),
    (r".*\bL4\b.*", 121e12),
    # Nvidia H100 data sheet (PCIe, NVL, SXM), H200 data sheet (NVL, SXM), GH200 data sheet.
    (r".*\bH100\b.*PCIe.*", 756e12),
    (r".*\bH100\b.*NVL.*", 835e12),
    (r".*\bH100\b.*", 989e12),
    (r".*\bH200\b.*NVL.*", 835e12),
    (r".*\bG?H200\b.*", 989e12),
    # Nvidia HGX B200 and GB200 NVL72 data sheets, per GPU.
    (r".*\bGB200\b.*", 2500e12),
    (r".*\bB200\b.*", 2250e12),
    # AMD Instinct MI300X data sheet.
    (r".*\bMI300X\b.*", 1307e12),
)


def peak_flops(device) -> float | None:
    """Peak dense bf16 FLOP/s of one JAX device; None for CPUs and for accelerators that the table does not
    know."""
    for pattern, value in PEAK_FLOPS:
        if re.fullmatch(pattern, device.device_kind, re.IGNORECASE):
            return value
    return None


class Logger:
    """Writes `workdir/metrics.jsonl` and `workdir/tensorboard/`, and shows the progress of a run.

    A line of metrics.jsonl is `{"step": 20, "split": "train", "loss": 1.5, …}` and the TIME_FIELDS that
    apply. A value that is not finite is written as null, since JSON has no other word for it.

    Args:
      workdir: folder of the run, made if need be.
      start_step: steps that were done before (0: a fresh run). Lines of later steps, and a last line that was
        torn by a crash, are removed, so that the file of a resumed run is that of an uninterrupted one but
        for TIME_FIELDS. With 0 all lines are removed. Lines of `start_step` itself stay: log them before its
        checkpoint is written, and do not log them again.
      total_steps: train.steps.
      examples_per_step, tokens_per_step: of the global batch.
      flops_per_step: FLOPs of a whole training step on all devices.
      peak_flops: FLOP/s of all devices together. With both, MFU (model FLOPs utilisation, PaLM,
        arXiv:2204.02311, appendix B) is logged.
      tensorboard: also write TensorBoard events.
      is_main: only one process writes; on the others every method does nothing.
      stream: where the progress goes. On a terminal one line is redrawn; elsewhere a line comes now and then.

    Raises UserError, here and in every method, when the workdir cannot be written or the disk is full, and
    when metrics.jsonl is corrupt.
    """

    def __init__(
        self,
        workdir,
        *,
        start_step: int,
        total_steps: int,
        examples_per_step: float,
        tokens_per_step: float,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        tensorboard: bool = True,
        is_main: bool = True,
        stream=None,
    ):
        self._is_main = is_main
        if not is_main:
            return
        self._total_steps = total_steps
        self._per_step = {"examples_per_second": examples_per_step, "tokens_per_second": tokens_per_step}
        if flops_per_step and peak_flops:
            self._per_step["mfu"] = flops_per_step / peak_flops
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._progress = ""  # the progress line on the terminal now
        self._last_plain = -math.inf
        self._last = None  # (step, time) of the latest train line
        self._first = None  # (step, time) of the first one, when everything is compiled
        self._path = Path(workdir) / "metrics.jsonl"
        self._writer = None
        with _writing(workdir):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        _trim(self._path, start_step)
        with _writing(self._path):
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            from tensorboardX import SummaryWriter

            folder = Path(workdir) / "tensorboard"
            with _writing(folder):
                # purge_step makes TensorBoard hide the events that the trimmed lines left behind.
                self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)

    def log(self, step: int, metrics: Mapping[str, float], split: str = "train") -> None:
        """Appends one line. `step` counts finished steps. The split "train" also moves the progress line."""
        if not self._is_main:
            return
        now = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        if reserved := {"step", "split", *TIME_FIELDS} & set(values):
            raise ValueError(f"metrics may not be named {', '.join(sorted(reserved))}")
        times = {"time": round(now, 3)}
        if split == "train":
            times |= self._rates(step, now)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _writing(self._path):
            # One write of one line, so that a crash can tear the last line only.
            record = {"step": step, "split": split, **finite, **times}
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._writer is not None:
            with _writing(self._path.parent / "tensorboard"):
                shown = values | {name: times[name] for name in self._per_step if name in times}
                for name, value in shown.items():
                    self._writer.add_scalar(f"{split}/{name}", value, step, walltime=now)
        if split == "train":
            self._show(step, values, times, now)

    def message(self, text: str) -> None:
        """Prints a line of text without tearing the progress line."""
        if not self._is_main:
            return
        progress = self._progress
        self._erase()
        self._print(f"{text}\n")
        if progress:
            self._draw(progress)

    @contextlib.contextmanager
    def paused(self):
        """Time inside (evaluation, checkpoints) does not count for steps, examples and tokens per second."""
        begin = time.time()
        try:
            yield
        finally:
            if self._is_main and self._last:
                self._last = (self._last[0], self._last[1] + time.time() - begin)

    def close(self) -> None:
        """Ends the progress line and closes the files. May be called twice."""
        if not self._is_main:
            return
        if self._progress:
            self._print("\n")
            self._progress = ""
        with _writing(self._path):
            self._file.close()
        if self._writer is not None:
            with _writing(self._path.parent / "tensorboard"):
                self._writer.close()
            self._writer = None

    def _rates(self, step: int, now: float) -> dict[str, float]:
        last, self._last = self._last, (step, now)
        if self._first is None:
            self._first = (step, now)
        if last is None or step <= last[0]:
            return {}
        seconds = max((now - last[1]) / (step - last[0]), 1e-9)
        # Four digits: times are not exact, and the file stays readable.
        rates = {"seconds_per_step": seconds, **{name: n / seconds for name, n in self._per_step.items()}}
        return {name: float(f"{value:.4g}") for name, value in rates.items()}

    def _show(self, step: int, values: Mapping[str, float], times: Mapping[str, float], now: float) -> None:
        ends = step >= self._total_steps
        if not (self._is_terminal or ends or now - self._last_plain >= PLAIN_INTERVAL):
            return
        parts = [f"step {step}/{self._total_steps}", f"{100 * step // max(self._total_steps, 1)}%"]
        if "loss" in values:
            parts.append(f"loss {values['loss']:.4g}")
        if "examples_per_second" in times:
            parts.append(f"{_short(times['examples_per_second'])} examples/s")
            parts.append(f"{_short(times['tokens_per_second'])} tokens/s")
        if "mfu" in times:
            parts.append(f"MFU {100 * times['mfu']:.1f}%")
        if step > self._first[0]:
            left = (now - self._first[1]) / (step - self._first[0]) * max(self._total_steps - step, 0)
            parts.append(f"ETA {_clock(left)}")
        line = "  ".join(parts)
        if self._is_terminal:
            self._erase()
            self._draw(line)
        else:
            self._last_plain = now
            self._print(line + "\n")

    def _draw(self, line: str) -> None:
        # A line that wraps could not be redrawn.
        self._progress = line[: max(shutil.get_terminal_size().columns - 1, 20)]
        self._print(self._progress)

    def _erase(self) -> None:
        if self._progress:
            self._print("\r" + " " * len(self._progress) + "\r")
            self._progress = ""

    def _print(self, text: str) -> None:
        # A reader of the progress that has gone away (a closed pipe) must not end a run.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def read_history(path) -> list[dict]:
    """The lines of a metrics.jsonl in order. A last line that a crash has torn is left out.

    Raises UserError for a file that cannot be read and for any other line that is not a JSON object with a
    step.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                message = f"{path} line {number} is not a JSON object with a step; mend or remove the file"
                raise UserError(message) from None
        else:
            records.append(record)
    return records


def write_atomic(path, data: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")  # others may write it too
    with _writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _trim(path: Path, start_step: int) -> None:
    """Drops the lines after `start_step` and a torn last line."""
    if path.exists():
        kept = [record for record in read_history(path) if start_step and record["step"] <= start_step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
