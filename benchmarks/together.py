"""Runs of one shape trained in one program (`vfm/train/together.py`) against one after the other.

    python -m benchmarks.together [--widths=16,32,64,128 --depth=2 --length=64 --batch=16 --runs=1,4,8 --rounds=5]

A byte-level language model; the time of one step of one run, median over rounds, in wall time and in CPU time of the
process, and the ratio to a run that is alone: above 1, together is faster. Prints a table in Markdown.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from configs import lm
from experiments.records import markdown
from vfm import tree
from vfm.experiment import Experiment


def config(width: int, args):
    c = lm.get_config("bytes")
    c.data.length = args.length
    c.model.encoders.text.width = width
    c.model.backbone.update(width=width, depth=args.depth, mlp_dim=2 * width, max_len=args.length)
    c.train.batch_size = args.batch
    return c


def measure(experiment: Experiment, count: int, args) -> tuple[float, float]:
    """Seconds (wall, CPU) of a step of one of `count` runs."""
    batches = experiment.train_batches(0)
    batch = next(batches)
    batches.close()
    stack = lambda leaf: jnp.stack([leaf] * count)
    state, batch = jax.tree.map(stack, experiment.init_state()), jax.tree.map(stack, batch)
    step = experiment.jit(jax.vmap(experiment.make_step(experiment.loss_fn)), donate_argnums=0)
    for _ in range(2):  # compiles; then once more, for the shardings of its own results
        state, measured = step(state, batch)
    jax.block_until_ready(measured)
    found, steps = [], max(2, 20 // count)
    for _ in range(args.rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            state, measured = step(state, batch)
        jax.block_until_ready((state, measured))
        found.append(
            [(now - then) / steps / count for now, then in ((time.perf_counter(), wall), (time.process_time(), cpu))]
        )
    return tuple(statistics.median(column) for column in zip(*found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: tuple(map(int, text.split(",")))
    parser.add_argument("--widths", type=numbers, default=(16, 32, 64, 128))
    parser.add_argument("--runs", type=numbers, default=(1, 4, 8))
    for name, default in {"depth": 2, "length": 64, "batch": 16, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rows = []
    for width in args.widths:
        experiment = Experiment(config(width, args))
        alone = measure(experiment, 1, args)
        for count in args.runs:
            wall, cpu = alone if count == 1 else measure(experiment, count, args)
            rows.append(
                {
                    "width": width,
                    "parameters": tree.count(experiment.abstract_state.params),
                    "runs": count,
                    "ms a step of one run": wall * 1e3,
                    "wall ×": alone[0] / wall,
                    "CPU ×": alone[1] / cpu,
                }
            )
    print(f"{jax.device_count()} × {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
