import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from tests import tiny
from vfm import model as model_lib
from vfm import tree
from vfm.decoders.diffusion import Diffusion
from vfm.errors import UserError

NETWORK = {"name": "dit", "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24, "frequencies": 8}
FIELDS = dict(item_shape=(4, 6, 1), network=NETWORK, process={"name": "gaussian", "timesteps": 20})
CONDITION = jax.random.normal(jax.random.key(1), (3, 2, 7))
ITEMS = jax.random.uniform(jax.random.key(2), (3, 4, 6, 1))
KEY = jax.random.key(4)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def make(**fields):
    """A decoder that can be a static argument of jit."""
    fields = {**FIELDS, **fields}
    return Diffusion(
        **{name: FrozenDict(value) if isinstance(value, dict) else value for name, value in fields.items()}
    )


def build(seed=3, condition=CONDITION, items=ITEMS, **fields):
    """(decoder, variables with random values)."""
    decoder = make(**fields)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), condition, items, train=False))
    rng = np.random.default_rng(seed)
    return decoder, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def built():
    return build()


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def losses(decoder, variables, condition=CONDITION, items=ITEMS, train=False, rng=KEY):
    return decoder.apply(variables, condition, items, train=train, rngs={"noise": rng})[1]["losses"]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("steps", "sampler", "batch_size"))
def sample(decoder, variables, condition=CONDITION, *, steps=3, rng=KEY, **settings):
    return decoder.apply(variables, condition, steps=steps, rng=rng, **settings, method="sample")


def test_losses_and_samples(built):
    decoder, variables = built
    found = losses(decoder, variables)
    assert set(found) == {"noise"} and found["noise"].shape == (3,)
    drawn = sample(decoder, variables)
    assert drawn.shape == ITEMS.shape and drawn.min() >= 0 and drawn.max() <= 1
    np.testing.assert_array_equal(drawn, sample(decoder, variables))
    assert np.abs(drawn - sample(decoder, variables, rng=jax.random.key(5))).max() > 1e-2
    assert np.abs(drawn - sample(decoder, variables, -CONDITION)).max() > 1e-3
    assert np.abs(drawn - sample(decoder, variables, sampler="ddpm")).max() > 1e-2


def test_guidance_of_one_is_the_conditional_and_zero_the_null_condition(built):
    decoder, variables = built
    drawn = sample(decoder, variables)
    traced = lambda s: sample(decoder, variables, guidance=s)  # a traced number
    np.testing.assert_allclose(traced(1.0), drawn, atol=1e-5)
    without = sample(decoder, variables, None, batch_size=3)
    np.testing.assert_allclose(traced(0.0), without, atol=1e-5)
    assert np.abs(traced(4.0) - drawn).max() > 1e-3


@pytest.mark.slow
def test_learned_variance_is_that_of_the_condition_under_guidance():
    """The network's output for the prediction is guided, its variance is not."""
    process = {"name": "gaussian", "timesteps": 20, "variance": "learned_range"}
    decoder, variables = build(process=process)
    assert set(losses(decoder, variables)) == {"noise", "vlb"}

    def outputs(module, x, t):
        return [module._denoiser(c, 3, s, None)(x, t) for c, s in ((CONDITION, 1.0), (None, 1.0), (CONDITION, 2.0))]

    x, t = 2 * ITEMS - 1, jnp.array([3, 3, 3])
    one, none, two = nn_apply(decoder, variables, outputs, x, t)
    np.testing.assert_allclose(two[..., :1], 2 * one[..., :1] - none[..., :1], atol=1e-5)
    np.testing.assert_allclose(two[..., 1:], one[..., 1:], atol=1e-6)
    assert np.abs(one[..., 1:] - none[..., 1:]).max() > 1e-4


def nn_apply(decoder, variables, method, *arguments):
    return jax.jit(lambda v: decoder.apply(v, *arguments, method=method))(variables)


