"""Projectors with learned queries: how many tokens, what they read, what they learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from vfm import model as model_lib
from vfm import tree
from vfm.input_projectors import INPUT_PROJECTORS, QFormer, Resampler
from vfm.layers.attention import dot_product_attention
from vfm.output_projectors import OUTPUT_PROJECTORS, Query
from vfm.train.optimizer import build_optimizer

B, W, D, Q = 3, 10, 16, 5
NAMES = ("resampler", "qformer")
every_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def features(length, seed=0):
    return np.random.default_rng(seed).normal(size=(B, length, W)).astype(np.float32)


@functools.cache
def built(name, hidden=None, depth=2):
    """(projector, parameters none of which is trivial, jitted call)."""
    block = INPUT_PROJECTORS[name](width=D, num_tokens=Q, depth=depth, num_heads=2, mlp_dim=24, hidden=hidden)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), features(2), train=False))["params"]
    rng = np.random.default_rng(1)
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.25, leaf.shape).astype(np.float32)
    params = jax.tree.map(draw, tree.paths(shapes), shapes)
    return block, params, jax.jit(lambda params, x: block.apply({"params": params}, x, train=False))


@every_name
def test_as_many_tokens_as_declared_whatever_the_length(name):
    for hidden in (None, 12):
        block, params, run = built(name, hidden)
        assert block.num_tokens == Q
        for length in (1, 9) if hidden else (9,):
            y, out = jax.eval_shape(run, params, features(length))
            assert y.shape == (B, Q, D) and out["layers"].shape == (2, B, Q, hidden or D)


@every_name
def test_the_order_of_the_features_does_not_matter(name):
    _, params, run = built(name)
    x = features(9)
    y, order = np.asarray(run(params, x)[0]), np.random.default_rng(2).permutation(9)
    np.testing.assert_allclose(run(params, x[:, order])[0], y, atol=1e-5)
    for n in range(9):  # and every one is read
        other = x.copy()
        other[:, n] += np.random.default_rng(n).normal(size=W)
        assert np.abs(run(params, other)[0] - y).max() > 1e-3


@every_name
def test_the_gradient_reaches_every_parameter(name):
    block, params, _ = built(name, hidden=12)
    direction = np.random.default_rng(3).normal(size=(B, Q, D))
    loss = lambda params: (block.apply({"params": params}, features(6), train=True)[0] * direction).sum()
    for path, gradient in tree.flatten(jax.jit(jax.grad(loss))(params)).items():
        if not path.endswith("key/bias"):  # the same for all keys of a query: softmax does not see it
            rows = gradient.shape[0] if "layers/" in path else 1
            assert (np.abs(np.asarray(gradient).reshape(rows, -1)).max(axis=1) > 1e-4).all(), path


def norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


def affine(x, p):
    return x @ p["kernel"] + p["bias"]


def test_the_resampler_is_the_papers():
    """Flamingo's pseudocode (figure 5 of the paper), with norms before the branches, written out for one block."""
    _, params, run = built("resampler", depth=1)
    x = features(7)
    layer = jax.tree.map(lambda p: p[0], params["layers"])
    f, q = affine(x, params["projection"]), np.broadcast_to(params["queries"], (B, Q, D))
    h = norm(q, layer["norm_attention"])
    both = np.concatenate([norm(f, layer["norm_features"]), h], axis=1)
    a = layer["attention"]
    heads = lambda name, x: np.einsum("btd,dnk->btnk", x, a[name]["kernel"]) + a[name]["bias"]
    y = dot_product_attention(heads("query", h), heads("key", both), heads("value", both), scale=(D // 2) ** -0.5)
    q = q + np.einsum("btnk,nkd->btd", y, a["out"]["kernel"]) + a["out"]["bias"]
    hidden = np.maximum(affine(norm(q, layer["norm_mlp"]), layer["mlp"]["up"]), 0) ** 2
    q = q + affine(hidden, layer["mlp"]["down"])
    np.testing.assert_allclose(run(params, x)[0], norm(q, params["norm"]), atol=1e-5)


def test_the_queries_of_a_qformer_see_each_other():
    """Before they read the features, so that another query changes all tokens."""
    _, params, run = built("qformer", depth=1)
    x = features(6)
    moved = {**params, "queries": params["queries"].copy()}
    moved["queries"][0] += np.random.default_rng(4).normal(size=D)
    change = np.abs(np.asarray(run(moved, x)[0]) - run(params, x)[0]).max(axis=(0, 2))
    assert (change > 1e-3).all()


def test_the_query_output_projector_is_a_qformer_of_signals():
    fields = {"width": D, "num_tokens": Q, "depth": 1, "num_heads": 2, "mlp_dim": 24}
    assert OUTPUT_PROJECTORS["query"] is Query and "num_signals" not in QFormer.__dataclass_fields__
    x = features(2)
    params = {"params": built("qformer", depth=1)[1]}
    program = lambda block: str(jax.make_jaxpr(lambda params: block.apply(params, x, train=False)[0])(params))
    assert program(Query(num_signals=2, **fields)) == program(QFormer(**fields))


@every_name
def test_a_projector_between_frozen_ends_learns(name):
    """A frozen encoder in front and a frozen head behind: only the projector moves, and the loss falls."""
    block, params, _ = built(name, depth=1)
    rng = np.random.default_rng(0)
    label = np.arange(24) % 4
    item = (rng.normal(size=(4, 6))[label] + 0.1 * rng.normal(size=(24, 6))).astype(np.float32)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"encoders_x": draw(6, 5, W) / 3, "input_projectors_x": params, "head": draw(D, 4) / 4}
    cfg = {"learning_rate": 0.01, "frozen": ("encoders_x", "head")}
    tx, _ = build_optimizer(cfg, params, 40)

    def loss(params):
        x = jnp.einsum("bi,isd->bsd", item, params["encoders_x"])
        y = block.apply({"params": params["input_projectors_x"]}, x, train=True)[0]
        return optax.softmax_cross_entropy_with_integer_labels(y.mean(axis=1) @ params["head"], label).mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=40)

    (after, _), values = train(params)
    assert values[-1] < 0.5 * values[0]
    for path, leaf in tree.flatten(after).items():
        same = np.array_equal(leaf, tree.flatten(params)[path])
        assert same != path.startswith("input_projectors_x") or path.endswith("key/bias"), path


@every_name
def test_the_sequence_has_as_many_places_as_the_projector_gives(name):
    text = {"name": "text", "vocab_size": 12}
    model = model_lib.build(
        {
            "centre": "text",
            "encoders": {
                "text": {**text, "width": D},
                "vector": {"name": "vector", "num_features": 6, "num_tokens": 4, "width": W, "mlp_dim": 16},
            },
            "input_projectors": {"vector": {"name": name, "width": D, "num_tokens": 2, "mlp_dim": 24}},
            "backbone": {"name": "decoder_only", "width": D, "depth": 1, "mlp_dim": 24, "max_len": 8},
            "decoders": {"text": text},
        }
    )
    assert model_lib.layout(model, 8).modality("vector").slots == 2


def test_the_classes_are_in_the_table():
    assert INPUT_PROJECTORS["resampler"] is Resampler and INPUT_PROJECTORS["qformer"] is QFormer
