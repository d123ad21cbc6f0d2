"""Task families told in natural language: how well are new ones solved, the more there are in training?

    python -m experiments.study --config=configs/task_families.py --workdir=runs/task_families   the study
    python -m experiments.main --config=configs/task_families.py --workdir=runs/families         one model of it

    configs/task_families.py            16 families in training, instructions given
    configs/task_families.py:wide       all steps that there are, up to 128 families in training; a size for a GPU
    configs/task_families.py:smoke      a few steps, of two models

By flags: --config.data.source.families=4 trains on so many, --config.data.source.draw=1 on others, and
--config.data.source.instruction=withheld (shuffled) without being told what to do.
"""

from ml_collections import ConfigDict

from configs import common
from vfm.backbones.decoder_only import LLAMA

SPECIAL = ("<pad>", "<bos>", "<eos>")
VOCABULARY, LENGTH = 256 + len(SPECIAL), 52


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "task_families", ("smoke", "wide"))
    c = common.base()
    c.title = "Task families: instructions for new tasks, by the number of tasks in training"
    c.study = {**common.STUDY, "module": "experiments.task_families", "families": (1, 2, 4, 8, 16), "draws": 5}
    c.study.update(controls=("withheld",), control_draws=2)
    c.tokenizer = {"name": "byte", "special": SPECIAL}
    c.model = model(width=64, depth=3, num_heads=4)
    c.objective = {"name": "next_token"}
    c.data = {**common.DATA, "name": "questions", "length": LENGTH, "source": source()}
    c.train.update(steps=450, batch_size=32)
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.1)
    c.optimizer.schedule.warmup_steps = 50
    c.eval.update(every=0, evaluators=("answers",), batch_size=200)
    # Beside the test split, the families held out: new words for those trained on, and tasks of other kinds.
    c.eval.answers = {"generate": False, "prompts": {"trained": {"split": "validation"}}}
    c.eval.answers.prompts.unrelated = {"split": "unrelated"}
    c.checkpoint.update(every=0, keep_best=0)
    if arg == "wide":
        wide(c)
    if arg == "smoke":
        c.study.update(families=(1, 4), draws=1, controls=())
        c.model = model(width=16, depth=1, num_heads=2)
        c.data.source.sizes = {"train": 200, "validation": 40, "test": 40, "unrelated": 40}
        c.train.update(steps=6, batch_size=8)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=40, batch_size=40)
        c.log.every = 2
    return c


def source() -> dict:
    """Three orders, three changes, two starts and two ends, where one of each is to leave things as they are; at most
    three steps: 32 families."""
    return {
        "name": "task_families",
        "orders": ("copy", "reverse", "rotate"),
        "changes": ("uppercase", "numbers"),
        "starts": ("star",),
        "ends": ("dot",),
        "most_steps": 3,
        "families": 16,
        "held_out": 8,
        "draw": 0,
        "lengths": (4, 4),
        "instruction": "given",
        "sizes": {"train": 20_000, "validation": 800, "test": 800, "unrelated": 800},
    }


def model(width: int, depth: int, num_heads: int, length: int = LENGTH) -> dict:
    layers = {"depth": depth, "num_heads": num_heads, "mlp_dim": 4 * width, "norm_position": "pre", **LLAMA}
    return {
        "centre": "text",
        "dtype": "float32",
        "encoders": {"text": {"name": "text", "vocab_size": VOCABULARY, "width": width}},
        "backbone": {"name": "decoder_only", "width": width, "max_len": length, **layers, "gated": False},
        "decoders": {"text": {"name": "text", "vocab_size": VOCABULARY}},
    }


def wide(c: ConfigDict) -> None:
    c.title += "; all steps"
    c.study.update(families=(1, 4, 16, 64, 128), draws=3)
    c.data.length = 64
    c.model = model(width=384, depth=6, num_heads=6, length=c.data.length)
    c.data.source.update(orders=(), changes=(), starts=(), ends=(), families=128, held_out=32, lengths=(4, 6))
    c.data.source.sizes = {"train": 100_000, "validation": 2000, "test": 2000, "unrelated": 2000}
    c.train.update(steps=5000, batch_size=256)
    c.optimizer.update(learning_rate=1e-3)
    c.optimizer.schedule.warmup_steps = 200
