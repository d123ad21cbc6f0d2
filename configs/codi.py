"""Images and sounds of digits that are drawn together: composable diffusion (CoDi, Tang et al. 2023).

    configs/codi.py         the start: a diffusion model of images and one of spectrograms, which do not know each other
    configs/codi.py:joint   the joint stage: attentions to what the other draws, and environment encoders, learn; the
                            diffusion models are frozen
    configs/codi.py:smoke   a few steps of the joint stage from a random start

    python -m experiments.main --config=configs/codi.py --workdir=runs/codi_start
    python -m experiments.main --config=configs/codi.py:joint --workdir=runs/codi --config.init.path=runs/codi_start

scikit-learn's handwritten digits, 8×8, and log-mel spectrograms, 16×16, of synthesised spoken digits; no network. No
class is given: what is measured (`joint_agreement`) is how often an image and a sound that are drawn together show the
same digit, by classifiers fitted on real ones, and how often two that are drawn alone do (`joint_agreement_alone`).
"""

from ml_collections import ConfigDict

from configs import common, digits

SPECIAL = ("<pad>", "<bos>", "<eos>")
# What learns in the joint stage.
JOINT = r"decoders_[^/]+/(environment_encoder/.*|denoiser/.*/(joint_attention/.*|norm_joint/.*|joint_gate))"


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "codi", ("smoke", "joint"))
    c = common.base()
    c.title = "Diffusion of images and of sounds of digits"
    c.tokenizer = {"name": "byte", "special": SPECIAL}  # there is no text
    c.model = model(width=64, depth=2)
    c.objective = {"name": "generation"}
    c.data = {
        **common.DATA,
        "name": "composed",
        "length": 1,
        "sources": {
            "image": {"name": "digits"},
            "audio": {
                "name": "spectrograms",
                "source": {"name": "speech", "tract": (0.95, 1.1)},
                "hop": 300,
                "n_mels": 16,
            },
        },
        "words": digits.WORDS,
        "pairs": ("audio-image",),
        "size": 20_000,
        "repeats": 100,
    }
    c.train.update(steps=10_000, batch_size=64, ema=0.999)
    c.optimizer.update(learning_rate=2e-3, weight_decay=0.0)
    c.optimizer.schedule.warmup_steps = 200
    c.eval.update(every=0, evaluators=("generation",), batch_size=250)
    c.eval.generation = {"features": "judge", "steps": 50}
    c.checkpoint.update(every=2000, keep_best=0)
    if arg == "joint":
        joint(c, width=64, depth=2)
        c.init.match = (f"(?!{JOINT}$).*",)  # so that a stage without its start is refused
        c.optimizer.frozen = (f"(?!{JOINT}$).*",)
        c.train.steps = 16_000  # what is noisy tells little of its class, and the loss of the noise shows that slowly
    if arg == "smoke":
        c.model = model(width=16, depth=1)
        joint(c, width=16, depth=1)
        c.train.update(steps=6, batch_size=16)
        c.optimizer.schedule.warmup_steps = 2
        c.data.update(size=200, repeats=10)
        c.data.sources.audio.source.sizes = {"train": 60, "validation": 20, "test": 20}
        c.eval.update(limit=20, test_limit=20, batch_size=20, judge_examples=60)
        c.eval.joint.steps = 4
        c.log.every = 2
    return c


def model(width: int, depth: int) -> dict:
    """Two diffusion models that draw without any condition."""
    return {
        "centre": "image",  # which has no encoder: there is no condition
        "dtype": "float32",
        "backbone": {},
        "encoders": {},
        "decoders": {
            "image": diffusion((8, 8, 1), 2, width, depth),
            "audio": diffusion((16, 16, 1), 4, width, depth),
        },
    }


def diffusion(item_shape: tuple[int, ...], patch_size: int, width: int, depth: int) -> dict:
    return {
        "name": "diffusion",
        "item_shape": item_shape,
        "value_range": (0.0, 1.0),
        "condition_dropout": 0.0,
        "network": {
            "name": "dit",
            "conditioning": "adaln_zero",
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "num_heads": 4,
            "mlp_dim": 4 * width,
        },
        "process": {"name": "gaussian", "schedule": "cosine", "timesteps": 1000, "prediction": "v"},
    }


def joint(c: ConfigDict, width: int, depth: int) -> None:
    c.title = "Images and sounds of digits that are drawn together"
    c.model.joint = {
        "modalities": ("image", "audio"),
        "temperature": 0.1,
        "width": width,
        "depth": depth,
        "num_heads": 4,
        "mlp_dim": 2 * width,
    }
    c.eval.evaluators = ("joint",)
    c.eval.joint = {"steps": 50}
