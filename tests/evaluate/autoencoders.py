"""Small autoencoders of scikit-learn's digits, and a decoder that draws what it is told, for tests of evaluators."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import common
from vfm.experiment import Experiment

EVALUATORS = ("reconstruction", "generation")
HALF = {"name": "mlp", "hidden": (8,), "num_tokens": 4}


def config(bottleneck="none", encoder=None, decoder=None, **changes):
    """An autoencoder with a bottleneck, by its name or its fields, or of other blocks; changes of `config.eval`."""
    fields = {"name": bottleneck} if isinstance(bottleneck, str) else bottleneck
    c = common.base()
    c.mesh.data = 1
    c.tokenizer = {"name": "byte", "special": ("<pad>", "<bos>", "<eos>")}
    c.model = {
        "centre": "image",
        "dtype": "float32",
        "backbone": None,
        "encoders": {"image": encoder or {**HALF, "width": 2, "bottleneck": fields}},
        "decoders": {"image": decoder or HALF},
    }
    c.objective = {"name": "generation" if decoder else "any_to_any"}
    c.data = {**common.DATA, "name": "items", "length": 1, "source": {"name": "digits"}}
    c.eval.update(batch_size=32, judge_examples=400, evaluators=EVALUATORS[1:] if decoder else EVALUATORS)
    for name, value in changes.items():
        c.eval[name] = value
    c.lock()
    return c


def build(c) -> Experiment:
    """On one device: more would only make small programs slow."""
    return Experiment(c, jax.devices()[:1])


def identity(key, shape, dtype=jnp.float32):
    return jnp.eye(*shape, dtype=dtype)


class Whole(nn.Module):
    """An encoder whose only feature is the item."""

    item_shape: tuple[int, ...] = (8, 8, 1)
    num_tokens: int = 1
    width: int = 64

    @nn.compact
    def __call__(self, items, *, train: bool):
        return nn.Dense(64, kernel_init=identity, name="projection")(items.reshape(len(items), 1, 64)), {}


class Copy(nn.Module):
    """A generative decoder that draws its condition, in another brightness, and with noise."""

    item_shape: tuple[int, ...] = (8, 8, 1)
    num_tokens: int = 1
    in_width: int | None = None

    generative = True

    def setup(self):
        self.projection = nn.Dense(64, kernel_init=identity)

    def __call__(self, condition, items=None, *, train: bool):
        x = self.projection(condition[:, 0]).reshape(-1, *self.item_shape)
        return None, {} if items is None else {"losses": {"error": jnp.square(x - items).mean(axis=(1, 2, 3))}}

    def sample(self, condition, *, rng, batch_size=None, brightness=1.0, noise=0.0):
        x = self.projection(condition[:, 0]).reshape(-1, *self.item_shape)
        return brightness * x + noise * jax.random.normal(rng, x.shape)
