"""Scaling laws: how the loss falls with parameters, with data and with compute; the study of experiments/scaling.py.

    python -m experiments.study --config=configs/scaling.py --workdir=runs/scaling     the study
    python -m experiments.main --config=configs/scaling.py --workdir=runs/one          its middle model

    configs/scaling.py                text: the source files of Python's standard library, byte by byte. L(N), L(D) and
                                      IsoFLOP, with 3 seeds
    configs/scaling.py:shakespeare    the same of Tiny Shakespeare through TFDS; set --config.data.dir
    configs/scaling.py:corpus         the same of JSON lines: train.jsonl, validation.jsonl, test.jsonl with text in
                                      --config.data.dir; other names by --config.data.source.paths.train=NAME

    configs/scaling.py:modalities     L(N) of text, image codes, audio codes and logs: a table of exponents
    configs/scaling.py:architectures  L(N) of the vanilla Transformer, attention in a window, and a causal convolution
    configs/scaling.py:images         L(N) of one modality: the colours of drawn shapes (a palette), pixel by pixel
    configs/scaling.py:audio          mu-law codes of synthesised speech, sample by sample
    configs/scaling.py:logs           logs that a procedure writes, byte by byte
    configs/scaling.py:fashion_mnist  images through TFDS, 14×14 in 16 greys; set --config.data.dir
    configs/scaling.py:spoken_digit   recorded speech through TFDS; set --config.data.dir

    configs/scaling.py:gpu            four decades of parameters on text, for one accelerator
    configs/scaling.py:smoke          a few small runs of every sweep

What is varied stands in `config.study`. The learning rate goes with 1 / width, as for the hidden layers of μP (Yang et
al. 2022); `variations` multiply rate and batch for the first seed, and show how near each size is to its best.
"""

from ml_collections import ConfigDict

from configs import common
from vfm.backbones.decoder_only import LLAMA
from vfm.tokenizers.palette import SPECIAL

LENGTH, WINDOW, BYTES, COLORS, GREYS = 128, 16, 259, 8, 16
# (width, depth): depth grows with width, as in models of one family; budgets have one smaller and one larger.
LADDER = ((8, 2), (12, 2), (16, 2), (24, 2), (32, 3), (44, 3), (56, 4), (72, 6), (88, 8))
SIZES = LADDER[1:-1]

# What each architecture changes in the backbone. Window and kernel reach as far back.
ARCHITECTURES = {
    "vanilla": {},
    "windowed": {"window": WINDOW},
    "convolution": {"mixer": "convolution", "kernel_size": WINDOW, "positions": "none"},
}


def _bytes(source: dict, **fields) -> dict:
    return {"of": {"name": "text"}, "source": source, "tokenizer": {"name": "byte"}, "vocab_size": BYTES, **fields}


def _sound(source: dict) -> dict:
    return _bytes(source) | {"of": {"name": "waveform"}}


def _palette(source: dict, colors: int, length: int) -> dict:
    size = len(SPECIAL) + colors
    tokenizer = {"name": "palette", "vocab_size": size, "special": SPECIAL, "path": ""}
    fields = {"of": {"name": "visual_sentences"}, "source": source, "tokenizer": tokenizer}
    return {**fields, "vocab_size": size, "length": length}


def _tfds(dataset: str, features: dict, splits: dict, **fields) -> dict:
    return {"name": "tfds", "dataset": dataset, "data_dir": "", "features": features, "splits": splits, **fields}


