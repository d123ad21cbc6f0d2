"""Fusion encoders: one Transformer reads an image and a text together (survey section 1.3).

The task is an exclusive or of the two: is the digit of the image odd and that of the word even, or the other way round?
Neither says anything of the answer alone.

    configs/fusion.py             concatenated self-attention: the image's features and the text are one sequence
    configs/fusion.py:cross       cross-attention: the text asks, the image answers
    configs/fusion.py:image_only  the first without the text: at chance
    configs/fusion.py:text_only   the first without the image: at chance
    configs/fusion.py:pretrain    the first, trained on masked letters, masked places, and matching of image and word
    configs/fusion.py:smoke       a few steps of pretrain

`label_accuracy` is that of the task on held-out images; with pretrain, of the question whether image and word match.
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits import WORDS

SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>")
VOCABULARY = 256 + len(SPECIAL)
SLOTS = 4  # of an image: the places of its last feature map
WORD = 2 + max(map(len, WORDS))  # with <bos> and <eos>


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "fusion", ("cross", "image_only", "text_only", "pretrain", "smoke"))
    c = common.base()
    c.title = "Fusion encoder: exclusive or of an image and a word"
    c.tokenizer = {"name": "byte", "special": SPECIAL}
    c.model = model()
    c.objective = {"name": "classification"}
    c.data = {
        "name": "parity",
        "length": SLOTS + WORD,
        "sources": {"image": {"name": "digits"}},
        "words": WORDS,
        "inputs": ("image", "text"),
        "shown": ("image", "text"),
        "augment": {"image": {"shift": 1, "rotate": 10.0, "scale": 0.1}},
        "decoder_length": 0,
        **common.DATA,
    }
    c.train.update(steps=600, batch_size=64, ema=0.99)
    c.optimizer.update(learning_rate=1e-3, weight_decay=0.05)
    c.eval.update(every=300, batch_size=128)
    if arg == "cross":
        c.model.backbone.name = "cross_encoder"
        c.data.update(length=SLOTS, decoder_length=WORD)
    if arg in ("image_only", "text_only"):
        c.data.shown = (arg.removesuffix("_only"),)
    if arg in ("pretrain", "smoke"):
        pretrain(c)
    if arg == "smoke":
        c.train.update(steps=4, batch_size=16)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=32, test_limit=32, batch_size=16)
        c.log.every = 2
    return c


def model(width: int = 64) -> dict:
    """Word and image go through encoders, and together through the backbone; a decoder of labels gives the answer."""
    stack = {"width": width, "depth": 2, "num_heads": 4, "mlp_dim": 2 * width}
    return {
        "centre": "text",
        "encoders": {
            "text": {"name": "text", "vocab_size": VOCABULARY, "width": width},
            "image": {
                "name": "vgg",
                "image_size": (8, 8),
                "stages": (2, 2),
                "widths": (width // 2, width),
                "norm": "group",
            },
        },
        "input_projectors": {"image": {"name": "linear", "width": width}},
        "backbone": {"name": "encoder_only", "max_len": SLOTS + WORD, "norm_position": "pre", **stack},
        "output_projectors": {},
        "decoders": {"label": {"name": "classifier", "pooling": "first", "num_classes": 2}},
    }


def pretrain(c: ConfigDict) -> None:
    """Masked letters, masked places of the image (VL-BERT), and whether image and word belong together."""
    c.title = "Fusion encoder: pretraining on images and words"
    c.model.decoders.text = {"name": "text", "vocab_size": VOCABULARY}
    c.model.output_projectors.image = {"name": "linear", "width": c.model.backbone.width}
    c.train.steps = 1500
    c.objective = {"name": "fusion", "text": 1.0, "region": 1.0, "matching": 1.0}
    del c.data.shown
    c.data.update(name="matching", mismatched=0.5, text_rate=0.15, unit="token", mask="<mask>", region_rate=0.15)
