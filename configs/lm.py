"""Language models: raw text -> tokenizer -> packing -> training -> bits per byte and samples, in one command.

The single-modality special case: encoder -> backbone -> decoder, no projectors.

    configs/lm.py              a small LLaMA on the source text of Python's standard library; BPE is trained first
    configs/lm.py:gpt2         the same in the GPT-2 style, with tied embeddings
    configs/lm.py:bytes        the same without a tokenizer: bytes as tokens
    configs/lm.py:corpus       your own text: JSON lines train.jsonl, validation.jsonl and test.jsonl in
                               --config.data.dir, as experiments.prepare writes them; other names by
                               --config.data.source.paths.train=NAME
    configs/lm.py:shakespeare  the character-level CPU setting of nanoGPT (4 layers, width 128, context 64, batch 12,
                               2000 steps) on Tiny Shakespeare through TFDS; set --config.data.dir
    configs/lm.py:smoke        a few steps of the first
"""

from ml_collections import ConfigDict, FieldReference

from configs import common
from vfm.backbones.decoder_only import GPT2, LLAMA


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "lm", ("smoke", "gpt2", "bytes", "corpus", "shakespeare"))
    c = common.base()
    c.title = "Language model of Python's standard library"
    length = 256
    vocabulary = FieldReference(4096)  # --config.tokenizer.vocab_size is that of the model
    c.tokenizer = {"name": "bpe", "vocab_size": vocabulary, "pattern": "gpt2", "path": ""}
    c.model = model(vocabulary, length, GPT2 if arg == "gpt2" else LLAMA)
    c.objective = {"name": "next_token"}
    c.data = {"name": "text", "length": length, "source": {"name": "stdlib"}, **common.DATA}
    c.train.update(steps=2000, batch_size=16)
    c.eval.update(evaluators=("text",))
    c.generate.update(text="def ", max_new=128, temperature=0.7)
    if arg in ("bytes", "shakespeare"):
        bytes_as_tokens(c)
    if arg == "corpus":
        corpus(c)
    if arg == "shakespeare":
        shakespeare(c)
    if arg == "smoke":
        c.data.source.limit = 20
        c.data.length = 64
        c.tokenizer.vocab_size = 512
        c.train.update(steps=4, batch_size=8)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=16, test_limit=16, batch_size=8)
        c.generate.max_new = 16
        c.log.every = 2
    return c


def model(vocab_size: int | FieldReference, length: int, style: dict, width: int = 128, depth: int = 4) -> dict:
    """Encoder, backbone and decoder; the GPT-2 style ties encoder and decoder."""
    return {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": vocab_size, "width": width}},
        "backbone": {
            "name": "decoder_only",
            "width": width,
            "depth": depth,
            "num_heads": 4,
            "mlp_dim": 2 * width if style["gated"] else 4 * width,
            "max_len": 2 * length,
            "remat": "dots",  # faster on CPU than to keep the results of elementwise steps
            **style,
        },
        "decoders": {"text": {"name": "text", "vocab_size": vocab_size, "tied": style is GPT2}},
    }


def bytes_as_tokens(c: ConfigDict) -> None:
    """No tokenizer to train; 256 bytes and three special tokens."""
    c.tokenizer = {"name": "byte"}
    for block in (c.model.encoders.text, c.model.decoders.text):
        block.vocab_size = 259


def corpus(c: ConfigDict) -> None:
    c.title = "Language model of a corpus"
    paths = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    c.data.source = {"name": "jsonl", "dir": "", "paths": paths, "text_field": "text"}
    common.own_folder(c)
    c.generate.text = ""


def shakespeare(c: ConfigDict) -> None:
    """Sizes, batch and steps of nanoGPT's CPU run, which reports a validation loss of 1.88 nats per character."""
    c.title = "Characters of Shakespeare, as nanoGPT on a CPU"
    c.data.source = {
        "name": "tfds",
        "dataset": "tiny_shakespeare:1.0.0",
        "data_dir": "",
        "features": {"text": "text"},
        "splits": {"train": "train", "validation": "validation", "test": "test"},
    }
    common.own_folder(c)
    c.data.length, c.model.backbone.max_len = 64, 256
    c.train.update(steps=2000, batch_size=12)
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.1)
    c.eval.limit = 0
    c.generate.update(text="ROMEO:", temperature=0.8)
