import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vfm import tree
from vfm.decoders.dit import CONDITIONINGS, DiT
from vfm.errors import UserError

FIELDS = dict(width=16, depth=2, num_heads=2, mlp_dim=24, frequencies=8)
X = jax.random.normal(jax.random.key(0), (3, 4, 6, 2))
T = jnp.array([0.0, 3.0, 900.0])
CONDITION = jax.random.normal(jax.random.key(1), (3, 5, 7))
ADAPTIVE = ("adaln_zero", "adaln")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def initial(model, x=X, condition=CONDITION, **more):
    return jax.jit(lambda key: model.init(key, x, T, condition, **more, train=False)["params"])(jax.random.key(2))


def some(params, seed=3):
    """Random values: initial ones hide faults, for many are zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda path, leaf: jnp.asarray(rng.normal(path.endswith("scale"), 0.2, leaf.shape), leaf.dtype),
        tree.paths(params), params)  # fmt: skip


def runner(model):
    return jax.jit(lambda params, *a, **k: model.apply({"params": params}, *a, **k, train=False)[0])


@pytest.fixture(scope="module", params=CONDITIONINGS)
def built(request):
    model = DiT(conditioning=request.param, out_channels=4, **FIELDS)
    params = initial(model)
    return request.param, runner(model), params, some(params)


def test_nothing_comes_out_at_the_start(built):
    _, run, params, _ = built
    y = run(params, X, T, CONDITION)
    assert y.shape == (3, 4, 6, 4)
    np.testing.assert_array_equal(y, 0)


def test_item_time_and_every_condition_token_count(built):
    name, run, _, params = built
    y = run(params, X, T, CONDITION)
    assert np.abs(y - run(params, X, T + 50, CONDITION)).max() > 1e-3
    assert np.abs(y - run(params, X, T, None)).max() > 1e-3
    for p in range(CONDITION.shape[1]):
        moved = run(params, X, T, CONDITION.at[0, p].add(1.0))
        assert np.abs(moved[0] - y[0]).max() > 1e-4, p
        np.testing.assert_array_equal(moved[1:], y[1:])
    # Every output sees the whole item.
    moved = run(params, X.at[:, 0, 0].add(1.0), T, CONDITION)
    assert (np.abs(moved - y).max(axis=(1, 2, 3)) > 1e-4).all() and np.abs(moved - y)[:, -1, -1].max() > 1e-5


def test_adaptive_norms_see_the_mean_of_the_condition_and_the_others_its_tokens(built):
    name, run, _, params = built
    swapped = CONDITION.at[:, 0].add(1.0).at[:, 1].add(-1.0)
    difference = np.abs(run(params, X, T, swapped) - run(params, X, T, CONDITION)).max()
    assert difference < 1e-4 if name in ADAPTIVE else difference > 1e-3


def test_masked_condition_tokens_do_not_count(built):
    _, run, _, params = built
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    y = run(params, X, T, CONDITION, condition_mask=mask)
    moved = run(params, X, T, jnp.where(mask[..., None], CONDITION, CONDITION + 1), condition_mask=mask)
    np.testing.assert_allclose(moved, y, atol=1e-6)
    short = run(params, X, T, CONDITION[:, :3], condition_mask=mask[:, :3])
    np.testing.assert_allclose(short, y, atol=1e-5)
    assert np.abs(run(params, X, T, CONDITION)[:2] - y[:2]).max() > 1e-3


@pytest.mark.slow
def test_each_block_may_have_its_own_embedders():
    """Equal ones are the shared ones."""
    shared, own = DiT(**FIELDS), DiT(embedders="per_block", **FIELDS)
    params = some(initial(shared))
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params["embedder"])
    again = {**{k: v for k, v in params.items() if k != "embedder"}, "embedders": {"layers": layers}}
    assert jax.tree.map(jnp.shape, initial(own)) == jax.tree.map(jnp.shape, again)
    y = runner(own)(again, X, T, CONDITION)
    np.testing.assert_allclose(y, runner(shared)(params, X, T, CONDITION), atol=1e-5)
    again["embedders"]["layers"] = jax.tree.map(lambda leaf: leaf.at[1].add(0.1), layers)
    assert np.abs(runner(own)(again, X, T, CONDITION) - y).max() > 1e-3


CONTROL = jax.random.normal(jax.random.key(5), (3, 8, 12, 1))


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_control_changes_nothing_until_its_last_layers_are_trained(conditioning):
    fields = dict(conditioning=conditioning, **FIELDS)
    plain, model = DiT(**fields), DiT(control_depth=1, **fields)
    params = initial(model, control=CONTROL)
    base = initial(plain)
    assert set(params) - set(base) == {"control", "control_patch", "control_projection", "control_out"}
    values = some(base)
    with_control = {**params, **values}
    run = runner(model)
    expected = runner(plain)(values, X, T, CONDITION)
    np.testing.assert_array_equal(run(with_control, X, T, CONDITION, control=CONTROL), expected)
    np.testing.assert_array_equal(run(with_control, X, T, CONDITION), expected)
    # The last layers learn first, and then the rest does.
    loss = lambda p: jnp.square(run(p, X, T, CONDITION, control=CONTROL)).sum()
    gradients = tree.flatten(jax.jit(jax.grad(loss))(with_control))
    assert np.abs(gradients["control_out/layers/projection/kernel"]).max() > 0
    trained = {**some(params), **values}
    y = run(trained, X, T, CONDITION, control=CONTROL)
    assert np.abs(y - expected).max() > 1e-3
    assert np.abs(run(trained, X, T, CONDITION, control=-CONTROL) - y).max() > 1e-3
    norms = {path: float(jnp.abs(g).max()) for path, g in tree.flatten(jax.jit(jax.grad(loss))(trained)).items()}
    assert not [path for path, norm in norms.items() if norm == 0 and not path.endswith("key/bias")]


@pytest.mark.parametrize(
    "fields, shape, words",
    [
        ({"patch_size": 4}, X.shape, r"patch_size=4 does not divide the sides \(4, 6\)"),
        ({"conditioning": "film"}, X.shape, "unknown conditioning 'film'.*adaln, adaln_zero, cross_attention"),
        ({"embedders": "own"}, X.shape, "unknown embedders 'own'"),
        ({"embedders": "per_block", "conditioning": "in_context"}, X.shape, "per_block.*not 'in_context'"),
        ({"width": 18}, X.shape, "a width that 4 divides, not 18"),
    ],
)
def test_what_does_not_fit_is_refused(fields, shape, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: DiT(**{**FIELDS, **fields}).init(jax.random.key(0), jnp.zeros(shape), T, train=False))


def test_a_control_that_does_not_fit_is_refused():
    shapes = lambda control, **fields: jax.eval_shape(lambda: DiT(**FIELDS, **fields).init(
        jax.random.key(0), X, T, control=jnp.zeros(control), train=False))  # fmt: skip
    with pytest.raises(UserError, match="control_depth from 1 to depth=2, not None"):
        shapes((3, 8, 12, 1))
    with pytest.raises(UserError, match=r"sides \(8, 13\) must be multiples of the grid \(2, 3\)"):
        shapes((3, 8, 13, 1), control_depth=1)
