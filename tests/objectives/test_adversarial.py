"""Adversarial training: both gradients in one step, the adaptive weight, the warm-up, and the brake."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from tests import tiny
from vfm import model as model_lib
from vfm import objectives, tree
from vfm.errors import UserError
from vfm.objectives.adversarial import FIRST, LOSSES, RELEASE, SETTLED, adaptive_weight, guarded, routed
from vfm.objectives.reconstruction import reconstruction

SHAPE, ROWS = (8, 8, 1), 4
ENCODER = {"name": "vgg", "image_size": SHAPE[:2], "stages": (1,), "widths": (8,), "norm": "none"}
CONV = {"name": "autoencoder", "grid": (4, 4), "upsample": (2,), "conv_width": 8}
VGG = {"name": "vgg", "stages": (1, 1), "widths": (8, 8), "norm": "none"}
KERNEL = "decoders_image/conv_out/kernel"


def config(norm="group"):
    return {
        "centre": "image",
        "backbone": None,
        "encoders": {"image": ENCODER},
        "decoders": {"image": CONV},
        "discriminators": {"image": {"name": "patchgan", "width": 8, "depth": 1, "norm": norm}},
    }


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick_compilation():
        yield


@functools.cache
def start(norm="group"):
    """(model, parameters, the model's other variables)"""
    model = model_lib.build(config(norm))
    variables = dict(jax.jit(lambda key: model_lib.init(model, key, 8))(jax.random.key(0)))
    return model, variables.pop("params"), variables


def batch(rows=ROWS, seed=1):
    return {
        "inputs": {"image": jax.random.uniform(jax.random.key(seed), (rows, 1, *SHAPE))},
        "example_mask": jnp.ones(rows),
    }


@functools.cache
def compiled(norm, train, fields):
    """(loss_fn, (parameters, variables, batch) -> (gradient, terms, aux))"""
    loss_fn = objectives.build({"name": "adversarial", **dict(fields)}, start(norm)[0])

    def scalar(params, variables, data):
        terms, aux = loss_fn(params, variables, data, jax.random.key(2), train=train)
        return total(terms), (terms, aux)

    return loss_fn, jax.jit(jax.grad(scalar, has_aux=True))


def make(norm="group", step=10**6, train=True, **fields):
    """((parameters, variables, batch) -> (gradient by path, terms, aux), parameters, variables at a step)"""
    _, params, more = start(norm)
    loss_fn, gradient = compiled(norm, train, FrozenDict(fields))
    variables = {**more, **loss_fn.variables(params)}
    variables["adversarial"]["step"] = jnp.int32(step)

    def run(params, variables, data):
        found, (terms, aux) = gradient(params, variables, data)
        return tree.flatten(found), terms, aux

    return run, params, variables


def total(terms):
    return sum(w * value / n for w, value, n in terms.values())


def by_hand(params, variables, data, norm="group", loss="hinge", r1=0.0, weight=0.5, perceptual=None):
    """(gradients of the autoencoder's own loss, of the discriminator's own loss, λ), from separate losses."""
    model = start(norm)[0]
    real, of_loss = data["inputs"]["image"], LOSSES[loss]
    plain = reconstruction(model)

    def reconstruct(params):
        terms, _ = plain(params, variables, data, jax.random.key(2), train=True)
        (_, out), _ = model.apply(
            {"params": params, **variables},
            inputs=data["inputs"],
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        fake = out["image"]["reconstructed"]
        value = total(terms)
        if perceptual is not None:
            value = value + 0.7 * perceptual(variables["perceptual"]["image"], fake[:, 0], real[:, 0]).mean()
        return value, fake

    def judge(params, items):
        return model.apply(
            {"params": params, **variables}, "image", items, train=True, method="discriminate", mutable=["batch_stats"]
        )[0][0]

    def generator(params):
        fake = reconstruct(params)[1]
        return of_loss[1](judge(jax.lax.stop_gradient(params), fake)).mean()

    def discriminator(params, fake):
        value = of_loss[0](judge(params, real), judge(params, fake)).mean()
        if r1:
            mean = lambda x: judge(params, x).reshape(ROWS, -1).mean(axis=1).sum()
            value = value + r1 / 2 * jnp.square(jax.grad(mean)(real)).sum() / ROWS
        return value

    def both(params):
        at_kernel = lambda f: jnp.linalg.norm(tree.flatten(jax.grad(f)(params))[KERNEL].ravel())
        found = at_kernel(lambda p: reconstruct(p)[0]) / (at_kernel(generator) + 1e-4)
        autoencoder = jax.grad(lambda p: reconstruct(p)[0] + weight * found * generator(p))(params)
        return autoencoder, jax.grad(discriminator)(params, reconstruct(params)[1]), found

    of_autoencoder, of_discriminator, found = jax.jit(both)(params)
    return tree.flatten(of_autoencoder), tree.flatten(of_discriminator), found


@pytest.mark.parametrize(
    "loss, norm, r1",
    [
        ("hinge", "batch", 2.0),
        pytest.param("vanilla", "group", 0.0, marks=pytest.mark.slow),
        pytest.param("non_saturating", "none", 2.0, marks=pytest.mark.slow),
    ],
)
def test_one_step_has_the_gradients_of_both_losses_alone(loss, norm, r1):
    network = {"random": VGG}
    run, params, variables = make(
        norm, loss=loss, r1=r1, weight=0.5, perceptual=network, perceptual_weight=0.7, guard=0.0
    )
    data = batch()
    found, terms, aux = run(params, variables, data)
    from vfm.objectives.perceptual import Perceptual

    net = Perceptual(network, "image", SHAPE, "test")
    of_autoencoder, of_discriminator, factor = by_hand(params, variables, data, norm, loss, r1, perceptual=net)
    np.testing.assert_allclose(aux.metrics["adaptive_weight_image"][0], factor, rtol=1e-4)
    assert set(terms) >= {"perceptual_image", "g_loss_image", "d_loss_image"} and ("r1_image" in terms) == bool(r1)
    moved = set()
    for path, gradient in found.items():
        wanted = (of_discriminator if path.startswith("discriminators") else of_autoencoder)[path]
        np.testing.assert_allclose(gradient, wanted, atol=1e-6 + 1e-4 * np.abs(wanted).max(), err_msg=path)
        moved |= {path.split("/")[0]} if np.abs(wanted).max() > 1e-6 else set()
    assert moved == {"encoders_image", "decoders_image", "discriminators_image"}


def test_adaptive_weight_is_that_of_torch():
    pytest.importorskip("torch")
    from vfm.parity import torch_adversarial

    assert torch_adversarial.adaptive() < 1e-4


def test_adaptive_weight_is_bounded():
    assert adaptive_weight(jnp.full((3, 4), 2.0), jnp.zeros((3, 4))) == 1e4
    np.testing.assert_allclose(adaptive_weight(jnp.full((4,), 3.0), jnp.full((4,), 0.5)), 6 / 1.0001, rtol=1e-6)


def test_a_routed_value_has_the_gradient_given():
    x = jnp.arange(3.0)
    value, gradient = jax.value_and_grad(lambda x: 2 * routed(x.sum() ** 2, x, jnp.array([1.0, 5.0, -2.0])))(x)
    assert value == 18
    np.testing.assert_array_equal(gradient, [2, 10, -4])


def test_the_discriminator_begins_before_the_generator_has_its_loss():
    data, found = batch(), {}
    for step, factors in {6: (0, 0), 7: (0, 1), 9: (0, 1), 10: (1, 1)}.items():
        run, params, variables = make(step=step, start=10, lead=3, adaptive=False, weight=1.0)
        found[step], terms, aux = run(params, variables, data)
        assert (terms["g_loss_image"][0], terms["d_loss_image"][0]) == factors
        assert aux.variables["adversarial"]["step"] == step + 1
    alone = reconstruction(start()[0])
    plain = jax.jit(jax.grad(lambda p: total(alone(p, {}, data, jax.random.key(2), train=True)[0])))(params)
    for path, gradient in tree.flatten(plain).items():
        if path.startswith("discriminators"):
            assert not np.asarray(found[6][path]).any()
            np.testing.assert_array_equal(found[9][path], found[10][path])
        else:
            np.testing.assert_allclose(found[9][path], gradient, atol=1e-6)
    assert np.asarray(found[7]["discriminators_image/conv_out/kernel"]).any()
    assert np.abs(np.asarray(found[10][KERNEL] - found[9][KERNEL])).max() > 1e-4


def test_rows_that_only_fill_a_batch_do_not_count():
    run, params, variables = make(perceptual={"random": VGG})
    data, more = batch(), batch(ROWS + 2, seed=5)
    images = more["inputs"]["image"].at[:ROWS].set(data["inputs"]["image"])
    filled = {"inputs": {"image": images}, "example_mask": jnp.ones(ROWS + 2).at[ROWS:].set(0)}
    found, terms, _ = run(params, variables, data)
    other, others, _ = run(params, variables, filled)
    for name in terms:
        np.testing.assert_allclose(others[name][1:], terms[name][1:], rtol=1e-4, err_msg=name)
    for path in found:
        np.testing.assert_allclose(other[path], found[path], atol=1e-5, err_msg=path)


def test_evaluation_changes_nothing_and_uses_the_last_weight():
    run, params, variables = make("batch", step=3)
    data = batch()
    _, _, trained = run(params, variables, data)
    before, after = (tree.flatten(v["batch_stats"]) for v in (variables, trained.variables))
    path = "discriminators_image/norm_1/mean"
    assert np.abs(np.asarray(after[path] - before[path])).max() > 0
    assert set(trained.variables) == set(variables)
    evaluate, _, _ = make("batch", train=False)
    _, terms, same = evaluate(params, trained.variables, data)
    jax.tree.map(np.testing.assert_array_equal, same.variables, trained.variables)
    weight = trained.variables["adversarial"]["image"]["weight"]
    assert weight == trained.metrics["adaptive_weight_image"][0] and weight != 1
    np.testing.assert_allclose(terms["g_loss_image"][0], weight, rtol=1e-6)


def test_the_guard_brakes_when_the_error_rises_and_lets_go_slowly():
    def course(errors, guard=1.5):
        def step(state, inputs):
            state = guarded(state, *inputs, guard)
            return state, state

        start = {kind: jnp.float32(FIRST[kind]) for kind in ("mean", "lowest", "share")}
        return jax.lax.scan(step, start, (jnp.arange(len(errors), dtype=jnp.float32), jnp.float32(errors)))[1]

    settles = [np.linspace(5, 1, SETTLED), np.ones(150)]
    errors = np.concatenate([*settles, np.full(300, 1.4), np.full(300, 4.0), np.ones(2 * RELEASE)])
    found = jax.jit(course)(errors)
    share = np.asarray(found["share"])
    assert (share[:500] == 1).all()  # an error that falls, and one that rises less than the factor
    assert (np.diff(share[500:800]) <= 0).all() and share[520] == share[799] == 0
    assert (np.diff(share[800:]) <= 1 / RELEASE + 1e-6).all() and 0 < share[1000] < 0.25 and share[-1] == 1
    np.testing.assert_allclose(found["lowest"][-1], 1.0, rtol=0.05)
    halfway = jax.jit(course)(np.concatenate([*settles, np.full(300, 1.75)]))
    np.testing.assert_allclose(halfway["share"][-1], 2 - 1.75 / (1.5 * float(halfway["lowest"][-1])), atol=1e-4)
    assert (np.asarray(course(errors, guard=0.0)["share"]) == 1).all()


@pytest.mark.slow
def test_the_guard_saves_the_reconstruction_from_a_discriminator_that_is_too_strong():
    import optax

    from vfm.train.state import TrainState
    from vfm.train.step import make_train_step

    final = {}
    for guard in (0.0, 1.5):
        fields = {"weight": 50.0, "adaptive": False, "start": 200, "guard": guard}
        _, params, variables = make(step=0, **fields)
        tx = optax.adam(3e-3)
        state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), variables, {}, jax.random.key(0))
        step = jax.jit(make_train_step(compiled("group", True, FrozenDict(fields))[0], tx, lambda _: 3e-3))
        for k in range(500):
            state, measured = step(state, batch(16, seed=k % 7))
        own = state.variables["adversarial"]["image"]
        final[guard] = float(own["mean"]) / float(own["lowest"])
    assert final[1.5] < 6 and final[0.0] > 5 * final[1.5], final


