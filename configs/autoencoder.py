"""Autoencoders with the same latents: plain, variational, vector-quantised, and adversarial (VQGAN).

    python -m experiments.study --config=configs/autoencoder.py --workdir=runs/autoencoders   the study
    python -m experiments.main --config=configs/autoencoder.py --workdir=runs/autoencoder     its plain autoencoder

    configs/autoencoder.py              scikit-learn's handwritten digits, 8×8; no network
    configs/autoencoder.py:spectrogram  spectrograms of synthesised digits (`vfm/data/speech.py`), 32×32; no network
    configs/autoencoder.py:tfds         MNIST through TFDS, 28×28; set --config.data.dir
    configs/autoencoder.py:digits       the halves of configs/digits.py's image modality, to be loaded into its model
    configs/autoencoder.py:smoke        a few steps of the first, of two models

The survey's step (section 2.3.1): the trained halves become ME and MD of a foundation model, here frozen:

    python -m experiments.main --config=configs/autoencoder.py:digits --workdir=runs/halves
    python -m experiments.main --config=configs/digits.py --workdir=runs/whole --config.init.path=runs/halves \\
        --config.init.match="('(en|de)coders_image/.*',)" --config.optimizer.frozen="('(en|de)coders_image/.*',)"
"""

from ml_collections import ConfigDict

from configs import common, digits

SPECIAL = ("<pad>", "<bos>", "<eos>")
# Of the latents: a grid of H / 2^(levels - 1) rows and columns, CHANNELS numbers at each place.
CHANNELS, CODES = 4, 256


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "autoencoder", ("smoke", "spectrogram", "tfds", "digits"))
    c = common.base()
    c.title = "Autoencoders with the same latents: scikit-learn's handwritten digits"
    c.study = {**common.STUDY, "module": "experiments.autoencoder", "seeds": 3, "variation_seeds": 1, "schemes": ()}
    c.tokenizer = {"name": "byte", "special": SPECIAL}  # there is no text
    c.model = model(image_size=(8, 8), widths=(8, 16, 32))
    c.objective = {"name": "reconstruction", "likelihood": "mse"}
    c.data = {**common.DATA, "name": "items", "length": 1, "source": {"name": "digits"}}
    c.data.ranges = {"image": (0.0, 1.0)}
    c.train.update(steps=1200, batch_size=64)
    c.optimizer.update(learning_rate=2e-3, weight_decay=0.0)
    c.optimizer.schedule.warmup_steps = 100
    c.eval.update(every=0, evaluators=("reconstruction", "generation"), batch_size=200)
    c.eval.reconstruction = {"features": "judge", "probe_examples": 2000}
    c.eval.generation = {"features": "judge", "density": "", "components": 10}
    c.checkpoint.update(every=0, keep_best=0)
    if arg == "spectrogram":
        spectrograms(c)
    if arg == "tfds":
        recorded(c)
    if arg == "digits":
        halves(c)
    if arg == "smoke":
        c.study.update(seeds=1, schemes=("AE", "VQGAN"))
        c.model = model(image_size=(8, 8), widths=(8, 8))
        c.train.update(steps=6, batch_size=16)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.reconstruction.probe_examples = 100
        c.eval.update(limit=40, test_limit=40, batch_size=40, judge_examples=200)
        c.log.every = 2
    return c


def model(image_size, widths) -> dict:
    """The two halves; what stands between them is the study's to say."""
    half = {
        "name": "latent",
        "image_size": image_size,
        "widths": widths,
        "mid_attention": False,
        "latent_channels": CHANNELS,
    }
    return {
        "centre": "image",
        "dtype": "float32",
        "backbone": {},
        "encoders": {"image": {**half, "bottleneck": {"name": "none"}}},
        "decoders": {"image": half},
        "discriminators": {},
    }


def spectrograms(c: ConfigDict) -> None:
    """32 frames of 19 ms, 32 mel bands."""
    c.title = "Autoencoders with the same latents: spectrograms of synthesised digits"
    c.model = model(image_size=(32, 32), widths=(8, 8, 16, 32))
    sizes = {"train": 1500, "validation": 200, "test": 500}
    c.data.source = {"name": "spectrograms", "source": {"name": "speech", "sizes": sizes}}
    c.train.update(steps=800, batch_size=16)


def recorded(c: ConfigDict) -> None:
    """MNIST as TFDS has it."""
    c.title = "Autoencoders with the same latents: MNIST"
    c.model = model(image_size=(28, 28), widths=(8, 16, 32))
    c.data.source = digits.recorded_sources("", samples=1)["image"]
    common.own_folder(c)
    c.train.update(steps=800, batch_size=32)
    c.eval.test_limit = 2000


def halves(c: ConfigDict) -> None:
    """The blocks of configs/digits.py, field by field, as an autoencoder."""
    c.title = "The encoder and the decoder of images of configs/digits.py, as an autoencoder"
    theirs = digits.get_config().model
    c.model.encoders = {"image": theirs.encoders.image}
    c.model.decoders = {"image": theirs.decoders.image}
    c.data.augment = digits.get_config().data.augment
    c.eval.evaluators = ("reconstruction",)