def test_rows_lose_their_condition_in_training_alone():
    decoder, variables = build(condition_dropout=0.5)
    plain = make(condition_dropout=0.0)
    own = {"params": {k: v for k, v in variables["params"].items() if k != "unconditional"}}
    expected = losses(plain, own)["noise"]
    null = losses(plain, own, variables["params"]["unconditional"]["null_condition"][None].repeat(3, axis=0))["noise"]
    np.testing.assert_allclose(losses(decoder, variables)["noise"], expected, rtol=1e-5)
    dropped = 0
    for seed in range(8):  # each row is one or the other; draws differ from those without dropout in no other way
        key = jax.random.key(seed)
        with_condition = losses(plain, own, rng=key)["noise"]
        found = losses(decoder, variables, train=True, rng=key)["noise"]
        dropped += int((np.abs(found - with_condition) > 1e-5).sum())
    assert 4 <= dropped <= 20 and np.abs(expected - null).max() > 1e-4


def test_without_any_condition():
    decoder, variables = build(condition=None)
    assert "unconditional" not in variables["params"]
    assert losses(decoder, variables, None)["noise"].shape == (3,)
    assert sample(decoder, variables, None, batch_size=2).shape == (2, 4, 6, 1)
    with pytest.raises(UserError, match="guidance needs a condition and a null condition"):
        sample(decoder, variables, None, batch_size=2, guidance=2.0)
    with pytest.raises(UserError, match="needs a condition or batch_size"):
        sample(decoder, variables, None)


def test_spectrograms_in_their_own_range_by_flow_matching():
    items = jax.random.uniform(jax.random.key(2), (3, 6, 4)) * 9 - 8
    decoder, variables = build(items=items, item_shape=(6, 4), value_range=(-8.0, 1.0), process={"name": "flow"})
    assert set(losses(decoder, variables, items=items)) == {"velocity"}
    drawn = sample(decoder, variables, sampler="heun")
    assert drawn.shape == (3, 6, 4) and drawn.min() >= -8 and drawn.max() <= 1 and drawn.min() < -1
    inside = nn_apply(decoder, variables, lambda m, x: (m._inside(x), m._outside(m._inside(x))), items)
    assert inside[0].min() >= -1 and inside[0].max() <= 1
    np.testing.assert_allclose(inside[1], items, atol=1e-5)


def test_bits_per_dimension_of_noise_are_those_of_a_uniform_guess_or_more(built):
    decoder, variables = build(process={"name": "gaussian", "timesteps": 20, "levels": 17})
    items = jnp.round(ITEMS * 16) / 16
    run = lambda v: decoder.apply(v, CONDITION, items, rng=KEY, method="bits_per_dim")
    assert (jax.jit(run)(variables) > np.log2(17)).all()
    with pytest.raises(UserError, match="Gaussian process"):
        flow, variables = build(process={"name": "flow"})
        flow.apply(variables, CONDITION, items, rng=KEY, method="bits_per_dim")


VIT = {"name": "vit", "image_size": (4, 6), "channels": 1, "patch_size": 2, "width": 8, "depth": 1, "num_heads": 2}
LATENT = {"encoder": VIT, "decoder": {"name": "autoencoder", "grid": (2, 3), "upsample": (2,), "conv_width": 8}}


