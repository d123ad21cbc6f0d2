"""A small LLaMA-style language model on the source text of Python's standard library, bytes as tokens.

The single-modality special case: encoder -> backbone -> decoder, no projectors.

    configs/lm.py         a few minutes on a laptop
    configs/lm.py:gpt2    the same in the GPT-2 style, with tied embeddings
    configs/lm.py:smoke   a few steps
"""

from ml_collections import ConfigDict

from configs import common
from vfm.backbones.decoder_only import GPT2, LLAMA


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "lm", ("smoke", "gpt2"))
    c = common.base()
    c.title = "Language model of Python's standard library"
    width, length = 128, 256
    c.tokenizer = {"name": "byte"}
    style = GPT2 if arg == "gpt2" else LLAMA
    c.model = {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": 259, "width": width}},
        "backbone": {
            "name": "decoder_only",
            "width": width,
            "depth": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "mlp_dim": 256 if style["gated"] else 512,
            "max_len": 2 * length,
            **style,
        },
        "decoders": {"text": {"name": "text", "vocab_size": 259, "tied": arg == "gpt2"}},
    }
    c.objective = {"name": "next_token"}
    c.data = {"name": "text", "length": length, "source": {"name": "stdlib"}, **common.DATA}
    c.train.update(steps=2000, batch_size=16)
    c.generate.update(text="def ", max_new=200, temperature=0.7)
    if arg == "smoke":
        c.data.source.limit = 20
        c.data.length = 64
        c.train.update(steps=4, batch_size=8)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=16, test_limit=16, batch_size=8)
        c.log.every = 2
    return c
