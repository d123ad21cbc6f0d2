"""A small language model of any family on short texts with labels."""

import json

import jax

from configs import common
from vfm.experiment import Experiment

SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", *(f"<extra_id_{i}>" for i in range(8)))
FAMILIES = {
    "next_token": ("decoder_only", "next_token"),
    "prefix_lm": ("decoder_only", "next_token"),
    "masked": ("encoder_only", "masked"),
    "span_corruption": ("encoder_decoder", "denoising"),
    "text_infilling": ("encoder_decoder", "denoising"),
}
LENGTH, VOCABULARY = 24, 256 + len(SPECIAL) + 4  # four ids that no token has
ANIMALS = ("cat", "dog", "cow")


def documents(count=30):
    """Texts of 6 to 10 bytes that name their class."""
    return [{"text": f"{ANIMALS[i % 3]} {i:02}" + "x" * (i % 5), "label": ANIMALS[i % 3]} for i in range(count)]


def experiment(folder, corruption="next_token", objective=(), whole=False, **changes) -> Experiment:
    """An experiment whose splits are one file; `objective`: more of its fields; `whole`: no document is cut."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents()))
    backbone, name = FAMILIES[corruption]
    c = common.base()
    c.tokenizer = {"name": "byte", "special": SPECIAL}
    c.model = {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": VOCABULARY, "width": 16}},
        "backbone": {"name": backbone, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "max_len": 40,
                     "positions": "rope", "gated": False},
        "decoders": {"text": {"name": "text", "vocab_size": VOCABULARY}},
    }  # fmt: skip
    c.objective = {"name": name, **dict(objective)}
    paths = dict.fromkeys(("train", "validation", "test"), str(path))
    source = {"name": "jsonl", "paths": paths, "label_field": "label"}
    c.data = {
        "name": "text",
        "length": LENGTH,
        "source": source,
        "corruption": {"name": corruption},
        **common.DATA,
    }
    c.eval.update(batch_size=8, evaluators=("probe", "continuation"))
    c.eval.continuation = {"length": 8, "share": 0.25, "examples": 12}
    c.eval.probe = {"length": 8, "features": ()}
    c.mesh.data = 1
    if whole:
        c.data.packing = "first_fit"
    c.lock()
    c.update_from_flattened_dict(changes)
    return Experiment(c, jax.devices()[:1])