@pytest.mark.slow
def test_latent_space_of_a_frozen_first_stage():
    network = {**NETWORK, "patch_size": 1}
    decoder, variables = build(network=network, latent={**LATENT, "scale": 0.5})
    assert set(variables["params"]) == {"denoiser", "unconditional", "latent_encoder", "latent_decoder"}

    def first_stage(decoder, items):
        inside = decoder._inside(items)
        features, _ = decoder.latent_encoder(items, train=False)
        return inside, decoder._outside(inside), decoder.latent_decoder(features, train=False)[0]

    inside, through, reconstructed = nn_apply(decoder, variables, first_stage, ITEMS)
    assert inside.shape == (3, 2, 3, 8)
    np.testing.assert_allclose(through, reconstructed, atol=1e-5)
    assert sample(decoder, variables).shape == ITEMS.shape
    loss = lambda v: decoder.apply(v, CONDITION, ITEMS, train=True, rngs={"noise": KEY})[1]["losses"]["noise"].sum()
    for path, gradient in tree.flatten(jax.jit(jax.grad(loss))(variables)["params"]).items():
        if path.startswith("latent_"):
            assert not gradient.any(), path


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"network": {**NETWORK, "patch_size": 4}}, "patch_size=4 does not divide"),
        ({"network": {**NETWORK, "depht": 3}}, "unknown field 'depht'.*did you mean 'depth'"),
        ({"network": {"name": "unet"}}, "unknown block 'unet'.*dit"),
        ({"process": {"name": "gauss"}}, "unknown process 'gauss'.*flow, gaussian"),
        ({"process": {"name": "gaussian", "steps": 3}}, "unknown field 'steps'"),
        ({"condition_dropout": 1.0}, "condition_dropout=1.0 must be"),
        ({"value_range": (1.0, 0.0)}, "value_range=.1.0, 0.0. must rise"),
        ({"latent": {"encoder": VIT}}, "latent needs the field 'decoder'"),
        ({"latent": {**LATENT, "decoder": {**LATENT["decoder"], "grid": (2, 2)}}}, "do not fit item_shape"),
        ({"latent": {**LATENT, "decoder": {**LATENT["decoder"], "in_width": 9}}}, "each other: width 8 and 9"),
        ({"control": {"form": "edges"}}, "unknown field 'form'.*did you mean 'from'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(UserError, match=words) as error:
        build(**fields)
    assert "\n" not in str(error.value)


def test_items_of_another_shape_are_refused(built):
    decoder, variables = built
    with pytest.raises(UserError, match=r"draws items of shape \(4, 6, 1\), not \(4, 4, 1\)"):
        losses(decoder, variables, items=ITEMS[:, :, :4])


@pytest.mark.slow
def test_one_batch_can_be_overfitted_and_drawn():
    """Two classes with one image each: what is drawn for a class is its image."""
    network = {**NETWORK, "width": 32, "mlp_dim": 64, "num_heads": 4}
    decoder = {"name": "diffusion", **FIELDS, "network": network, "process": {"name": "gaussian", "prediction": "v"}}
    model = model_lib.build({"centre": "label", "backbone": None, "decoders": {"image": decoder},
                             "encoders": {"label": {"name": "label", "num_classes": 2, "width": 8}}})  # fmt: skip
    labels = jnp.arange(16)[:, None] % 2
    images = jnp.round(jax.random.uniform(jax.random.key(7), (2, 4, 6, 1)))[labels]
    variables = jax.jit(lambda key: model_lib.init(model, key, 1))(jax.random.key(0))
    tx = optax.adam(3e-3)

    def step(carry, key):
        variables, state = carry

        def loss(v):
            call = {"inputs": {"label": labels, "image": images}, "train": True, "rngs": {"noise": key}}
            return model.apply(v, **call)[1]["image"]["losses"]["noise"].mean()

        value, gradient = jax.value_and_grad(loss)(variables)
        update, state = tx.update(gradient, state)
        return (optax.apply_updates(variables, update), state), value

    run = jax.jit(lambda v: jax.lax.scan(step, (v, tx.init(v)), jax.random.split(KEY, 400)))
    (variables, _), values = run(variables)
    assert values[-20:].mean() < 0.3 * values[:5].mean()

    @jax.jit
    def draw(variables):
        _, out = model.apply(variables, inputs={"label": labels}, train=False)
        return model.apply(variables, "image", out, rng=KEY, steps=20, guidance=2.0, method="sample")

    assert np.abs(draw(variables) - images).mean() < 0.1
