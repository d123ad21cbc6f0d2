"""Any-to-any over images, sounds and text of the ten digits, text at the centre, from scratch.

    configs/digits.py         scikit-learn's handwritten digits and DTMF keypad tones; no network, minutes on a laptop
    configs/digits.py:tfds    MNIST and recorded speech (spoken_digit) through TFDS; set --config.data.dir
    configs/digits.py:smoke   a few steps of the first

The training loss is the survey's sum for CoDi-2: text generation + modality conversion + data generation.
"""

from ml_collections import ConfigDict, FieldReference

from configs import common

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<text>", "<image>", "<audio>")
TASKS = ("image->text", "audio->text", "text->image", "audio->image", "image->audio", "image+audio+text->text")


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "digits", ("smoke", "tfds"))
    c = common.base()
    c.title = "Digits: any-to-any over image, audio and text"
    c.tokenizer = {"name": "byte", "special": SPECIAL}
    c.model = model(image_size=(8, 8), patch_size=4, upsample=(2, 2), num_samples=2048, n_fft=512)
    c.objective = {"name": "any_to_any", "text": 1.0, "conversion": 0.5, "generation": 10.0, "reconstruction": 3.0}
    c.data = {
        "name": "pairs",
        "length": 24,
        "sources": {"image": {"name": "digits"}, "audio": {"name": "dtmf", "duration": 0.256, "tone": (0.1, 0.2)}},
        "words": WORDS,
        "tasks": TASKS,
        "weights": (4.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        "question": "digit?",
        "anchor": "image",
        "augment": {"image": {"shift": 1, "rotate": 10.0, "scale": 0.1}},
        **common.DATA,
    }
    c.train.update(steps=3500, batch_size=64, ema=0.99)
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.05)
    c.optimizer.schedule.warmup_steps = 200
    c.eval.update(every=1000, evaluators=("any_to_any",))
    if arg == "tfds":
        recorded(c)
    if arg == "smoke":
        c.train.update(steps=6, batch_size=16)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=32, test_limit=32, batch_size=16, judge_examples=200)
        c.log.every = 2
    return c


def model(image_size, patch_size, upsample, num_samples, n_fft, width=64, depth=2) -> dict:
    """The five blocks. Every modality has projectors, so that any of them can be `centre`."""
    transformer = {"width": width, "num_heads": 4, "mlp_dim": 2 * width}
    # Elementwise steps are computed again in the backward pass: on CPU that is faster than to keep their results.
    stack = {**transformer, "remat": "dots"}
    grid = tuple(side // patch_size for side in image_size)
    vocab_size, hop, frames = 256 + len(SPECIAL), 128, 4
    into = {"name": "mlp", "width": width, "hidden": 2 * width}
    out = {"name": "query", "num_signals": 2, **transformer}
    return {
        "centre": "text",
        "dtype": "float32",
        "encoders": {
            "text": {"name": "text", "vocab_size": vocab_size, "width": width},
            "image": {"name": "vit", "image_size": image_size, "patch_size": patch_size, "depth": depth, **stack},
            "audio": {
                "name": "audio",
                "num_samples": num_samples,
                "n_fft": n_fft,
                "hop": hop,
                "n_mels": 64,
                "frames": frames,
                "stem": "frames",
                "depth": depth,
                **stack,
            },
        },
        "input_projectors": {"text": {"name": "linear", "width": width}, "image": into, "audio": into},
        "backbone": {"name": "decoder_only", "depth": 2, "max_len": 64, **stack},
        "output_projectors": {
            "text": {"name": "linear", "width": width},
            "image": {**out, "num_tokens": grid[0] * grid[1]},
            "audio": {**out, "num_tokens": num_samples // hop // frames},
        },
        "decoders": {
            "text": {"name": "text", "vocab_size": vocab_size},
            "image": {"name": "autoencoder", "grid": grid, "upsample": upsample, "conv_width": 32},
        },
    }


def recorded(c: ConfigDict) -> None:
    """MNIST and spoken_digit, paired by label; the speaker `theo` and MNIST's test images are for the test only."""
    c.title = "MNIST and spoken digits: any-to-any over image, audio and text"
    c.model = model(image_size=(28, 28), patch_size=7, upsample=(7,), num_samples=8192, n_fft=256, depth=3)
    c.model.decoders.image.conv_width = 16
    folder = FieldReference("")
    c.data.dir = folder
    c.data.sources = recorded_sources(folder, samples=8192)
    c.data.length = 48
    c.data.augment = {"image": {"shift": 2, "rotate": 10.0, "scale": 0.1}, "audio": {"shift": 800, "gain_db": 6.0}}
    c.train.steps = 8000
    c.eval.update(every=4000, batch_size=256, judge_examples=10_000)
    c.checkpoint.every = 1000


def recorded_sources(folder: FieldReference, samples: int) -> dict:
    """MNIST and spoken_digit through TFDS; sounds are cut or filled to so many samples."""
    others = "_(george|jackson|nicolas|yweweler)_"
    return {
        "image": {
            "name": "tfds",
            "dataset": "mnist:3.0.1",
            "data_dir": folder,
            "cache": True,
            "features": {"image": "image", "label": "label"},
            "splits": {"train": "train[:59000]", "validation": "train[59000:]", "test": "test"},
        },
        "audio": {
            "name": "tfds",
            "dataset": "spoken_digit:1.0.9",
            "data_dir": folder,
            "cache": True,
            "samples": samples,
            "features": {"audio": "audio", "label": "label"},
            "splits": {"train": "train", "validation": "train", "test": "train"},
            "where": {
                "train": {"audio/filename": others + r"([5-9]|\d\d)\.wav"},
                "validation": {"audio/filename": others + r"[0-4]\.wav"},
                "test": {"audio/filename": "_theo_"},
            },
        },
    }
