"""Abilities that appear: sums, sums modulo p, and questions over two facts; one model of a study, or all of them.

python -m experiments.study --config=configs/emergence.py --workdir=runs/addition    the study of sums
python -m experiments.main --config=configs/emergence.py --workdir=runs/one          one of its models

configs/emergence.py            sums of numbers of three digits in three forms: plain, reversed, scratchpad; their
                                thresholds in examples, steps, FLOPs, and size
configs/emergence.py:rates      the same models at other learning rates, one seed: how those of the study were chosen
configs/emergence.py:digits     the same of numbers of other lengths: where each form is learned at all
configs/emergence.py:modular    sums modulo a prime: generalisation long after the training split is known by heart
configs/emergence.py:hops       facts of one hop, and questions of two, with and without what lies between
configs/emergence.py:prompted   chains of thought that are only prompted: solved ones in front of questions of two hops
                                that were never trained with them
configs/emergence.py:smoke      a few steps of the first
"""

from ml_collections import ConfigDict, FieldReference

from configs import common
from vfm.backbones.decoder_only import LLAMA

VARIANTS = ("smoke", "rates", "digits", "modular", "hops", "prompted")
SIZES = {"validation": 200, "test": 600}
SYMBOLS = "0123456789+=,>\n"
# Of which whole curves are kept.
MEASURES = ("answer_final_match", "answer_log_likelihood", "answer_edit_distance")
RELATIONS = ("father", "mother", "friend", "neighbour")
ENTITIES, HOPS_WIDTH, DEPTH = 20, 64, 2
HOPS_SYMBOLS = (*map(str, range(ENTITIES)), *RELATIONS, "=", ">")
SPECIALS = 3  # ids of a tokenizer beside its symbols


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "emergence", VARIANTS)
    c = common.base()
    c.objective = {"name": "next_token"}
    c.log.update(every=50, tensorboard=False)
    c.checkpoint.update(every=0, keep=1, keep_best=0)
    {"modular": modular, "hops": hops, "prompted": prompted}.get(arg, addition)(c)
    if arg == "rates":
        c.title = "Addition: learning rates"
        c.study.update(series=("rates",), seeds=1)
    if arg == "digits":
        c.title = "Addition: numbers of more and fewer digits"
        c.study.update(series=("digits",), seeds=3)
    if arg == "smoke":
        c.study.update(
            series=("examples",),
            seeds=1,
            steps=4,
            evaluations=2,
            examples=(20, 40, 80),
            most_examples=80,
            widths=(16,),
            width=16,
        )
        c.train.update(steps=4, batch_size=8)
        c.optimizer.schedule.warmup_steps = 1
        c.data.source.sizes = {"validation": 16, "test": 16}
        c.eval.update(every=2, limit=8, test_limit=16, batch_size=8)
        c.log.every = 2
    return c


def model(vocabulary, width: int, depth: int, max_len: int) -> dict:
    """Encoder, backbone in the style of LLaMA, and decoder; with widths that `size` can change."""
    return {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": vocabulary, "width": width}},
        "backbone": {
            "name": "decoder_only",
            "width": width,
            "depth": depth,
            "num_heads": 4,
            "mlp_dim": 2 * width,
            "max_len": max_len,
            "remat": "none",
            **LLAMA,
        },
        "decoders": {"text": {"name": "text", "vocab_size": vocabulary}},
    }


def size(width: int) -> dict:
    """What another width changes in the config."""
    return {"model.encoders.text.width": width, "model.backbone.width": width, "model.backbone.mlp_dim": 2 * width}


def addition(c: ConfigDict) -> None:
    """Sums of numbers of three digits. All forms have the same FLOPs: the steps of the plain form are study.steps."""
    c.title = "Emergence: addition, plain, reversed, and with a scratchpad"
    c.study = {
        **common.STUDY,
        "module": "experiments.emergence",
        "series": ("examples", "widths"),
        "seeds": 5,
        "steps": 840,
        "evaluations": 12,
        "digits": 3,
        "width": 48,
        "examples": (300, 600, 1200, 2400, 4800),
        "widths": (16, 24, 48),
        "numbers": (2, 3, 4),
        "most_examples": 4800,
        "learning_rates": {"plain": 1e-2, "reversed": 1e-2, "scratchpad": 1e-2},
        "rates": (2.5e-3, 5e-3, 1e-2, 2e-2),
    }
    c.tokenizer = {"name": "symbols", "symbols": SYMBOLS}
    c.model = model(len(SYMBOLS) + SPECIALS, 48, DEPTH, 128)
    # Which digits belong together is a matter of their places, as in the models of Lee et al. (2023). With rotary
    # positions, which tell distances, reversed sums stay on a plateau: their digits are ever farther from the answer's.
    c.model.backbone.positions = "learned"
    source = {"name": "addition", "digits": 3, "form": "plain", "examples": 4800, "seed": 0}
    source |= {"lengths": "exact", "sizes": SIZES}
    c.data = {"name": "questions", "source": source, "length": 14, "shots": 0, "loss": "answer", **common.DATA}
    c.train.update(steps=840, batch_size=64)
    c.optimizer.update(learning_rate=1e-2, weight_decay=0.1)
    c.optimizer.schedule.warmup_steps = 50
    c.eval.update(every=70, limit=200, test_limit=600, batch_size=200, evaluators=("answers", "course"))
    c.eval.answers = {"generate": True, "marker": ">", "prompts": {}}
    c.eval.course = {name: {"every": 1} for name in MEASURES}


