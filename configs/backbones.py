"""The three families of backbones on real text: one model of the study `experiments/backbones.py`, or all of them.

    python -m experiments.study --config=configs/backbones.py --workdir=runs/backbones     the study
    python -m experiments.main --config=configs/backbones.py --workdir=runs/decoder_only   one of its models

    configs/backbones.py                    decoder-only, next token
    configs/backbones.py:prefix_lm          decoder-only, prefix LM
    configs/backbones.py:encoder_only       encoder-only, masked LM
    configs/backbones.py:encoder_decoder    encoder–decoder, span corruption (T5); a step costs the FLOPs of the others
    configs/backbones.py:small_encoder_decoder  the same with as many parameters as the others
    configs/backbones.py:infilling          encoder–decoder, text infilling (BART); a step costs the FLOPs of the others
    configs/backbones.py:labelled           any labelled text: JSON lines train.jsonl, validation.jsonl, test.jsonl with
                                            text and label in --config.data.dir
    configs/backbones.py:smoke              a few steps of the first

All models have the same kind of layers (those of LLaMA) and one tokenizer, are trained on the same amount of text with
the same optimizer, and differ in what tells the families apart: who sees whom, and what is to be predicted. Nothing is
tuned for any of them.
"""

from ml_collections import ConfigDict

from configs import common
from vfm.backbones.decoder_only import LLAMA

VOCABULARY, WIDTH, LENGTH = 1024, 128, 128
SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", *(f"<extra_id_{i}>" for i in range(8)))
LAYERS = {
    "width": WIDTH,
    "num_heads": 4,
    "max_len": 144,
    "norm_position": "pre",
    **LLAMA,
}
STACK = {**LAYERS, "depth": 4, "mlp_dim": 352}

# What each model changes in the config. The length is that of the encoder, with room for 128 tokens of text: of 116 of
# 116 positions (the decoder has 26), or on average 105 of 143 (the decoder has 130).
MODELS = {
    "decoder_only": {
        "model.backbone": {"name": "decoder_only", **STACK},
        "objective": {"name": "next_token"},
        "data.corruption": {"name": "next_token"},
    },
    "prefix_lm": {
        "model.backbone": {"name": "decoder_only", **STACK},
        "objective": {"name": "next_token"},
        "data.corruption": {"name": "prefix_lm"},
    },
    "encoder_only": {
        "model.backbone": {"name": "encoder_only", "embedding_norm": False, **STACK},
        "objective": {"name": "masked"},
        "data.corruption": {"name": "masked", "rate": 0.15},
    },
    "encoder_decoder": {
        "model.backbone": {"name": "encoder_decoder", **LAYERS, "depth": 4, "mlp_dim": 272},
        "objective": {"name": "denoising"},
        "data.corruption": {"name": "span_corruption", "rate": 0.15, "mean_span": 3.0},
        "data.length": 116,
    },
    "small_encoder_decoder": {
        "model.backbone": {"name": "encoder_decoder", **LAYERS, "depth": 2, "mlp_dim": 272},
        "objective": {"name": "denoising"},
        "data.corruption": {"name": "span_corruption", "rate": 0.15, "mean_span": 3.0},
        "data.length": 116,
    },
    "infilling": {
        "model.backbone": {"name": "encoder_decoder", **LAYERS, "depth": 2, "mlp_dim": 192},
        "objective": {"name": "denoising"},
        "data.corruption": {
            "name": "text_infilling",
            "rate": 0.3,
            "mean_span": 3.0,
            "permute_sentences": False,
        },
        "data.length": 143,
    },
}


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "backbones", ("smoke", "labelled", *list(MODELS)[1:]))
    c = common.base()
    c.title = "Backbones: encoder-only, decoder-only, encoder–decoder"
    c.study = {**common.STUDY, "module": "experiments.backbones", "models": tuple(MODELS), "seeds": 3}
    c.tokenizer = {"name": "bpe", "vocab_size": VOCABULARY, "pattern": "gpt2", "path": "", "special": SPECIAL}
    c.model = {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": VOCABULARY, "width": WIDTH}},
        "backbone": {},
        "decoders": {"text": {"name": "text", "vocab_size": VOCABULARY}},
    }
    splits = {"train": 0.75, "validation": 0.05, "test": 0.2}
    source = {"name": "stdlib", "fractions": splits, "limit": 0, "label": "package", "class_size": 20}
    c.objective = {}
    c.data = {"name": "text", "length": LENGTH, "source": source, "corruption": {}, **common.DATA}
    c.train.update(steps=300, batch_size=16)
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.1)
    c.optimizer.schedule.warmup_steps = 30
    c.eval.update(every=0, limit=64, test_limit=1000, batch_size=32, evaluators=("probe", "continuation"))
    c.eval.probe = {"length": 96, "per_document": 8, "train_examples": 2000, "test_examples": 1000}
    c.eval.continuation = {"length": 96, "share": 0.25, "per_document": 2, "examples": 96}
    c.checkpoint.update(every=100, keep=1, keep_best=0)
    for field, value in MODELS.get(arg, MODELS["decoder_only"]).items():
        section, _, name = field.rpartition(".")
        (c[section] if section else c)[name] = value
    if arg == "labelled":
        labelled(c)
    if arg == "smoke":
        c.study.update(models=("decoder_only", "encoder_only", "encoder_decoder"), seeds=1)
        c.data.source.fractions = {"train": 0.2, "validation": 0.02, "test": 0.05, "unused": 0.73}
        c.train.update(steps=4, batch_size=4)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=8, test_limit=32, batch_size=16)
        c.eval.probe.update(train_examples=80, test_examples=16)
        c.eval.continuation.examples = 8
        c.log.every = 2
    return c


def labelled(c: ConfigDict) -> None:
    """The same study on another corpus; the tokenizer is trained on its texts as well."""
    c.data.source = {
        "name": "jsonl",
        "dir": "",
        "paths": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "text_field": "text",
        "label_field": "label",
    }
    common.own_folder(c)
