"""Text to image with three kinds of output side: one of them, or the study experiments/output_projection.py.

    python -m experiments.main --config=configs/output_projection.py:first --workdir=runs/first_stage
    python -m experiments.study --config=configs/output_projection.py --workdir=runs/output_projection \\
        --config.study.first=runs/first_stage                                                       the study
    python -m experiments.main --config=configs/output_projection.py --workdir=runs/discriminative   one model

    configs/output_projection.py               explicit projector and discriminative decoder (survey figure 7b)
    configs/output_projection.py:diffusion     DiT that attends to the hidden states, no projector (figure 7a)
    configs/output_projection.py:flow          the same by flow matching
    configs/output_projection.py:var           next-scale prediction over the codes of a first stage, which starts from
                                               --config.init.path=runs/first_stage and stays as it is
    configs/output_projection.py:first         that first stage
    configs/output_projection.py:smoke         a few steps of the first

A word names a digit; the model, with text at its centre, draws one of scikit-learn's handwritten digits. The backbone
is the same for all. Sizes and steps are chosen so that models have about as many parameters that learn, and training
about as many FLOPs; `--config.mode=plan` shows both.
"""

from ml_collections import ConfigDict

from configs import common, digits, var

WIDTH = 64
STACK = {"width": WIDTH, "num_heads": 4, "mlp_dim": 2 * WIDTH}
SLOTS = 2
FIRST = var.halves((8, 8), (32, 32), 8, (1, 2, 3, 4), 64)


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "output_projection", ("smoke", "first", *list(SCHEMES)[1:]))
    if arg == "first":
        return first()
    c = digits.get_config()
    c.title = "Output side: projector and discriminative decoder, diffusion, next-scale prediction"
    c.study = {
        **common.STUDY,
        "module": "experiments.output_projection",
        "schemes": tuple(SCHEMES),
        "seeds": 3,
        "first": "",
    }
    c.model = {}
    c.objective = {"name": "any_to_any", "text": 0.0, "conversion": 0.5, "generation": 10.0, "reconstruction": 3.0}
    c.data.update(tasks=("text->image",), weights=())
    c.data.sources = {"image": {"name": "digits"}}
    c.eval.update(every=0, batch_size=180, evaluators=("generation",))
    c.eval.generation = {"features": "judge", "shown": 6}
    c.checkpoint.update(every=0, keep_best=0)
    for field, value in SCHEMES.get(arg, SCHEMES["discriminative"]).items():
        section, _, name = field.rpartition(".")
        (c[section] if section else c)[name] = value
    if arg == "smoke":
        c.study.update(schemes=("discriminative", "diffusion"), seeds=1)
        c.train.update(steps=4, batch_size=8)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=20, test_limit=20, batch_size=20, judge_examples=200)
        c.log.every = 2
    return c


def model(decoder: dict, **blocks) -> dict:
    """Text at the centre, one decoder of images, and whatever else an output side needs."""
    vocab_size = 256 + len(digits.SPECIAL)
    return {
        "centre": "text",
        "dtype": "float32",
        "encoders": {"text": {"name": "text", "vocab_size": vocab_size, "width": WIDTH}, **blocks.pop("encoders", {})},
        "backbone": {"name": "decoder_only", "depth": 2, "max_len": 64, "remat": "dots", **STACK},
        "decoders": {"image": decoder},
        **blocks,
    }


def _diffusion(process: dict) -> dict:
    network = {"name": "dit", "conditioning": "cross_attention", "patch_size": 2, "depth": 2, **STACK}
    network["mlp_dim"] = 4 * WIDTH
    decoder = {"name": "diffusion", "item_shape": (8, 8, 1), "num_tokens": SLOTS, "network": network}
    return model({**decoder, "condition_dropout": 0.1, "process": process})


SCHEMES = {
    "discriminative": {
        "model": model(
            {"name": "autoencoder", "grid": (2, 2), "upsample": (2, 2), "conv_width": 32},
            encoders={"image": {"name": "vit", "image_size": (8, 8), "patch_size": 4, "depth": 1, **STACK}},
            output_projectors={"image": {"name": "query", "num_signals": SLOTS, "num_tokens": 4, **STACK}},
        ),
        "train.steps": 2000,
    },
    "diffusion": {
        "model": _diffusion({"name": "gaussian", "schedule": "cosine", "timesteps": 1000, "prediction": "v"}),
        "train.steps": 2000,
        "eval.generation": {"features": "judge", "shown": 6, "steps": 50, "guidance": 2.0},
    },
    "flow": {
        "model": _diffusion({"name": "flow"}),
        "train.steps": 2000,
        "eval.generation": {"features": "judge", "shown": 6, "steps": 50, "guidance": 2.0},
    },
    "var": {
        "model": model(
            {
                "name": "var",
                "item_shape": (8, 8, 1),
                "num_tokens": SLOTS,
                "depth": 2,
                "qk_norm": "head",
                "condition_dropout": 0.1,
                "conditioning": "adaln",
                "latent": {"encoder": FIRST[0], "decoder": FIRST[1]},
                **STACK,
                "mlp_dim": 3 * WIDTH,
            }
        ),
        "init.match": tuple(
            (f"decoders_image/latent_{half}/(.*)", rf"{half}s_image/\1") for half in ("encoder", "decoder")
        ),
        "optimizer.frozen": ("decoders_image/latent_(encoder|decoder)/.*",),
        "train.steps": 1500,
        "eval.generation": {"features": "judge", "shown": 6, "guidance": 2.0},
    },
}


def first() -> ConfigDict:
    """The first stage of next-scale prediction, as in configs/var.py, for the images of this study."""
    c = var.get_config("first")
    c.title = "First stage of next-scale prediction for the study of output sides"
    return c