@pytest.mark.parametrize(
    "fields, change, words",
    [
        ({"loss": "wgan"}, {}, ("wgan", "non_saturating")),
        ({"weight": -1.0}, {}, ("weight=-1.0",)),
        ({"start": 3, "lead": 4}, {}, ("lead=4", "start=3")),
        ({"guard": 0.5}, {}, ("guard=0.5", "at least 1")),
        ({}, {"discriminators": {}}, ("model.discriminators", "patchgan")),
        ({"reconstruction": {"loss": "l1"}}, {}, ("loss", "likelihood")),
        ({"perceptual": {"random": {"name": "vit"}}}, {}, ("perceptual", "ViT")),
    ],
    ids=["loss", "weight", "lead", "guard", "discriminators", "reconstruction", "perceptual"],
)
def test_what_does_not_fit_is_refused(fields, change, words):
    with pytest.raises(UserError) as error:
        objectives.build({"name": "adversarial", **fields}, model_lib.build({**config(), **change}))
    assert all(word in str(error.value) for word in words), error.value


def test_a_decoder_without_a_last_layer_is_refused(monkeypatch):
    from vfm.decoders import DECODERS

    monkeypatch.delattr(DECODERS["autoencoder"], "last_layer")
    with pytest.raises(UserError, match="ConvDecoder declares no `last_layer`"):
        objectives.build({"name": "adversarial"}, start()[0])
    objectives.build({"name": "adversarial", "adaptive": False}, start()[0])
