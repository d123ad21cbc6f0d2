"""Compile time of a train step by depth: `python -m benchmarks.compile_time`.

A scanned stack has one body, so 24 layers must compile in about the time of 4. Prints the medians, in seconds, of
tracing and lowering, of compiling, and of both together; exits with status 1 if the ratio of the totals is above LIMIT.
"""

import statistics
import sys
import time

import jax
import optax

from vfm import model as model_lib
from vfm import objectives
from vfm.backbones.decoder_only import LLAMA
from vfm.train import state as state_lib
from vfm.train import step

DEPTHS = (4, 24)
LIMIT = 1.3
REPETITIONS = 5
LENGTH, BATCH, VOCAB_SIZE, WIDTH = 128, 8, 1024, 128


def times(depth: int) -> tuple[float, float]:
    """Seconds to trace and lower, and to compile, the train step of a language model with `depth` layers."""
    text = {"vocab_size": VOCAB_SIZE, "width": WIDTH}
    model = model_lib.build({
        "centre": "text",
        "encoders": {"text": {"name": "text", **text}},
        "backbone": {"name": "decoder_only", **LLAMA, "width": WIDTH, "depth": depth, "num_heads": 4,
                     "mlp_dim": 4 * WIDTH, "max_len": LENGTH},
        "decoders": {"text": {"name": "text", "vocab_size": VOCAB_SIZE}},
    })  # fmt: skip
    tx = optax.adamw(1e-3)
    train_step = step.make_train_step(objectives.build({"name": "next_token"}, model), tx, lambda step: 1e-3)
    state = jax.eval_shape(lambda: state_lib.create(model, tx, seed=0, length=LENGTH, ema=False))
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), "int32")
    batch = {"tokens": ids, "targets": ids, "loss_mask": jax.ShapeDtypeStruct(ids.shape, "float32")}
    jax.clear_caches()
    began = time.perf_counter()
    lowered = jax.jit(train_step, donate_argnums=0).lower(state, batch)
    middle = time.perf_counter()
    lowered.compile()
    return middle - began, time.perf_counter() - middle


def main() -> int:
    jax.config.update("jax_enable_compilation_cache", False)
    times(DEPTHS[0])  # the first compilation in a process pays for loading the compiler
    found = {depth: [] for depth in DEPTHS}
    for _ in range(REPETITIONS):  # in turn, so that other load on the machine falls on both
        for depth in DEPTHS:
            found[depth].append(times(depth))
    total = {}
    print(f"{'layers':>6} {'lower':>8} {'compile':>8} {'total':>8}")
    for depth, pairs in found.items():
        lower, compiled = (statistics.median(column) for column in zip(*pairs))
        total[depth] = statistics.median(map(sum, pairs))
        print(f"{depth:>6} {lower:>8.2f} {compiled:>8.2f} {total[depth]:>8.2f}")
    ratio = total[DEPTHS[-1]] / total[DEPTHS[0]]
    print(f"{DEPTHS[-1]} layers / {DEPTHS[0]} layers = {ratio:.2f} (limit {LIMIT})")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
