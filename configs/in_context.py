"""In-context learning from scratch: one model of the study `experiments/in_context.py`, or all of them.

python -m experiments.study --config=configs/in_context.py --workdir=runs/induction   the study
python -m experiments.main --config=configs/in_context.py --workdir=runs/one          one of its models

configs/in_context.py             blocks of random tokens that come twice; attention alone, one layer against two
configs/in_context.py:lookup      pairs of keys and values, then keys: the same models
configs/in_context.py:functions   examples of a function, another one in every sequence
configs/in_context.py:smoke       a few steps of the first
"""

from ml_collections import ConfigDict

from configs import common

WIDTH, SYMBOLS = 64, 32
EVERY = 20  # steps between two evaluations


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "in_context", ("smoke", "lookup", "functions"))
    c = common.base()
    c.title = "In-context learning: induction"
    study = {"module": "experiments.in_context", "task": "induction", "schemes": (), "seeds": 3, "variation_seeds": 1}
    c.study = {**common.STUDY, **study}
    c.tokenizer = {"name": "symbols", "numbers": SYMBOLS, "separator": " "}
    c.model = {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": SYMBOLS + 3, "width": WIDTH}},
        "backbone": {
            "name": "decoder_only",
            "width": WIDTH,
            "depth": 2,
            "num_heads": 2,
            "arrangement": "attention_only",
            "mlp_dim": 128,
            "max_len": 96,
        },
        "decoders": {"text": {"name": "text", "vocab_size": SYMBOLS + 3}},
    }
    c.objective = {"name": "next_token"}
    source = {"name": "repeated", "block": 48, "least": 24, "copies": 2, "symbols": SYMBOLS}
    c.data = {"name": "in_context", "length": 96, "source": source, "loss": "all", **common.DATA}
    c.train.update(steps=800, batch_size=32)
    c.optimizer.update(learning_rate=3e-3)
    c.optimizer.schedule.warmup_steps = 50
    c.eval.update(every=EVERY, limit=64, test_limit=512, batch_size=64, evaluators=("in_context", "course"))
    c.eval.in_context = {"early": (0.25, 0.5), "late": (0.75, 1.0), "parts": 12, "beside": ""}
    c.eval.course = course(late_loss={"at_most": 0.3}, icl_score={"at_most": -1.0}, induction_score={"at_least": 0.4})
    c.checkpoint.update(every=1000, keep=1, keep_best=0)
    if arg == "lookup":
        lookup(c)
    if arg == "functions":
        functions(c)
    if arg == "smoke":
        c.study.update(seeds=1, schemes=("1 layer", "2 layers"))
        c.train.update(steps=4, batch_size=4)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(every=2, limit=8, test_limit=8, batch_size=8)
        for level in c.eval.course.values():
            level.every = 2
        c.log.every = 2
    return c


def course(**levels: dict) -> dict:
    """Levels about half way to what two layers come to; and the curves, at every evaluation."""
    curves = ("late_loss", "late_accuracy", "late_exact_match", "induction_score", "previous_token_score")
    return {name: {**levels.get(name, {}), "every": EVERY} for name in (*curves, *levels)}


def lookup(c: ConfigDict) -> None:
    """8 of 16 keys with one of 16 values each, then the 8 again. What is trained on are the answers."""
    c.title, c.study.task = "In-context learning: lookup", "lookup"
    c.data.source = {"name": "lookup", "pairs": 8, "queries": 8, "keys": 16, "values": 16}
    c.data.update(length=32, loss="asked")
    c.train.update(steps=600, batch_size=64)
    c.eval.course = course(late_loss={"at_most": 0.3}, induction_score={"at_least": 0.4})


def functions(c: ConfigDict) -> None:
    """16 examples of a function of 8 numbers. With an MLP, whose weights can remember functions."""
    c.title, c.study.task = "In-context learning: functions", "functions"
    c.data.source = {"name": "functions", "numbers": 8, "family": "table", "examples": 16, "functions": 0}
    c.data.update(length=32, loss="asked")
    c.model.backbone.arrangement = "sequential"
    c.train.update(steps=800, batch_size=64)
    c.eval.in_context.beside = "validation"
    c.eval.course = course(late_loss={"at_most": 0.8}, icl_score={"at_most": -0.3}, induction_score={"at_least": 0.5})
