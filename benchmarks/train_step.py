"""One training step of a GPT-2-like model here and in PyTorch, side by side: the ratio of step times.

    python -m benchmarks.train_step [--width=256 --depth=6 --length=256 --batch=8 --steps=20 --rounds=5 --threads=2]

The same weights (written by `transformers`, read by `vfm.interop`), batch, loss, AdamW and fp32 on both sides; the two
losses of the first steps are compared before anything is timed. PyTorch runs `transformers`' GPT-2 with
scaled_dot_product_attention, eager and with torch.compile. Rounds alternate between the sides, so that other load on
the machine meets both; the median over the rounds is reported, in wall time and in CPU time of the process. Needs
`.[parity]`.
"""

import argparse
import os
import statistics
import tempfile
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("depth", 6), ("heads", 8), ("length", 256), ("batch", 8), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("steps", 10), ("rounds", 5), ("threads", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args()


RATE, DECAY = 1e-3, 0.01


def theirs(args, ids, compiled: bool):
    """(folder of the initial weights, run(steps) -> losses) in PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=args.vocab, n_embd=args.width, n_layer=args.depth, n_head=args.heads, n_positions=args.length,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    tokens = torch.as_tensor(ids)
    forward = torch.compile(model) if compiled else model

    def run(steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [float(loss) for loss in losses]

    return model, run


def ours(args, ids, folder, remat: str):
    """run(steps) -> losses in this project."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from vfm import objectives
    from vfm.interop import huggingface
    from vfm.train.state import TrainState
    from vfm.train.step import make_train_step

    model, variables = huggingface.load(folder, remat=remat)
    tx = optax.adamw(RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=DECAY)
    step = jax.jit(
        make_train_step(objectives.build({"name": "next_token"}, model), tx, lambda _: RATE), donate_argnums=0
    )
    params = variables["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), {}, {}, jax.random.key(0))
    mask = np.ones(ids.shape, np.float32)
    mask[:, -1] = 0
    batch = {
        "tokens": jnp.asarray(ids, jnp.int32),
        "targets": jnp.asarray(np.roll(ids, -1, axis=1), jnp.int32),
        "loss_mask": jnp.asarray(mask),
        "input_mask": jnp.ones(ids.shape, bool),
    }

    def run(steps):
        nonlocal state
        losses = []
        for _ in range(steps):
            state, measured = step(state, batch)
            losses.append(measured["loss"][0])
        return [float(loss) for loss in losses]

    return run


def main():
    """Prints the table."""
    args = arguments()
    if args.threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    import numpy as np

    ids = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.length))
    model, eager = theirs(args, ids, compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        runs = {"torch eager": eager}
        for remat in ("none", "dots"):  # to compute elementwise steps again can be faster than to keep them
            runs[f"vfm remat={remat}"] = ours(args, ids, folder, remat)
        if not args.no_compile:
            runs["torch compile"] = theirs(args, ids, compiled=True)[1]
        first = {name: run(3) for name, run in runs.items()}
    for name, losses in first.items():
        print(f"{name:15s} losses of the first steps: {', '.join(f'{loss:.5f}' for loss in losses)}")
        if not np.allclose(losses, first["torch eager"], rtol=1e-4):
            raise SystemExit(f"error: {name} does not train the same model as torch eager")
    wall: dict[str, list] = {name: [] for name in runs}
    cpu: dict[str, list] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            run(args.steps)
            wall[name].append((time.perf_counter() - start) / args.steps)
            cpu[name].append((time.process_time() - used) / args.steps)
    base_wall, base_cpu = (statistics.median(times["torch eager"]) for times in (wall, cpu))
    print(f"{args.width=} {args.depth=} {args.length=} {args.batch=} fp32, {args.threads} thread(s); medians")
    for name in runs:
        w, c = statistics.median(wall[name]), statistics.median(cpu[name])
        print(
            f"{name:15s} {1e3 * w:8.1f} ms/step ({w / base_wall:.2f} x torch eager; "
            f"{1e3 * min(wall[name]):.1f} to {1e3 * max(wall[name]):.1f})  CPU {1e3 * c:8.1f} ms ({c / base_cpu:.2f} x)"
        )


if __name__ == "__main__":
    main()
