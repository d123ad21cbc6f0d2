"""VQGAN (Esser et al. 2021): a codebook of images, trained with a discriminator and a perceptual distance.

    python -m experiments.main --config=configs/vqgan.py:features --workdir=runs/features
    python -m experiments.main --config=configs/vqgan.py --workdir=runs/vqgan \\
        --config.objective.perceptual.path=runs/features

    configs/vqgan.py           scikit-learn's handwritten digits, 8×8; no network, minutes on a laptop
    configs/vqgan.py:features  the network of the perceptual distance: a small VGG that learns the labels of the images
    configs/vqgan.py:smoke     a few steps of the first

Without a path the perceptual network is one with random weights. Encoder, codebook, decoder and discriminator learn in
one loop, with one optimizer. Watch `guard_image`: below 1 the discriminator ruins the reconstruction, and is braked.
`code_usage_image` is the share of the codebook that a batch uses.
"""

from ml_collections import ConfigDict

from configs import common

SPECIAL = ("<pad>", "<bos>", "<eos>")
SIZE = (8, 8)
VGG = {"name": "vgg", "stages": (1, 1, 1), "widths": (16, 32, 64), "norm": "group"}


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "vqgan", ("features", "smoke"))
    c = common.base()
    c.title = "VQGAN: scikit-learn's handwritten digits"
    c.tokenizer = {"name": "byte", "special": SPECIAL}  # there is no text
    c.data = {**common.DATA, "name": "items", "length": 1, "source": {"name": "digits"}}
    c.data.ranges = {"image": (0.0, 1.0)}
    c.model = model()
    c.objective = {
        "name": "adversarial",
        "loss": "hinge",
        "weight": 0.2,
        "start": 600,
        "lead": 100,
        "guard": 1.5,
        "perceptual_weight": 0.1,
        "perceptual": {"path": "", "random": VGG},
        "reconstruction": {"likelihood": "l1"},
    }
    c.train.update(steps=2000, batch_size=64)
    # Both networks: less memory of earlier gradients than usual, since each changes what the other learns.
    c.optimizer.update(name="adamw", learning_rate=1e-3, b1=0.5, b2=0.9, weight_decay=0.0)
    # A discriminator that learns as fast as the autoencoder runs ahead of it, and then sees no difference any more.
    c.optimizer.learning_rate_multipliers = (("discriminators_.*", 0.2), (".*", 1.0))
    c.eval.update(every=500, evaluators=("reconstruction",), batch_size=180)
    c.eval.reconstruction = {"features": "judge", "shown": 8}
    c.checkpoint.best_metric = "mse_image"  # the loss has a part that only says who is ahead
    if arg == "features":
        features(c)
    if arg == "smoke":
        c.train.update(steps=6, batch_size=16)
        c.objective.update(start=3, lead=1)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=40, test_limit=40, batch_size=40, judge_examples=200)
        c.log.every = 2
    return c


def model() -> dict:
    """16 latents of 4 numbers for an image, each one of 128 codes."""
    half = {"name": "latent", "image_size": SIZE, "widths": (16, 32), "mid_attention": False, "latent_channels": 4}
    codes = {"name": "vq", "codebook_size": 128, "update": "ema", "codebook_init": "data", "restart": 100}
    return {
        "centre": "image",
        "dtype": "float32",
        "backbone": {},
        "encoders": {"image": {**half, "bottleneck": codes}},
        "decoders": {"image": half},
        "discriminators": {"image": {"name": "patchgan", "width": 16, "depth": 1, "norm": "group"}},
    }


def features(c: ConfigDict) -> None:
    """A classifier, whose feature maps tell what people tell apart."""
    c.title = "A perceptual network: VGG on scikit-learn's handwritten digits"
    c.model = {
        "centre": "image",
        "dtype": "float32",
        "backbone": {},
        "encoders": {"image": {**VGG, "image_size": SIZE}},
        "decoders": {"label": {"name": "classifier", "num_classes": 10}},
    }
    c.objective = {"name": "classification"}
    c.data.augment = {"image": {"shift": 1, "rotate": 10.0, "scale": 0.1}}
    c.train.update(steps=400, ema=0.99)
    c.optimizer.update(b1=0.9, b2=0.999, weight_decay=0.05)
    del c.optimizer.learning_rate_multipliers
    c.eval.evaluators = ()
    del c.eval.reconstruction
    c.checkpoint.best_metric = "loss"
