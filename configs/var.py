"""Class-conditional next-scale prediction (VAR, Tian et al. 2024): a pyramid of codes, coarse to fine.

    python -m experiments.main --config=configs/var.py:first --workdir=runs/var_first
    python -m experiments.main --config=configs/var.py --workdir=runs/var --config.init.path=runs/var_first

    configs/var.py:first          the first stage on scikit-learn's handwritten digits: an autoencoder whose latents are
                                  codes of several scales; no network
    configs/var.py                the model of these codes, under the class; the first stage is frozen
    configs/var.py:fashion_first  the first stage for Fashion-MNIST through TFDS; set
                                  --config.data.dir; this one and the next are of a size for a GPU
    configs/var.py:fashion        the model of its codes
    configs/var.py:smoke          a few steps of the second, with a first stage that has learned nothing

`sample_image_agreement` is the share of drawn digits that a classifier, fitted on real ones, takes for the class that
was asked for.
"""

from ml_collections import ConfigDict

from configs import common

SPECIAL = ("<pad>", "<bos>", "<eos>")
CLASSES = 10


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "var", ("smoke", "first", "fashion_first", "fashion"))
    fashion = arg.startswith("fashion")
    c = common.base()
    what = "Fashion-MNIST" if fashion else "scikit-learn's handwritten digits"
    c.title = f"Next-scale prediction: {what}"
    c.tokenizer = {"name": "byte", "special": SPECIAL}  # there is no text
    size, channels = ((28, 28), 16) if fashion else ((8, 8), 8)
    widths, scales, codes = ((64, 128, 128), (1, 2, 3, 5, 7), 512) if fashion else ((32, 32), (1, 2, 3, 4), 64)
    if arg == "smoke":
        widths, scales = (8, 8), (1, 4)
    encoder, decoder = halves(size, widths, channels, scales, codes)
    c.data = {**common.DATA, "name": "items", "length": 1, "source": {"name": "digits"}}
    c.data.update(ranges={"image": (0.0, 1.0)}, augment={"image": {"rotate": 10.0, "scale": 0.1}})
    c.eval.update(every=0, batch_size=180)
    c.checkpoint.update(every=0, keep_best=0)
    if arg.endswith("first"):
        c.title = f"First stage of next-scale prediction: {what}"
        c.model = {
            "centre": "image",
            "dtype": "float32",
            "backbone": {},
            "encoders": {"image": encoder},
            "decoders": {"image": decoder},
        }
        c.objective = {"name": "reconstruction", "likelihood": "mse"}
        c.train.update(steps=2000, batch_size=64)
        c.optimizer.update(learning_rate=2e-3, weight_decay=0.0)
        c.eval.evaluators = ("reconstruction",)
    else:
        width, depth, heads = (384, 12, 6) if fashion else (96, 4, 4)
        c.model = model(width, depth, heads, (*size, 1), {"encoder": encoder, "decoder": decoder})
        c.init.match = tuple(
            (f"decoders_image/latent_{half}/(.*)", rf"{half}s_image/\1") for half in ("encoder", "decoder")
        )
        c.optimizer.frozen = ("decoders_image/latent_(encoder|decoder)/.*",)
        c.objective = {"name": "generation"}
        c.data.classes = CLASSES
        c.train.update(steps=2500, batch_size=64, ema=0.995)
        c.optimizer.update(learning_rate=1e-3, weight_decay=0.05)
        c.eval.evaluators = ("generation",)
        c.eval.generation = {"features": "judge", "guidance": 2.0, "temperature": 1.0, "top_k": 0}
    if fashion:
        c.data.source = {
            "name": "tfds",
            "dataset": "fashion_mnist:3.0.1",
            "data_dir": "",
            "cache": True,
            "features": {"image": "image", "label": "label"},
            "splits": {"train": "train[:59000]", "validation": "train[59000:]", "test": "test"},
        }
        common.own_folder(c)
        c.data.augment = {}
        c.train.update(steps=20_000, batch_size=256)
        c.optimizer.update(learning_rate=3e-4)
        c.eval.update(test_limit=2000, batch_size=500, judge_examples=10_000)
        c.checkpoint.update(every=5000)
    if arg == "smoke":
        c.init.match, c.optimizer.frozen = (), ()
        c.model.decoders.image.update(width=16, depth=1)
        c.train.update(steps=6, batch_size=16)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=20, test_limit=20, batch_size=20, judge_examples=200)
        c.log.every = 2
    return c


def halves(size, widths, channels, scales, codes) -> tuple[dict, dict]:
    """Encoder and decoder of the first stage; the codebook is of averages, and what is not used is replaced."""
    half = {
        "name": "latent",
        "image_size": size,
        "widths": widths,
        "mid_attention": False,
        "latent_channels": channels,
    }
    bottleneck = {
        "name": "multiscale_vq",
        "scales": scales,
        "codebook_size": codes,
        "update": "ema",
        "decay": 0.99,
        "codebook_init": "data",
        "restart": 100,
    }
    return {**half, "bottleneck": bottleneck}, half


def model(width, depth, num_heads, item_shape, latent) -> dict:
    return {
        "centre": "label",
        "dtype": "float32",
        "backbone": {},
        "encoders": {"label": {"name": "label", "num_classes": CLASSES, "width": width}},
        "decoders": {
            "image": {
                "name": "var",
                "item_shape": item_shape,
                "width": width,
                "depth": depth,
                "num_heads": num_heads,
                "mlp_dim": 4 * width,
                "qk_norm": "head",
                "dropout": 0.1,
                "condition_dropout": 0.1,
                "conditioning": "adaln",
                "latent": latent,
            }
        },
    }
