"""Models without a backbone that give items: autoencoders, generative decoders under any condition, discriminators."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import model as model_lib
from vfm import objectives
from vfm.decoders import DECODERS
from vfm.encoders import ENCODERS
from vfm.errors import UserError
from vfm.sharding import PARAMETER_AXES

SHAPE = (4, 4, 1)


class Noisy(nn.Module):
    """The smallest generative decoder: a Gaussian around a map of the condition."""

    item_shape: tuple[int, ...] = SHAPE
    in_width: int | None = None
    num_tokens: int | None = None
    dtype: str = "float32"

    generative = True

    def setup(self):
        self.projection = nn.Dense(16)
        self.query_start = self.param("query_start", nn.initializers.normal(1.0), (8,))

    def _mean(self, condition, batch_size):
        pooled = self.query_start[None].repeat(batch_size, axis=0) if condition is None else condition.mean(axis=1)
        return self.projection(pooled).reshape(-1, *self.item_shape)

    def __call__(self, condition, items=None, *, train: bool):
        mean = self._mean(condition, 1 if items is None else len(items))
        if items is None:
            return None, {}
        noise = jax.random.normal(self.make_rng("noise"), items.shape)
        square = jnp.square(mean + noise - items)
        halves = jnp.split(square, 2, axis=1)
        scales = jnp.stack([half.mean(axis=(1, 2, 3)) for half in halves], axis=1)
        return None, {"losses": {"square": square.mean(axis=(1, 2, 3))}, "scales": scales}

    def sample(self, condition, *, rng, batch_size=None, scale=1.0):
        mean = self._mean(condition, batch_size)
        return mean + scale * jax.random.normal(rng, mean.shape)


class Flat(nn.Module):
    """A discriminator: one logit for an item."""

    @nn.compact
    def __call__(self, items, *, train: bool):
        return nn.Dense(1)(items.reshape(len(items), -1)), {}


@pytest.fixture
def tables(monkeypatch):
    from vfm.discriminators import DISCRIMINATORS

    monkeypatch.setitem(DECODERS, "noisy", Noisy)
    monkeypatch.setitem(DISCRIMINATORS, "flat", Flat)
    assert "vit" in ENCODERS and PARAMETER_AXES  # what the models below stand on


VIT = {"name": "vit", "image_size": SHAPE[:2], "channels": 1, "patch_size": 2, "width": 8, "depth": 1, "num_heads": 2}
CONV = {"name": "autoencoder", "grid": (2, 2), "upsample": (2,), "conv_width": 8}
BACKBONE = {"name": "decoder_only", "width": 8, "depth": 1, "num_heads": 2, "max_len": 16}


def run(cfg, inputs, rng=None, length=8, **more):
    """(model, variables, out) of a model at random parameters."""
    model = model_lib.build(cfg)
    variables = jax.jit(lambda key: model_lib.init(model, key, length))(jax.random.key(0))
    call = lambda v: model.apply(v, inputs=inputs, **more, train=False, rngs=None if rng is None else {"noise": rng})
    return model, variables, jax.jit(call)(variables)[1]


def images(*lead):
    return jax.random.uniform(jax.random.key(3), (*lead, *SHAPE))


def test_encoder_and_decoder_alone_are_an_autoencoder():
    cfg = {"centre": "image", "backbone": None, "encoders": {"image": VIT}, "decoders": {"image": CONV}}
    model, variables, out = run(cfg, {"image": images(2, 3)})
    assert out["image"]["reconstructed"].shape == (2, 3, *SHAPE)
    assert sorted(variables["params"]) == ["decoders_image", "encoders_image"]
    encoded = model.encoders["image"].apply({"params": variables["params"]["encoders_image"]}, images(6), train=False)
    decoded = DECODERS["autoencoder"](**{k: v for k, v in CONV.items() if k != "name"}).apply(
        {"params": variables["params"]["decoders_image"]}, encoded[0], train=False
    )
    np.testing.assert_allclose(out["image"]["reconstructed"].reshape(decoded[0].shape), decoded[0], atol=1e-5)


def test_generative_decoder_is_conditioned_on_the_centre(tables):
    cfg = {"centre": "source", "backbone": None, "encoders": {"source": VIT}, "decoders": {"image": {"name": "noisy"}}}
    inputs = {"source": images(2, 1), "image": images(2, 1) + 1}
    model, variables, out = run(cfg, inputs, jax.random.key(1))
    assert out["image"]["condition"].shape == (2, 1, 4, 8)
    assert out["image"]["losses"]["square"].shape == (2, 1)
    sample = lambda out, **settings: model.apply(
        variables, "image", out, rng=jax.random.key(2), method="sample", **settings
    )
    assert sample(out).shape == (2, 1, *SHAPE)
    # It is the condition that counts.
    _, _, other = run(cfg, {"source": images(2, 1)[::-1]})
    np.testing.assert_allclose(sample(other, scale=0.0), sample(out, scale=0.0)[::-1], atol=1e-5)
    assert np.abs(np.asarray(sample(other, scale=0.0) - sample(out, scale=0.0))).max() > 1e-3
    assert "losses" not in other["image"]  # without items there is nothing to compare with


def test_without_rng_no_losses_are_drawn(tables):
    cfg = {"centre": "image", "backbone": None, "decoders": {"image": {"name": "noisy"}}}
    _, _, out = run(cfg, {"image": images(2, 1)})
    assert "losses" not in out["image"]


def test_unconditional_decoder_samples_without_any_input(tables):
    cfg = {"centre": "image", "backbone": None, "decoders": {"image": {"name": "noisy"}}}
    model, variables, out = run(cfg, {"image": images(2, 1)}, jax.random.key(1))
    assert out["image"]["losses"]["square"].shape == (2, 1) and "condition" not in out["image"]
    drawn = model.apply(variables, "image", {}, rng=jax.random.key(2), batch_size=5, method="sample")
    assert drawn.shape == (5, 1, *SHAPE)


def test_hidden_states_of_the_signals_are_the_condition(tables):
    text = {"name": "text", "vocab_size": 300, "width": 8}
    cfg = {
        "centre": "text",
        "backbone": BACKBONE,
        "encoders": {"text": text},
        "decoders": {"text": {"name": "text", "vocab_size": 300}, "image": {"name": "noisy", "num_tokens": 3}},
    }
    tokens = jnp.arange(16).reshape(2, 8)
    more = {"tokens": tokens, "signal_starts": {"image": jnp.array([[4], [-1]])}}
    model, variables, out = run(cfg, {"image": images(2, 1)}, jax.random.key(1), **more)
    assert variables["params"]["signals_image"].shape == (3, 8)
    np.testing.assert_allclose(out["image"]["condition"][0, 0], out["output"][0, 4:7], atol=1e-6)
    for name, count in (("generation", 1), ("any_to_any", 1)):
        loss_fn = objectives.build({"name": name}, model)
        batch = {"inputs": {"image": images(2, 1)}, "targets": tokens, "loss_mask": jnp.ones((2, 8)), **more}
        terms, _ = loss_fn(variables["params"], {}, batch, jax.random.key(5), train=True)
        assert terms["generation_image_square"][2] == count  # the second row generates none


def test_losses_by_scale_are_metrics_of_the_same_items(tables):
    cfg = {"centre": "source", "backbone": None, "encoders": {"source": VIT}, "decoders": {"image": {"name": "noisy"}}}
    inputs = {"source": images(2, 1), "image": images(2, 1) + 1}
    model, variables, _ = run(cfg, inputs)
    batch = {"inputs": inputs, "example_mask": jnp.array([1.0, 0.0])}
    loss_fn = objectives.build({"name": "generation"}, model)
    terms, aux = loss_fn(variables["params"], {}, batch, jax.random.key(5), train=True)
    _, total, count = terms["generation_image_square"]
    scales = [aux.metrics[f"generation_image_scale_{s}"] for s in range(2)]
    assert len(aux.metrics) == 2 and count == 1 and [n for _, n in scales] == [1, 1]
    assert float(scales[0][0] + scales[1][0]) / 2 == pytest.approx(float(total), rel=1e-5)
    assert float(scales[0][0]) != pytest.approx(float(scales[1][0]), rel=1e-3)


def test_any_number_of_features_needs_a_number_of_slots(tables):
    cfg = {"centre": "text", "backbone": BACKBONE, "encoders": {"text": {"name": "text", "width": 8}}}
    cfg["decoders"] = {"text": {"name": "text"}, "image": {"name": "noisy"}}
    with pytest.raises(UserError, match="num_tokens"):
        model_lib.build(cfg)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"decoders": {"sound": CONV}}, ("decoders.sound", "encoders.sound")),
        ({"decoders": {"image": {**CONV, "grid": (3, 3)}}}, ("number of features", "9")),
        ({"decoders": {"image": {**CONV, "upsample": (4,)}}}, ("items of shape", "(8, 8, 1)")),
        ({"output_projectors": {"image": {"name": "linear", "width": 8}}}, ("output_projectors.image", "generative")),
        ({"discriminators": {"sound": {"name": "flat"}}}, ("sound", "model.discriminators")),
        ({"decoders": {"image": {"name": "noisy", "in_width": 9}}}, ("gives width 8", "takes width 9")),
        ({"decoders": {"image": {"name": "noisy", "num_tokens": 5}}}, ("number of features 4", "5")),
    ],
)
def test_halves_that_do_not_fit_are_refused(tables, change, words):
    cfg = {"centre": "image", "backbone": None, "encoders": {"image": VIT}, "decoders": {"image": CONV}, **change}
    with pytest.raises(UserError) as error:
        model_lib.build(cfg)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_numbers_of_items_must_agree(tables):
    cfg = {"centre": "source", "backbone": None, "encoders": {"source": VIT}, "decoders": {"image": {"name": "noisy"}}}
    with pytest.raises(UserError, match="an item of image from each item of source"):
        run(cfg, {"source": images(2, 1), "image": images(2, 3)}, jax.random.key(1))


def test_discriminator_is_made_and_judges_items(tables):
    cfg = {"centre": "image", "backbone": None, "encoders": {"image": VIT}, "decoders": {"image": CONV}}
    cfg["discriminators"] = {"image": {"name": "flat"}}
    model, variables, _ = run(cfg, {"image": images(2, 3)})
    assert "discriminators_image" in variables["params"]
    logits, _ = model.apply(variables, "image", images(2, 3), train=False, method="discriminate")
    assert logits.shape == (6, 1)
