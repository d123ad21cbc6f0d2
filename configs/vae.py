"""The variational autoencoder of Burda et al. (2016, section 5), and its like with codes.

    python -m experiments.main --config=configs/vae.py --workdir=runs/vae

    configs/vae.py          scikit-learn's handwritten digits, binarised; no network
    configs/vae.py:mnist    MNIST through TFDS, binarised anew in every epoch, as in the paper, whose VAE has
                            log p(x) = -86.8 nats there, and 19 active units of 50, after 3280 epochs of batches of 20;
                            these are 170 epochs of batches of 100. Set --config.data.dir
    configs/vae.py:vq       the first with codes in place of the Gaussian: bits per dimension, and use of the codebook
    configs/vae.py:smoke    a few steps of the first

By flags: --config.objective.samples=5 trains the bound of 5 samples (IWAE); --config.objective.beta=4.0;
--config.objective.warmup=2000.
"""

from ml_collections import ConfigDict

from configs import common

SPECIAL = ("<pad>", "<bos>", "<eos>")


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "vae", ("smoke", "mnist", "vq"))
    c = common.base()
    c.title = "Variational autoencoder: scikit-learn's handwritten digits, binarised"
    c.tokenizer = {"name": "byte", "special": SPECIAL}  # there is no text
    c.model = model(item_shape=(8, 8, 1), tokens=1, width=50, bottleneck={"name": "gaussian"})
    c.objective = {
        "name": "reconstruction",
        "likelihood": "bernoulli",
        "beta": 1.0,
        "warmup": 0,
        "samples": 1,
        "eval_samples": 64,
        "codebook": 1.0,
        "commitment": 0.25,
    }
    c.data = {**common.DATA, "name": "items", "length": 1, "source": {"name": "digits"}}
    c.data.binarize = {"image": "stochastic"}
    c.train.update(steps=4000, batch_size=100)
    c.optimizer.update(learning_rate=3e-3, weight_decay=0.0, clip_norm=1000.0)
    c.eval.update(every=1000, limit=0, evaluators=("reconstruction",), batch_size=180)
    c.eval.reconstruction = {"features": "pixels", "shown": 8, "interpolations": 4}
    c.checkpoint.update(every=1000)
    if arg == "mnist":
        mnist(c)
    if arg == "vq":
        # By averages, with restarts: the codes are in use from the first step on.
        neck = {"name": "vq", "codebook_size": 64, "update": "ema", "codebook_init": "data", "restart": 20}
        c.title = "VQ-VAE: scikit-learn's handwritten digits, binarised"
        c.model = model(item_shape=(8, 8, 1), tokens=4, width=8, bottleneck=neck)
        c.objective.eval_samples = 1
    if arg == "smoke":
        c.train.update(steps=6, batch_size=16)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(every=0, limit=20, test_limit=20, batch_size=20)
        c.objective.eval_samples = 4
        c.log.every = 2
    return c


def model(item_shape, tokens, width, bottleneck) -> dict:
    half = {
        "name": "mlp",
        "item_shape": item_shape,
        "hidden": (200, 200),
        "activation": "tanh",
        "num_tokens": tokens,
    }
    return {
        "centre": "image",
        "dtype": "float32",
        "backbone": {},
        "encoders": {"image": {**half, "width": width, "bottleneck": bottleneck}},
        "decoders": {"image": {**half, "output": "sigmoid"}},
    }


def mnist(c: ConfigDict) -> None:
    c.title = "Variational autoencoder: MNIST, binarised"
    c.model = model(item_shape=(28, 28, 1), tokens=1, width=50, bottleneck={"name": "gaussian"})
    c.data.source = {
        "name": "tfds",
        "dataset": "mnist:3.0.1",
        "data_dir": "",
        "cache": True,
        "features": {"image": "image", "label": "label"},
        "splits": {"train": "train[:59000]", "validation": "train[59000:]", "test": "test"},
    }
    common.own_folder(c)
    c.train.steps = 100_000
    c.eval.update(every=20_000, batch_size=500)
    c.checkpoint.every = 5000
