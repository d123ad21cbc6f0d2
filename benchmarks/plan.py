"""Planned time and memory of a training step against measured ones: `python -m benchmarks.plan [CASE ...]`.

Each case of CASES is a config with changes. A fresh process plans it (`config.mode=plan`, with the default utilisation
of `vfm/budget.py`), compiles its training step, fills state and batch, and takes REPETITIONS steps. Prints a table in
Markdown: seconds per step (median) and bytes, planned and measured, and their ratio. Exits with status 1 if the
planned memory of a case is off by more than LIMIT.

Memory is measured on GPU and TPU by the allocator's peak. On CPU it is the growth of the process's resident memory from
before the state is made, when everything is compiled, to its peak in the steps (VmHWM of Linux, reset after the state
is made); the batch holds zeros and ones.
"""

import contextlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPETITIONS = 5
LIMIT = 0.15
CASES = {  # name: (config, variant, changes)
    "lm, remat dots": ("lm", "", {"train.batch_size": 8}),
    "lm, no remat": ("lm", "", {"train.batch_size": 8, "model.backbone.remat": "none"}),
    "lm, full remat, accumulated": ("lm", "", {"train.accumulate": 2, "model.backbone.remat": "full"}),
    "GPT-2 style bytes": ("lm", "bytes", {"train.batch_size": 4, "model.backbone.width": 512,
                                          "model.encoders.text.width": 512, "model.backbone.mlp_dim": 1024}),
    "any-to-any, EMA": ("digits", "", {"train.batch_size": 256}),
    "VAE": ("vae", "", {"train.batch_size": 1024}),
}  # fmt: skip


def case(name: str) -> dict[str, float]:
    """Plans and measures one case in this process."""
    from vfm.allocator import keep_freed_memory

    keep_freed_memory()  # as runs do, and before JAX starts threads

    import jax
    import numpy as np

    from vfm import budget
    from vfm import plan as planner
    from vfm.experiment import Experiment

    config, variant, changes = CASES[name]
    c = importlib.import_module(f"configs.{config}").get_config(variant)
    c.update_from_flattened_dict(changes)
    cpu = jax.default_backend() == "cpu"
    c.plan.utilisation = budget.UTILISATION["cpu" if cpu else "accelerator"]
    experiment = Experiment(c)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        found = planner.plan(experiment, Path(folder))
    abstract = planner.abstract_batch(experiment)
    with experiment.use_mesh():
        step = experiment.train_step.trace(experiment.abstract_state, abstract).lower().compile()
        init = jax.jit(experiment.create, out_shardings=experiment.shardings).lower().compile()
        filled = lambda x: np.zeros(x.shape, x.dtype) if x.dtype.kind == "i" else np.ones(x.shape, x.dtype)
        host = jax.tree.map(filled, abstract)
        before = _resident("VmRSS")
        state = jax.block_until_ready(init())
        batch = jax.device_put(host, jax.tree.map(lambda x: x.sharding, abstract))
        if cpu:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        times = []
        for _ in range(REPETITIONS + 1):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
    memory = _resident("VmHWM") - before if cpu else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return {
        "planned_seconds": found["budget.step_seconds"],
        "seconds": statistics.median(times[1:]),
        "planned_bytes": found["memory.total"],
        "bytes": memory,
        "rate": found["flops.executed"] / statistics.median(times[1:]),
    }


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> int:
    """Prints the table."""
    if len(sys.argv) == 3 and sys.argv[1] == "--case":
        print(json.dumps(case(sys.argv[2])))
        return 0
    names = sys.argv[1:] or list(CASES)
    if wrong := [name for name in names if name not in CASES]:
        print(f"error: unknown case {wrong[0]!r}; known: {', '.join(CASES)}", file=sys.stderr)
        return 2
    print("| case | s/step planned | measured | ratio | GFLOP/s | MiB planned | measured | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = False
    for name in names:
        command = [sys.executable, "-m", "benchmarks.plan", "--case", name]
        done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        time_ratio = found["planned_seconds"] / found["seconds"]
        ratio = found["planned_bytes"] / found["bytes"]
        failed |= abs(ratio - 1) > LIMIT
        cells = (
            name, f"{found['planned_seconds']:.3g}", f"{found['seconds']:.3g}", f"{time_ratio:.2f}",
            f"{found['rate'] / 1e9:.1f}", f"{found['planned_bytes'] / 2**20:.0f}", f"{found['bytes'] / 2**20:.0f}",
            f"{ratio:.2f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
