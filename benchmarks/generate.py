"""Greedy generation with the cache here and by `transformers.generate`, side by side: tokens/s and their ratio.

    python -m benchmarks.generate [--width=256 --depth=6 --heads=8 --vocab=4096 --prompt=64 --new=128 --batches=1,8]

"vfm" is `generate` as it is called by default; "vfm, scanned" and "vfm, unrolled" are both values of its `unroll`, of
which the default takes one by the size of a layer. The same GPT-2-like model (random weights written by `transformers`,
read by `vfm.interop`), the same prompts, fp32; the tokens of both sides are compared before anything is timed. The
prompt is part of the time, compilation is not. Rounds alternate between the sides, so that other load on the machine
meets both; the medians are reported, in wall time and in CPU time of the process, which is kept on `--threads` cores
(Linux). Exits with status 1 where the default is not ahead in wall time. Needs `.[parity]`.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("width", 256), ("depth", 6), ("heads", 8), ("vocab", 4096), ("prompt", 64), ("new", 128), ("rounds", 5),
        ("threads", os.cpu_count() or 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    return parser.parse_args()


def theirs(args, folder):
    """generate(ids) of `transformers`; writes the model to the folder."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=args.vocab, n_embd=args.width, n_layer=args.depth, n_head=args.heads,
        n_positions=args.prompt + args.new, initializer_range=0.1, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)

    def generate(ids):
        tokens = torch.as_tensor(ids)
        with torch.inference_mode():
            found = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.new, do_sample=False, pad_token_id=0
            )
        return found[:, args.prompt :].numpy()

    return generate


def ours(args, folder):
    """unroll -> generate(ids) of this project."""
    import jax.numpy as jnp
    import numpy as np

    from vfm import generate as generate_lib
    from vfm.interop import huggingface

    model, variables = huggingface.load(folder)

    def generate(ids, unroll):
        batch = {"tokens": jnp.asarray(ids, jnp.int32), "input_mask": jnp.ones(ids.shape, bool)}
        return np.asarray(generate_lib.generate(model, variables, batch, max_new=args.new, eos_id=(), unroll=unroll))

    return lambda unroll: functools.partial(generate, unroll=unroll)


def main() -> int:
    """Prints a line per batch size and side."""
    args = arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        runs = {"transformers": theirs(args, folder)}
        side = ours(args, folder)
        runs |= {"vfm": side(None), "vfm, scanned": side(False), "vfm, unrolled": side(True)}
    behind = False
    print(
        f"{args.width=} {args.depth=} {args.vocab=} {args.prompt=} {args.new=} fp32, {args.threads} thread(s); medians"
    )
    for batch in map(int, args.batches.split(",")):
        ids = np.random.default_rng(0).integers(0, args.vocab, (batch, args.prompt))
        found = {name: run(ids) for name, run in runs.items()}
        for name in runs:
            same = (found[name] == found["transformers"]).mean()
            if same < 0.9:  # rounding may part two sequences where two tokens are almost as good
                raise SystemExit(f"error: only {same:.1%} of the tokens of {name} are those of transformers")
        wall: dict[str, list] = {name: [] for name in runs}
        cpu: dict[str, list] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                start, used = time.perf_counter(), time.process_time()
                run(ids)
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
        tokens = batch * args.new
        base_wall, base_cpu = (statistics.median(times["transformers"]) for times in (wall, cpu))
        for name in runs:
            w, c = statistics.median(wall[name]), statistics.median(cpu[name])
            print(
                f"batch {batch}  {name:13s} {tokens / w:9.1f} tokens/s ({base_wall / w:.2f} x transformers)   "
                f"{tokens / c:9.1f} tokens per CPU-second ({base_cpu / c:.2f} x)"
            )
        behind |= statistics.median(wall["vfm"]) >= base_wall
    return int(behind)


if __name__ == "__main__":
    sys.exit(main())
