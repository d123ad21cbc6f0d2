"""Class-conditional diffusion of images with a DiT.

    python -m experiments.main --config=configs/diffusion.py --workdir=runs/diffusion

    configs/diffusion.py                scikit-learn's handwritten digits, 8×8; no network
    configs/diffusion.py:latent         the same in the latents of an autoencoder: train configs/autoencoder.py first,
                                        and say where with --config.init.path=runs/autoencoder; its results.json has
                                        latent_std_image: set --config.model.decoders.image.latent.scale to 1 over it
    configs/diffusion.py:fashion_mnist  Fashion-MNIST through TFDS, 28×28; a size for a GPU; set
                                        --config.data.dir
    configs/diffusion.py:flow           the first by flow matching in place of diffusion
    configs/diffusion.py:control        a control branch for edges of the digit that is to be drawn (ControlNet), on the
                                        frozen first: say where that is with --config.init.path=runs/diffusion
    configs/diffusion.py:smoke          a few steps of the first

--config.eval.generation.bits=100 adds the bound on bits per dimension of 100 test images (1000 passes).

By flags: --config.model.decoders.image.network.conditioning=cross_attention (adaln, in_context).
"""

from ml_collections import ConfigDict

from configs import autoencoder, common

SPECIAL = ("<pad>", "<bos>", "<eos>")
CLASSES = 10


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "diffusion", ("smoke", "latent", "fashion_mnist", "flow", "control"))
    c = common.base()
    c.title = "Class-conditional diffusion: scikit-learn's handwritten digits"
    c.tokenizer = {"name": "byte", "special": SPECIAL}  # there is no text
    c.model = model(item_shape=(8, 8, 1), width=96, depth=4, num_heads=4)
    c.objective = {"name": "generation"}
    c.data = {**common.DATA, "name": "items", "length": 1, "source": {"name": "digits"}}
    c.data.update(ranges={"image": (0.0, 1.0)}, classes=CLASSES)
    c.train.update(steps=6000, batch_size=64, ema=0.999)
    c.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
    c.optimizer.schedule.warmup_steps = 200
    c.eval.update(every=0, evaluators=("generation",), batch_size=180)
    c.eval.generation = {"features": "judge", "steps": 50, "guidance": 2.0, "bits": 0}
    c.checkpoint.update(every=2000, keep_best=0)
    if arg == "latent":
        latent(c)
    if arg == "flow":
        c.title = "Class-conditional flow matching: scikit-learn's handwritten digits"
        c.model.decoders.image.process = {"name": "flow"}
    if arg == "control":
        control(c)
    if arg == "fashion_mnist":
        fashion_mnist(c)
    if arg == "smoke":
        c.model = model(item_shape=(8, 8, 1), width=16, depth=1, num_heads=2)
        c.train.update(steps=6, batch_size=16)
        c.optimizer.schedule.warmup_steps = 2
        c.eval.update(limit=20, test_limit=20, batch_size=20, judge_examples=200)
        c.eval.generation.steps = 4
        c.log.every = 2
    return c


def model(item_shape, width, depth, num_heads, levels=17) -> dict:
    return {
        "centre": "label",
        "dtype": "float32",
        "backbone": {},
        "encoders": {"label": {"name": "label", "num_classes": CLASSES, "width": width}},
        "decoders": {
            "image": {
                "name": "diffusion",
                "item_shape": item_shape,
                "value_range": (0.0, 1.0),
                "condition_dropout": 0.1,
                "network": {
                    "name": "dit",
                    "conditioning": "adaln_zero",
                    "patch_size": 2,
                    "width": width,
                    "depth": depth,
                    "num_heads": num_heads,
                    "mlp_dim": 4 * width,
                },
                "process": {
                    "name": "gaussian",
                    "schedule": "cosine",
                    "timesteps": 1000,
                    "prediction": "v",
                    "levels": levels,
                },
            }
        },
    }


def latent(c: ConfigDict) -> None:
    """Diffusion in the latents of the trained, frozen autoencoder of configs/autoencoder.py."""
    c.title = "Class-conditional diffusion in the latents of an autoencoder: scikit-learn's handwritten digits"
    theirs = autoencoder.get_config().model
    decoder = c.model.decoders.image
    decoder.latent = {"encoder": theirs.encoders.image, "decoder": theirs.decoders.image, "scale": 1.0}
    decoder.network.patch_size = 1
    c.init.match = tuple(
        (f"decoders_image/latent_{half}/(.*)", rf"{half}s_image/\1") for half in ("encoder", "decoder")
    )
    c.optimizer.frozen = ("decoders_image/latent_(encoder|decoder)/.*",)


def control(c: ConfigDict) -> None:
    """Copies of the first blocks of the trained, frozen model read the edges as well."""
    c.title = "Class-conditional diffusion with edges as control: scikit-learn's handwritten digits"
    decoder = c.model.decoders.image
    decoder.control = {"from": "edges", "channels": 1}
    decoder.network.control_depth = decoder.network.depth
    c.data.source = {"name": "edges", "source": {"name": "digits"}}
    c.data.ranges.edges = (0.0, 1.0)
    base = r"encoders_label/.*|decoders_image/unconditional/.*|decoders_image/denoiser/(?!control).*"
    c.init.match = ((r"(decoders_image/denoiser/)control/(layers/.*)", r"\1transformer/\2"), base)
    c.optimizer.frozen = (base,)
    c.train.steps = 2000
    c.eval.generation.adherence = "edges"


def fashion_mnist(c: ConfigDict) -> None:
    c.title = "Class-conditional diffusion: Fashion-MNIST"
    c.model = model(item_shape=(28, 28, 1), width=384, depth=12, num_heads=6, levels=256)  # DiT-S
    c.model.dtype = "bfloat16"
    c.data.source = {
        "name": "tfds",
        "dataset": "fashion_mnist:3.0.1",
        "data_dir": "",
        "cache": True,
        "features": {"image": "image", "label": "label"},
        "splits": {"train": "train[:59000]", "validation": "train[59000:]", "test": "test"},
    }
    common.own_folder(c)
    c.train.update(steps=40_000, batch_size=256, ema=0.9999)
    c.optimizer.update(learning_rate=3e-4)
    c.optimizer.schedule.warmup_steps = 1000
    c.eval.update(every=10_000, test_limit=2000, batch_size=500, judge_examples=10_000)
    c.checkpoint.update(every=5000)
