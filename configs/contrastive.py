"""Images, sounds and texts in one space, by contrast: one model of the study `experiments/contrastive.py`, or all.

    python -m experiments.study --config=configs/contrastive.py --workdir=runs/contrastive   the study
    python -m experiments.main --config=configs/contrastive.py --workdir=runs/all_pairs      one of its models

    configs/contrastive.py          scikit-learn's handwritten digits, DTMF keypad tones and words; no network
    configs/contrastive.py:tfds     MNIST and recorded speech (spoken_digit) through TFDS; set --config.data.dir
    configs/contrastive.py:smoke    a few steps of the first

Every item shows a number of two digits: two images side by side, two sounds one after the other, two words.
Retrieval is among two items of each of the 100 numbers, in images and sounds of the test split.
"""

from ml_collections import ConfigDict, FieldReference

from configs import common, digits

SPECIAL = ("<pad>", "<bos>", "<eos>")
MODALITIES = ("image", "audio", "text")
PAIRS = ("image-text", "audio-text", "image-audio")
DIGITS, WIDTH, SPACE, LENGTH = 2, 48, 32, 12


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "contrastive", ("smoke", "tfds"))
    c = common.base()
    c.title = "Contrastive alignment of images, sounds and texts of numbers"
    c.study = {**common.STUDY, "module": "experiments.contrastive", "seeds": 3, "variation_seeds": 1, "schemes": ()}
    c.tokenizer = {"name": "byte", "special": SPECIAL}
    c.model = model(image_size=(8, 8), stages=(2, 2), widths=(24, WIDTH), num_samples=1024, n_fft=512, frames=2)
    c.objective = {"name": "contrastive", "pairs": PAIRS, "loss": "infonce", "momentum": 0.0, "queue": 0}
    c.objective.update(chunks=1, cache=1)
    c.data = {
        "name": "composed",
        "length": LENGTH,
        "sources": {
            "image": {"name": "digits"},
            "audio": {"name": "dtmf", "duration": 0.128, "tone": (0.06, 0.1), "cache": True},
        },
        "words": digits.WORDS,
        "pairs": PAIRS,
        "compose": DIGITS,
        "size": 5000,
        "held_out": 0.0,
        "repeats": 2,
        "shuffled": (),
        "augment": {},
        **common.DATA,
    }
    c.train.update(steps=300, batch_size=128)
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.05)
    c.optimizer.schedule.warmup_steps = 30
    c.eval.update(every=0, evaluators=("retrieval",), batch_size=200)
    c.eval.retrieval = {"k": (1, 5, 10), "probe_examples": 2000}
    c.eval.matching = {"k": (1, 5, 10)}
    c.checkpoint.best_metric = ""
    if arg == "tfds":
        recorded(c)
    if arg == "smoke":
        c.study.update(seeds=1, schemes=("centre text", "image-audio alone"))
        c.train.update(steps=6, batch_size=16)
        c.optimizer.schedule.warmup_steps = 2
        c.data.size = 200
        c.eval.retrieval.probe_examples = 100
        c.eval.update(limit=32, test_limit=32, batch_size=16)
        c.log.every = 2
    return c


def model(image_size, stages, widths, num_samples, n_fft, frames, depth=2) -> dict:
    """Encoders of the three modalities, and a linear projector of each into the shared space."""
    stack = {"width": WIDTH, "depth": depth, "num_heads": 4, "mlp_dim": 2 * WIDTH, "remat": "dots"}
    backbone = {name: value for name, value in stack.items() if name != "width"}
    return {
        "dtype": "float32",
        "centre": "",
        "alignment": {"temperature": 0.07, "max_scale": 100.0},
        "encoders": {
            "image": {
                "name": "vgg",
                "image_size": (image_size[0], DIGITS * image_size[1]),
                "stages": stages,
                "widths": widths,
                "norm": "group",
            },
            "audio": {
                "name": "audio",
                "num_samples": DIGITS * num_samples,
                "n_fft": n_fft,
                "hop": 128,
                "n_mels": 64,
                "frames": frames,
                **stack,
            },
            "text": {
                "name": "text_transformer",
                "vocab_size": 256 + len(SPECIAL),
                "length": LENGTH,
                "width": WIDTH,
                "pad_id": SPECIAL.index("<pad>"),
                "backbone": {"name": "encoder_only", "positions": "learned", **backbone},
            },
        },
        "input_projectors": {name: {"name": "linear", "width": SPACE, "use_bias": False} for name in MODALITIES},
        "backbone": {},
        "decoders": {},
    }


def fusion(pairs: tuple[str, ...] = PAIRS) -> dict:
    """Overrides for a fusion encoder in place of the shared space: a backbone reads the features of two items together,
    and a decoder says how well they match. All other modalities are left out."""
    named = {name for pair in pairs for name in pair.split("-")}
    missing = {f"model.encoders.{name}": {} for name in MODALITIES if name not in named}
    return {
        **missing,
        "model.centre": next(name for name in reversed(MODALITIES) if name in named),
        "model.alignment": None,
        "model.input_projectors": {name: {"name": "linear", "width": WIDTH} for name in named},
        "model.backbone": {
            "name": "encoder_only",
            "width": WIDTH,
            "depth": 1,
            "num_heads": 4,
            "mlp_dim": 2 * WIDTH,
            "norm_position": "pre",
            "max_len": 64,
            "num_token_types": len(MODALITIES),
            "remat": "dots",
        },
        "model.decoders": {"label": {"name": "classifier", "pooling": "mean", "num_classes": 2}},
        # To find the negatives is most of the work: with half the rows a step costs about what it costs to align.
        "objective": {"name": "matching", "pairs": pairs, "negatives": 1, "candidates": 16, "same_label": "ignored"},
        "train.batch_size": 64,
        "data.pairs": pairs,
        "eval.evaluators": ("matching",),
    }


def recorded(c: ConfigDict) -> None:
    """MNIST and spoken_digit; the speaker `theo` and MNIST's test images are for the test only."""
    c.title = "Contrastive alignment of MNIST, recorded speech and texts of numbers"
    c.model = model(
        image_size=(28, 28), stages=(1, 1, 2), widths=(16, 32, WIDTH), num_samples=6144, n_fft=256, frames=8, depth=3
    )
    folder = FieldReference("")
    c.data.dir = folder
    c.data.sources = digits.recorded_sources(folder, samples=6144)
    c.data.augment = {"image": {"shift": 2, "rotate": 10.0, "scale": 0.1}, "audio": {"shift": 800, "gain_db": 6.0}}
