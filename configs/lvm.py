"""Images alone at the centre: visual sentences, from which a task is inferred, and images pixel by pixel.

    configs/lvm.py          large vision model (LVM, Bai et al. 2024) in the small: sentences of image and annotation
                            pairs, drawn by procedure. Which of twelve functions of colours the annotation is (a
                            permutation of red, green and blue, inverted or not) must be inferred from the examples
    configs/lvm.py:recolor  the same with any permutation of six colours; held-out sentences have permutations that
                            training never saw. It takes longer to be learned
    configs/lvm.py:igpt     image GPT (Chen et al. 2020) on scikit-learn's digits: pixels in raster order, and a linear
                            probe of every layer
    configs/lvm.py:smoke    a few steps of the first

Images are tokens of a palette, k-means of the pixels' colours. `visual_accuracy_n` is the share of right tokens of the
answer after n example pairs, `visual_shuffled_accuracy_n` the control whose examples tell nothing of the task.
"""

from ml_collections import ConfigDict

from configs import common
from vfm.backbones.decoder_only import GPT2, LLAMA
from vfm.tokenizers.palette import SPECIAL

SIZE, COLORS, PAIRS = 4, 8, 4


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "lvm", ("igpt", "recolor", "smoke"))
    c = common.base()
    c.title = "Visual sentences: the task is inferred from examples"
    c.tokenizer = {"name": "palette", "vocab_size": len(SPECIAL) + COLORS, "special": SPECIAL, "path": ""}
    length, answer = 1 + (2 * SIZE**2 + 2) * (PAIRS + 1), SIZE**2
    c.model = model(len(SPECIAL) + COLORS, length + answer, LLAMA)
    # Half of each head sees short distances, the other half colours at any distance.
    c.model.backbone.update(num_token_types=2, rope_theta=100.0, rope_fraction=0.5)
    c.objective = {"name": "next_token"}
    sizes = {"train": 20_000, "validation": 1000, "test": 1000}
    c.data = {
        "name": "visual_sentences",
        "length": length,
        "source": {"name": "shapes", "size": SIZE, "colors": COLORS, "noise": 0.0, "sizes": sizes},
        "pairs": PAIRS,
        "tasks": ("copy", "invert", "channels", "channels+invert"),
        "targets": "annotations",
        "aligned": True,
        **common.DATA,
    }
    c.train.update(steps=2500, batch_size=32)
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.05)
    c.eval.update(every=1000, evaluators=("visual",), test_limit=512)
    if arg == "recolor":
        recolor(c)
    if arg == "igpt":
        igpt(c)
    if arg == "smoke":
        c.train.update(steps=4, batch_size=8)
        c.optimizer.schedule.warmup_steps = 2
        c.data.source.sizes.train = 200
        c.eval.update(limit=8, test_limit=8, batch_size=8, visual={"pairs": (0, PAIRS)})
        c.log.every = 2
    return c


def model(vocab_size: int, max_len: int, style: dict, width: int = 64, depth: int = 3) -> dict:
    """Table of codes, backbone and head; no projectors, for the codes are the centre."""
    return {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": vocab_size, "width": width}},
        "backbone": {
            "name": "decoder_only",
            "width": width,
            "depth": depth,
            "num_heads": 4,
            "mlp_dim": 2 * width if style["gated"] else 4 * width,
            "max_len": max_len,
            "remat": "dots",  # faster on CPU than to keep the results of elementwise steps
            **style,
        },
        "decoders": {"text": {"name": "text", "vocab_size": vocab_size}},
    }


def recolor(c: ConfigDict) -> None:
    """A permutation must be read off the examples, pixel by pixel, for there are too many to know them all."""
    c.title = "Visual sentences: a permutation of colours is inferred from examples"
    colors = 6
    c.data.source.colors, c.data.tasks = colors, ("recolor",)
    for block in (c.tokenizer, c.model.encoders.text, c.model.decoders.text):
        block.vocab_size = len(SPECIAL) + colors
    c.train.steps = 8000


def igpt(c: ConfigDict) -> None:
    """17 greys in raster order; the probe tells which layer knows the digit."""
    c.title = "Image GPT on handwritten digits"
    c.tokenizer.vocab_size = len(SPECIAL) + 17
    c.model = model(c.tokenizer.vocab_size, 1 + 64, GPT2, depth=6)
    del c.data.tasks, c.data.pairs, c.data.targets, c.data.aligned, c.data.source
    c.data.update(length=1 + 64, source={"name": "digits"})
    c.train.update(steps=1500, batch_size=64, ema=0.99)
    c.model.backbone.dropout = 0.1
    c.eval.update(every=500, evaluators=("visual", "probe"), test_limit=0)
