"""One training step of a GPT-2, CLIP, DiT or VQGAN here and in PyTorch, side by side: the ratio of step times.

    python -m benchmarks.train_step [--model=gpt2 --width=256 --depth=6 --length=256 --batch=8 --steps=10 --rounds=5]
    python -m benchmarks.train_step --model=clip --length=32 --batch=32 [--image=64 --patch=8]
    python -m benchmarks.train_step --model=dit --image=16 --batch=32 [--width=384 --depth=12 --heads=6]
    python -m benchmarks.train_step --model=vqgan --image=32 --width=32 --depth=1 --batch=8

The same weights (written by `transformers`, read by `vfm.interop`), batch, loss, AdamW and fp32 on both sides; the
losses of the first steps are compared before anything is timed. Those of a VQGAN part after a few steps by rounding
alone, since AdamW's first steps are signs of the gradient and codes change by jumps: there loss and gradient norm are
compared at three weights, those of the start and ours after one and two steps. PyTorch runs `transformers`' model with
scaled_dot_product_attention, eager and with torch.compile; the VQGAN (`benchmarks.torch_vqgan`) is eager only. Both
towers of CLIP have the given width, depth and heads. Rounds alternate between the sides, so that other load on the
machine meets both; the median over the rounds is reported, in wall time and in CPU time of the process. Both sides
meet the same allocator: that of runs here (`vfm.allocator`), or with --allocator=system the C library's as it is, which
is PyTorch's usual one. Needs `.[parity]`.
"""

import argparse
import os
import statistics
import tempfile
import time