TENTHS = {"train": "train[:80%]", "validation": "train[80%:90%]", "test": "train[90%:]"}
# Rows of the held-out splits, drawn once for all models.
HELD_OUT = {"validation": 512, "test": 1024}
# Where tokens are from: data set, source, tokenizer, vocabulary; length of rows and held-out rows, if not as above.
MODALITIES = {
    "text": _bytes({"name": "stdlib", "fractions": {"train": 0.8, "validation": 0.1, "test": 0.1}}),
    "images": _palette(
        {"name": "shapes", "size": 11, "sizes": {"train": 20_000, "validation": 2000, "test": 2000}}, COLORS, 122
    ),
    "audio": _sound({"name": "speech", "snr_db": (30.0, 50.0), "sizes": {"train": 400, "validation": 40, "test": 60}}),
    "logs": _bytes({"name": "logs", "sizes": {"train": 800, "validation": 40, "test": 60}}),
    "shakespeare": _bytes(
        _tfds(
            "tiny_shakespeare:1.0.0",
            {"text": "text"},
            {"train": "train", "validation": "validation", "test": "test"},
        ),
        rows={"validation": 0, "test": 0},
    ),
    "corpus": _bytes(
        {
            "name": "jsonl",
            "dir": "",
            "paths": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
            "text_field": "text",
        }
    ),
    "fashion_mnist": _palette(
        _tfds(
            "fashion_mnist:3.0.1",
            {"image": "image"},
            {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
            size=(14, 14),
        ),
        GREYS,
        197,
    ),
    "spoken_digit": _sound(_tfds("spoken_digit:1.0.9", {"audio": "audio"}, TENTHS, samples=4000)),
}
OURS = ("text", "images", "audio", "logs")  # which need no files


def length(modality: str) -> int:
    """Tokens of a row."""
    return MODALITIES[modality].get("length", LENGTH)


def backbone(architecture: str, width: int, depth: int, length: int, dtype: str = "float32") -> dict:
    """A decoder-only backbone in the style of LLaMA; about 12 · depth · width² parameters with attention."""
    return {
        "name": "decoder_only",
        "width": width,
        "depth": depth,
        "num_heads": max(2, width // 64),
        "mlp_dim": round(8 * width / 3),
        "max_len": length,
        "dtype": dtype,
        **LLAMA,
        **ARCHITECTURES[architecture],
    }


def model(modality: str, architecture: str, width: int, depth: int, dtype: str = "float32") -> dict:
    """Table of tokens, backbone and head."""
    size = MODALITIES[modality]["vocab_size"]
    return {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": size, "width": width, "dtype": dtype}},
        "backbone": backbone(architecture, width, depth, length(modality), dtype),
        "decoders": {"text": {"name": "text", "vocab_size": size, "dtype": dtype}},
    }


def data(modality: str) -> dict:
    """The section `data` of a modality: all rows for training, and some of the held-out ones."""
    found = MODALITIES[modality]
    rows = {"train": 0, **found.get("rows", HELD_OUT)}
    fields = {"name": "subset", "length": length(modality), "of": found["of"], "source": found["source"]}
    return {**fields, "rows": rows, **common.DATA}


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "scaling", ("modalities", "architectures", "gpu", "smoke", *list(MODALITIES)[1:]))
    c = common.base()
    modality = arg if arg in MODALITIES else "text"
    c.title = f"Scaling laws: {arg or 'text'}".replace("_", " ")
    width, depth = SIZES[len(SIZES) // 2]
    c.study = {
        **common.STUDY,
        "module": "experiments.scaling",
        "own": modality,  # whose data and tokenizer the config itself has
        "modalities": (modality,),
        "architectures": ("vanilla",),
        "sweeps": ("sizes", "data", "budgets") if arg in ("", "shakespeare", "corpus", "smoke") else ("sizes",),
        "seeds": 3,
        "sizes": SIZES,
        "tokens": 4_000_000,  # of every model of the sweep of sizes
        "batch_size": 8,
        "rate": 0.4,  # learning rate × width
        "variations": ((0.5, 1), (2.0, 1), (1.4, 2)),  # (× rate, × batch)
        "dtype": "float32",
        # One model, sets of so many rows, at most so many passes over them and so many tokens in all.
        "data": {
            "size": (60, 2),
            "rows": (64, 128, 256, 512, 1024, 2048),
            "passes": (8, 32),
            "tokens": 1_500_000,
            "evaluations": 16,
        },
        # FLOPs of training, and the sizes of each budget.
        "budgets": (
            (0.8e11, LADDER[:6]),
            (2e11, LADDER[1:7]),
            (5e11, LADDER[2:8]),
            (12.5e11, LADDER[3:]),
        ),
    }
    # What a run is in the study, which sets and reads it. rate: what the rule says; batch: a multiple of the study's.
    what = {"name": "sizes", "modality": modality, "architecture": "vanilla"}
    c.cell = {**what, "rate": 0.4 / width, "batch": 1, "budget": 0.0}
    c.tokenizer = MODALITIES[modality]["tokenizer"]
    c.model = model(modality, "vanilla", width, depth)
    c.data = data(modality)
    common.own_folder(c)
    c.objective = {"name": "next_token"}
    c.train.update(steps=3906, batch_size=8)
    c.optimizer.update(learning_rate=0.4 / width, weight_decay=0.1)
    c.optimizer.schedule.warmup_steps = 195
    c.eval.update(every=0, limit=0, batch_size=32)
    c.checkpoint.update(every=0, keep=1, keep_best=0)
    if arg and c.study.sweeps == ("sizes",):  # many of the same sweep: without the largest size
        c.study.update(sizes=SIZES[:6], tokens=1_500_000, seeds=2, variations=((0.5, 1), (2.0, 1)))
    if arg == "modalities":
        c.study.modalities = OURS
    if arg == "architectures":
        c.study.architectures = tuple(ARCHITECTURES)
    if arg == "gpu":
        gpu(c)
    if arg == "smoke":
        smoke(c)
    return c


def gpu(c: ConfigDict) -> None:
    """6.3 thousand to 76 million parameters without embeddings. Four passes over the text count nearly as much as new
    text (Muennighoff et al. 2023); one with more of it is better: --config.data.source.name=jsonl and its fields."""
    sizes = (16, 2), (24, 2), (40, 3), (64, 4), (96, 6), (160, 6), (256, 8), (384, 8), (576, 10), (768, 11)
    c.study.update(sizes=sizes, tokens=40_000_000, batch_size=128, seeds=1, dtype="bfloat16")
    c.study.variations = ((0.5, 1), (2.0, 1))


def smoke(c: ConfigDict) -> None:
    """Every sweep, with too few cells for some of the fits, which say so."""
    sizes = ((8, 1), (12, 1), (16, 1), (24, 1))
    c.study.update(sizes=sizes, tokens=8192, variations=(), seeds=1)
    c.study.data.update(size=(8, 1), rows=(8, 16), passes=(4,), tokens=8192, evaluations=2)
    c.study.budgets = ((2e9, sizes[1:3]),)
    c.data.rows = {"train": 0, "validation": 16, "test": 32}
    c.data.source.fractions = {"train": 0.1, "validation": 0.05, "test": 0.05, "unused": 0.8}
    c.model = model("text", "vanilla", 8, 1)
    c.train.steps = 4
    c.optimizer.schedule.warmup_steps = 1
    c.eval.batch_size = 16
    c.log.every = 4