def modular(c: ConfigDict) -> None:
    """a + b modulo p, half of the table, one layer; the learning rate stays at its peak."""
    c.title = "Emergence: delayed generalisation modulo a prime"
    c.study = {**common.STUDY, "module": "experiments.grokking", "seeds": 3, "weight_decays": (1.0, 0.0)}
    p = FieldReference(47)
    c.tokenizer = {"name": "symbols", "numbers": p, "symbols": "+-*/=", "separator": " "}
    c.model = model(p + 8, 64, 1, 8)
    fractions = {"train": 0.5, "validation": 0.25, "test": 0.25}
    source = {"name": "modular", "modulus": p, "operation": "+", "signs": False, "fractions": fractions, "seed": 0}
    c.data = {"name": "questions", "source": source, "length": 5, "separator": " ", **common.DATA}
    c.train.update(steps=3000, batch_size=256)
    c.optimizer.update(learning_rate=3e-3, weight_decay=1.0, b2=0.98)
    c.optimizer.schedule = {"name": "constant", "warmup_steps": 20}
    c.eval.update(every=50, limit=256, test_limit=0, batch_size=256, evaluators=("answers", "spectrum", "course"))
    c.eval.answers = {"generate": False, "marker": "", "prompts": {}}
    c.eval.course = {"train_token_accuracy": {"every": 1}, "answer_exact_match": {"every": 1}, "loss": {"every": 1}}


def hops(c: ConfigDict) -> None:
    """Facts over a random graph, and questions of two hops: the share of these that the training split has varies."""
    c.title = "Emergence: questions of two hops, with and without what lies between"
    c.study = {
        **common.STUDY,
        "module": "experiments.emergence",
        "series": ("hops",),
        "seeds": 3,
        "steps": 1500,
        "evaluations": 12,
        "shares": (0.1, 0.2, 0.4, 0.8),
    }
    symbols = HOPS_SYMBOLS[ENTITIES:]
    c.tokenizer = {"name": "symbols", "numbers": ENTITIES, "symbols": symbols, "separator": " "}
    c.model = model(len(HOPS_SYMBOLS) + SPECIALS, HOPS_WIDTH, DEPTH, 16)
    source = {"name": "relations", "entities": ENTITIES, "relations": RELATIONS, "chain": False, "repeat": 1, "seed": 0}
    source["fractions"] = {"train": 0.5, "validation": 0.25, "test": 0.25}
    c.data = {"name": "questions", "source": source, "length": 7, "separator": " ", **common.DATA}
    c.train.update(steps=1500, batch_size=64)
    c.optimizer.update(learning_rate=3e-3, weight_decay=1.0)
    c.optimizer.schedule.warmup_steps = 50
    c.eval.update(every=125, limit=0, test_limit=0, batch_size=64, evaluators=("answers", "course"))
    c.eval.answers = {"generate": True, "marker": ">", "prompts": {}}
    c.eval.course = {name: {"every": 1} for name in MEASURES}


def prompted(c: ConfigDict) -> None:
    """Questions of two hops behind two solved ones; half of the pairs of relations are never trained with a chain."""
    hops(c)
    c.title = "Emergence: chains of thought that are only prompted"
    c.study = {
        **common.STUDY,
        "module": "experiments.emergence",
        "series": ("prompted",),
        "seeds": 3,
        "steps": 2400,
        "evaluations": 12,
        "widths": (8, 16, 32, 64),
    }
    c.model.backbone.max_len = 32
    c.data.update(length=23, shots=2, shots_tasks=True)
    c.data.source.update(unchained=0.5, both=False, fractions={"train": 0.6, "validation": 0.2, "test": 0.2})
    c.train.steps = 2400
    c.eval.every = 200
    c.eval.course = {f"{lead}{name}": {"every": 1} for name in MEASURES for lead in ("", "chain_shots_")}
    c.eval.answers.prompts = {"chain_shots": {"source": {"chain": True, "both": False}}}
