"""The smallest any-to-any config with all five blocks and three modalities, and helpers for tests of whole runs.

As a config file: `--config=tests/tiny.py`, or `tests/tiny.py:text` for a language model alone. As a program it is
`experiments.main` that sends itself a signal on the way: `python -m tests.tiny SIGNAL EVENT STEP FLAGS`.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from configs import common

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 16
SPECIAL = ("<pad>", "<bos>", "<eos>", "<text>", "<image>", "<audio>")
STEPS = 20


def get_config(arg: str = ""):
    """Every dimension divides by 8, but for the 2 key/value heads and the one channel of the image."""
    common.check_variant(arg, "tiny", ("text",))
    block = {"width": WIDTH, "depth": 1, "num_heads": 8, "mlp_dim": 32}
    c = common.base()
    c.tokenizer = {"name": "byte", "special": SPECIAL}
    c.model = {
        "centre": "text",
        "dtype": "float32",
        "encoders": {"text": {"name": "text", "vocab_size": 264, "width": WIDTH}},
        "input_projectors": {},
        "backbone": {
            "name": "decoder_only",
            **block,
            "depth": 2,
            "num_kv_heads": 2,
            "max_len": 16,
            "dropout": 0.0,
            "remat": "none",
        },
        "output_projectors": {},
        "decoders": {"text": {"name": "text", "vocab_size": 264}},
    }
    c.data = {**common.DATA, "length": 16}
    if arg == "text":
        c.objective = {"name": "next_token"}
        c.model.backbone.dropout = 0.1
        c.data.update(name="text", source={"name": "stdlib", "limit": 4})
    else:
        c.objective = {"name": "any_to_any"}
        c.model.encoders.update(
            image={"name": "vit", **block},
            audio={"name": "audio", **block, "num_samples": 256, "n_fft": 128, "hop": 32, "n_mels": 16, "frames": 2},
        )
        c.model.input_projectors.update(
            image={"name": "mlp", "width": WIDTH, "hidden": 32}, audio={"name": "linear", "width": WIDTH}
        )
        c.model.output_projectors.image = {"name": "query", **block, "num_tokens": 4, "num_signals": 2}
        c.model.decoders.image = {"name": "autoencoder", "upsample": (4,), "conv_width": 8}
        c.data.update(
            name="pairs",
            sources={
                "image": {"name": "digits"},
                "audio": {
                    "name": "dtmf",
                    "duration": 0.032,
                    "tone": (0.02, 0.03),
                    "sizes": {"train": 200, "validation": 50, "test": 50},
                },
            },
            words=tuple("abcdefghij"),
            tasks=("image->text", "audio->image", "audio+image+text->text"),
            question="?",
            augment={"image": {"shift": 1}},
        )
    c.train.update(steps=STEPS, batch_size=16, ema=0.9)
    c.optimizer.learning_rate = 3e-3
    c.optimizer.schedule.warmup_steps = 2
    c.optimizer.frozen = ()
    c.eval.update(every=8, limit=16, test_limit=24, batch_size=16)
    c.checkpoint.every = 4
    c.log.every = 3  # divides neither the evaluations nor the checkpoints
    return c


def config(arg: str = "", **changes):
    """The config with changed fields, locked as on the command line: config(**{"train.steps": 3})."""
    c = get_config(arg)
    c.lock()
    c.update_from_flattened_dict(changes)
    return c


CUBE = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}  # data × fsdp × tensor


@contextlib.contextmanager
def quick_compilation():
    """Compiles with few optimisations and into a cache, here and in the processes that are started within."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": _folder(),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in wanted}
    environment = {name.upper(): os.environ.get(name.upper()) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()  # it would not look at the new folder otherwise
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        compilation_cache.reset_cache()


_FOLDERS: list[tempfile.TemporaryDirectory] = []  # one for all test files of the process; deleted at its end


def _folder() -> str:
    if not _FOLDERS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="compiled-"))
    return _FOLDERS[0].name


def history(workdir) -> list[dict]:
    """metrics.jsonl without the fields that differ from one run to the next."""
    from vfm.train.logging import TIME_FIELDS, read_history

    return [
        {k: v for k, v in record.items() if k not in TIME_FIELDS}
        for record in read_history(Path(workdir) / "metrics.jsonl")
    ]


def losses(workdir, after: int = 0) -> dict[tuple[int, str], float]:
    """(step, split) -> loss, of the lines after a step."""
    return {(r["step"], r["split"]): r["loss"] for r in history(workdir) if r["step"] > after}


def steps_on_disk(workdir) -> list[int]:
    """The steps of the checkpoints, sorted."""
    return sorted(int(path.name) for path in (Path(workdir) / "checkpoints").iterdir() if path.name.isdigit())


def state(experiment, workdir):
    """The train state of the newest checkpoint; nothing in the folder is changed."""
    from vfm.train.checkpoint import Checkpointer

    with Checkpointer(Path(workdir) / "checkpoints", read_only=True) as checkpointer:
        return checkpointer.restore(experiment.abstract_state)[0]


def digest(experiment, workdir) -> str:
    """SHA-256 of all that the newest checkpoint says of the model and its optimisation."""
    from vfm import tree

    return tree.digest(state(experiment, workdir))


def command(workdir, *flags, arg: str = "", event: tuple[str, str, int] | None = None, **changes) -> list[str]:
    """The command line of a run; with an event (signal, name, step) it sends itself that signal."""
    program = ["experiments.main"] if event is None else ["tests.tiny", *map(str, event)]
    fields = [f"--config.{name}={value}" for name, value in changes.items()]
    return [sys.executable, "-m", *program, f"--config=tests/tiny.py:{arg}", f"--workdir={workdir}", *fields, *flags]


# ------------------------------------------------------------------------------------ as a program


def send(number: int, event: str, step: int) -> None:
    """Arranges that this process gets a signal at an event of a step:

    step      before the step begins
    write     a checkpoint of this step is being written in the background
    digests   its arrays are written, its digests are not
    collect   it is committed, and an older step is half deleted
    """
    from vfm.train import checkpoint, digests, preemption

    def before(owner, name, act):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            act(*args)
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    def at(found: int) -> None:
        if found == step:
            os.kill(os.getpid(), number)
        elif found > step:
            time.sleep(0.2)  # other processes hear of a signal a few steps later; the steps here are too quick for that

    if event == "step":
        before(preemption.Preemption, "requested", lambda self, found: at(found))
    elif event == "write":
        before(checkpoint.Checkpointer, "_commit", lambda self, found: at(found))
    elif event == "digests":
        before(digests, "write_share", lambda directory, found, *rest: at(found))
    elif event == "collect":

        def deletes(path):
            path = Path(path)
            if path.name.startswith(checkpoint._TRASH) and digests.committed(path.parent, step):
                at(step)

        before(checkpoint.shutil, "rmtree", deletes)
    else:
        raise ValueError(event)


if __name__ == "__main__":
    from experiments import main

    send(signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3]))
    sys.exit(main.cli(sys.argv[4:]))