from benchmarks import torch_dit, torch_vqgan
from vfm.allocator import keep_freed_memory


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2", "clip", "dit", "vqgan"), default="gpt2")
    sizes = {"width": 256, "depth": 6, "heads": 8, "length": 256, "batch": 8, "vocab": 4096, "image": 64, "patch": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("steps", 10), ("rounds", 5), ("threads", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--allocator", choices=("kept", "system"), default="kept")
    return parser.parse_args()


RATE, DECAY = 1e-3, 0.01


def arrays(args) -> dict:
    """The batch: ids [B, T], and for CLIP images [B, 3, H, W]."""
    import numpy as np

    if args.model == "dit":
        return torch_dit.arrays(args)
    rng = np.random.default_rng(0)
    found = {"input_ids": rng.integers(0, args.vocab - 1, (args.batch, args.length))}
    if args.model == "clip":
        found["input_ids"][:, -1] = args.vocab - 1  # the end of the text
        found["pixel_values"] = rng.normal(size=(args.batch, 3, args.image, args.image)).astype(np.float32)
    return found


def theirs(args, batch, compiled: bool):
    """(model with its initial weights, run(steps) -> losses) in PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.model == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=args.vocab, n_embd=args.width, n_layer=args.depth, n_head=args.heads, n_positions=args.length,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).train()
        more = {"labels": torch.as_tensor(batch["input_ids"])}
    elif args.model == "dit":
        model, more = torch_dit.build(args), {}
    else:
        tower = {
            "hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.depth,
            "num_attention_heads": args.heads, "attention_dropout": 0.0,
        }  # fmt: skip
        end = args.vocab - 1
        text = {"vocab_size": args.vocab, "max_position_embeddings": args.length, "eos_token_id": end, **tower}
        config = transformers.CLIPConfig(
            text_config={**text, "bos_token_id": 0, "pad_token_id": end},
            vision_config={"image_size": args.image, "patch_size": args.patch, **tower},
            projection_dim=args.width, attn_implementation="sdpa",
        )  # fmt: skip
        model = transformers.CLIPModel(config).train()
        more = {"return_loss": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    inputs = {name: torch.as_tensor(x) for name, x in batch.items()}
    forward = torch.compile(model) if compiled else model

    def run(steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            found = forward(**inputs, **more)
            loss = found if args.model == "dit" else found.loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [float(loss) for loss in losses]

    return model, run


def ours(args, batch, folder, remat: str):
    """run(steps) -> losses in this project."""
    import numpy as np
    import optax

    from vfm import objectives
    from vfm.interop import huggingface

    tx = optax.adamw(RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=DECAY)
    if args.model == "dit":
        params, loss_fn, batch, learns = torch_dit.ours(folder, batch, remat)
        tx = optax.partition({True: tx, False: optax.set_to_zero()}, learns)
        return steps(params, loss_fn, batch, tx, learns)[0]
    model, variables = huggingface.load(folder, remat=remat)
    ids = batch["input_ids"].astype(np.int32)
    if args.model == "gpt2":
        objective = {"name": "next_token"}
        mask = np.ones(ids.shape, np.float32)
        mask[:, -1] = 0
        batch = {"tokens": ids, "targets": np.roll(ids, -1, axis=1), "loss_mask": mask, "input_mask": mask >= 0}
    else:
        objective = {"name": "contrastive", "pairs": ("image-text",)}
        batch = {"inputs": {"image": batch["pixel_values"].transpose(0, 2, 3, 1)[:, None], "text": ids[:, None]}}
    return steps(variables["params"], objectives.build(objective, model), batch, tx)[0]


def steps(params, loss_fn, batch, tx, trained=None, variables=None):
    """(run(steps) -> losses, function -> (state, what the last step measured))."""
    import jax
    import jax.numpy as jnp

    from vfm.train.state import TrainState
    from vfm.train.step import make_train_step

    batch = jax.tree.map(jnp.asarray, batch)
    step = jax.jit(make_train_step(loss_fn, tx, lambda _: RATE, trained=trained), donate_argnums=0)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), variables or {}, {}, jax.random.key(0))

    measured: dict = {}

    def run(steps):
        nonlocal state, measured
        losses = []
        for _ in range(steps):
            state, measured = step(state, batch)
            losses.append(measured["loss"][0])
        return [float(loss) for loss in losses]

    return run, lambda: (state, measured)


def compare(what: str, found: dict) -> None:
    """Prints numbers {name: [...]}, and ends with an error where they are not those of torch eager."""
    import numpy as np

    for name, numbers in found.items():
        print(f"{name:15s} {what}: {', '.join(f'{x:.5f}' for x in numbers)}")
        if not np.allclose(numbers, found["torch eager"], rtol=1e-4):
            raise SystemExit(f"error: {name} does not train the same model as torch eager")


def transformers_sides(args) -> dict:
    """{name: run(steps) -> losses} of the models of `transformers`, which train alike."""
    batch = arrays(args)
    model, eager = theirs(args, batch, compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        runs = {"torch eager": eager}
        for remat in ("none", "dots"):  # to compute elementwise steps again can be faster than to keep them
            runs[f"vfm remat={remat}"] = ours(args, batch, folder, remat)
    if not args.no_compile:
        runs["torch compile"] = theirs(args, batch, compiled=True)[1]
    compare("losses of the first steps", {name: run(3) for name, run in runs.items()})
    return runs


def vqgan_sides(args) -> dict:
    """{name: run(steps) -> losses} of the VQGAN, which have the same losses and gradient norms at the same weights."""
    import jax
    import optax

    params, variables, loss_fn, images = torch_vqgan.ours(args)
    tx = optax.adamw(RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=DECAY)
    optimizer = {"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": DECAY}
    run, last = steps(params, loss_fn, {"inputs": {"image": images[:, None]}}, tx, variables=variables)
    found: dict[str, list] = {"torch eager": [], "vfm": []}
    for _ in range(3):
        weights = jax.device_get((last()[0].params, last()[0].variables))
        eager, norm = torch_vqgan.theirs(args, *weights, images, optimizer)
        found["torch eager"] += [*eager(1), norm()]
        found["vfm"] += [*run(1), float(last()[1]["grad_norm"][0])]
    compare("loss and gradient norm at three weights", found)
    return {"torch eager": eager, "vfm": run}


def main():
    """Prints the table."""
    args = arguments()
    if args.threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    if args.allocator == "kept":
        keep_freed_memory()
    runs = vqgan_sides(args) if args.model == "vqgan" else transformers_sides(args)
    wall: dict[str, list] = {name: [] for name in runs}
    cpu: dict[str, list] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            run(args.steps)
            wall[name].append((time.perf_counter() - start) / args.steps)
            cpu[name].append((time.process_time() - used) / args.steps)
    base_wall, base_cpu = (statistics.median(times["torch eager"]) for times in (wall, cpu))
    sizes = f"{args.model=} {args.width=} {args.depth=} {args.length=} {args.batch=}"
    print(f"{sizes} fp32, {args.threads} thread(s); medians")
    for name in runs:
        w, c = statistics.median(wall[name]), statistics.median(cpu[name])
        print(
            f"{name:15s} {1e3 * w:8.1f} ms/step ({w / base_wall:.2f} x torch eager; "
            f"{1e3 * min(wall[name]):.1f} to {1e3 * max(wall[name]):.1f})  CPU {1e3 * c:8.1f} ms ({c / base_cpu:.2f} x)"
        )


if __name__ == "__main__":
    main()
