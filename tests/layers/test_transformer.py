import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import tree
from vfm.errors import UserError
from vfm.layers.attention import Attention, make_mask
from vfm.layers.mlp import MLP
from vfm.layers.transformer import REMAT, Block, Transformer

DEPTH, T, D = 3, 5, 8
FIELDS = dict(num_heads=2, mlp_dim=12, dropout=0.2)
X = jax.random.normal(jax.random.key(0), (2, T, D))
MASK = make_mask(jnp.arange(T), jnp.arange(T), causal=True)


def parameters(model, **call):
    return jax.jit(lambda key: model.init(key, X, train=False, **call)["params"])(jax.random.key(1))


def values_and_gradients(remat, params):
    model = Transformer(depth=DEPTH, remat=remat, **FIELDS)

    def loss(params, x):
        y, _ = model.apply({"params": params}, x, mask=MASK, train=True, rngs={"dropout": jax.random.key(2)})
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, X)


@pytest.fixture(scope="module")
def kept():
    params = parameters(Transformer(depth=DEPTH, **FIELDS))
    return params, values_and_gradients("none", params)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_rematerialisation_changes_no_value_and_no_gradient(remat, kept):
    """Dropout included: the same units are dropped when a block is computed again."""
    params, (expected_gradients, expected) = kept
    gradients, y = values_and_gradients(remat, params)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    found, expected = tree.flatten(gradients), tree.flatten(expected_gradients)
    assert found.keys() == expected.keys()
    for path, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[path], atol=1e-5, err_msg=path)


@pytest.mark.parametrize("cross", [False, True])
def test_the_scanned_stack_is_the_blocks_one_after_the_other(cross):
    model = Transformer(depth=DEPTH, cross=cross, num_heads=2, mlp_dim=12, norm="rmsnorm", gated=True)
    context = jax.random.normal(jax.random.key(3), (2, 4, 6)) if cross else None
    params = parameters(model, context=context)
    run = lambda params: model.apply({"params": params}, X, mask=MASK, context=context, train=False)
    y, out = jax.jit(run)(params)
    block = Block(num_heads=2, mlp_dim=12, cross=cross, norm="rmsnorm", gated=True, depth=DEPTH)
    assert out["layers"].shape == (DEPTH, 2, T, D)
    layers, shared = params["layers"], {"mask": MASK, "context": context}
    assert all(leaf.shape[0] == DEPTH for leaf in jax.tree.leaves(layers))
    run = lambda params, x: block.apply({"params": params}, (x, None), {}, shared, False)[0][0]
    apply, x = jax.jit(run), X
    for i in range(DEPTH):
        x = apply(jax.tree.map(lambda leaf, i=i: leaf[i], layers), x)
        np.testing.assert_allclose(out["layers"][i], x, atol=1e-5)
    root_mean_square = jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, x / root_mean_square, atol=1e-5)


def test_layers_start_different():
    kernel = parameters(Transformer(depth=DEPTH, **FIELDS))["layers"]["mlp"]["up"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.01


def test_an_unknown_policy_names_the_known():
    with pytest.raises(UserError, match="unknown remat policy 'all'.*dots, dots_no_batch, full, none"):
        Transformer(depth=1, remat="all", **FIELDS).init(jax.random.key(0), X, train=False)


def modulated(condition):
    model = Transformer(depth=DEPTH, num_heads=2, mlp_dim=12, norm="layernorm_fixed", modulated=True)
    return model, parameters(model, condition=condition)


def test_a_modulated_stack_starts_as_the_identity_before_its_norm():
    condition = jax.random.normal(jax.random.key(4), (2, 6))
    model, params = modulated(condition)
    y, out = jax.jit(lambda p: model.apply({"params": p}, X, condition=condition, train=False))(params)
    np.testing.assert_array_equal(out["layers"], jnp.broadcast_to(X, (DEPTH, *X.shape)))
    centred = X - X.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(y, centred / jnp.sqrt(X.var(axis=-1, keepdims=True) + 1e-5), atol=1e-5)


def test_modulation_is_shift_scale_and_gate_of_each_branch():
    """One block by hand: x + g1 · attention((1 + s1) · norm(x) + b1), then the same with the MLP."""
    condition = jax.random.normal(jax.random.key(4), (2, T, 6))
    _, params = modulated(condition)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape[1:]), leaf.dtype), params["layers"])
    block = Block(modulated=True, num_heads=2, mlp_dim=12, norm="layernorm_fixed", depth=DEPTH)

    def by_hand(params):
        h = condition * jax.nn.sigmoid(condition) @ params["modulation"]["kernel"]
        shift, scale, gate, *of_mlp = jnp.split(h + params["modulation"]["bias"][None, None], 6, axis=-1)
        norm = lambda x: (x - x.mean(axis=-1, keepdims=True)) / jnp.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        attention, mlp = Attention(num_heads=2, depth=DEPTH), MLP(mlp_dim=12, depth=DEPTH)
        y, _ = attention.apply({"params": params["attention"]}, norm(X) * (1 + scale) + shift, mask=MASK)
        x, (shift, scale, gate) = X + gate * y, of_mlp
        return x + gate * mlp.apply({"params": params["mlp"]}, norm(x) * (1 + scale) + shift, train=False)

    def found(params):
        shared = {"mask": MASK, "condition": condition}
        return block.apply({"params": params}, (X, None), {}, shared, False)[0][0]

    np.testing.assert_allclose(jax.jit(found)(params), jax.jit(by_hand)(params), atol=1e-4)


def test_attention_only_is_the_sequential_block_whose_mlp_adds_nothing(kept):
    whole = tree.flatten(kept[0])
    without = {path: leaf for path, leaf in whole.items() if "mlp" not in path}
    shapes = jax.eval_shape(lambda key: Transformer(depth=DEPTH, arrangement="attention_only", **FIELDS).init(
        key, X, train=False), jax.random.key(1))["params"]  # fmt: skip
    assert tree.flatten(shapes).keys() == without.keys() < whole.keys()
    silent = {path: leaf * ("mlp/down" not in path) for path, leaf in whole.items()}

    def run(params, **fields):
        model = Transformer(depth=DEPTH, **FIELDS, **fields)
        return jax.jit(lambda params: model.apply({"params": params}, X, mask=MASK, train=False)[0])(params)

    expected = run(tree.unflatten(silent))
    np.testing.assert_allclose(run(tree.unflatten(without), arrangement="attention_only"), expected, atol=1e-6)
