import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.errors import UserError
from vfm.layers.attention import Attention, dot_product_attention, make_mask
from vfm.layers.transformer import Transformer

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions" / "basic_layers" / "io.npz"


def mask(T=4, S=None, offset=0, **options):
    made = make_mask(jnp.arange(T) + offset, jnp.arange(S or T), **{"causal": False, **options})
    return np.asarray(made).astype(int).tolist()


def bools(*rows):
    return jnp.asarray(rows, bool)


def segments(*row):
    return {"q_segments": jnp.asarray([row]), "kv_segments": jnp.asarray([row])}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ["1111", "1111", "1111", "1111"]),
        ({"causal": True}, ["1000", "1100", "1110", "1111"]),
        ({"causal": True, "window": 2}, ["1000", "1100", "0110", "0011"]),
        ({"causal": True, "window": 1}, ["1000", "0100", "0010", "0001"]),
        ({"window": 2}, ["1100", "1110", "0111", "0011"]),
        ({"causal": True, "prefix": bools([1, 1, 1, 0])}, ["1110", "1110", "1110", "1111"]),
        ({"causal": True, "prefix": bools([1, 1, 1, 0]), "window": 2}, ["1100", "1110", "0110", "0011"]),
        ({"causal": True, "prefix": bools([1, 1, 0, 0]), "kv_mask": bools([1, 0, 1, 1])},
         ["1000", "1000", "1010", "1011"]),
        ({"kv_mask": bools([1, 1, 0, 0])}, ["1100", "1100", "1100", "1100"]),
        ({"causal": True, "kv_mask": bools([0, 1, 1, 1])}, ["0000", "0100", "0110", "0111"]),
        (segments(1, 1, 2, 2), ["1100", "1100", "0011", "0011"]),
        ({"causal": True, **segments(1, 1, 2, 0)}, ["1000", "1100", "0010", "0001"]),
    ],
)  # fmt: skip
def test_masks_by_hand(options, expected):
    assert mask(**options) == [[[[int(c) for c in row] for row in expected]]]


def test_masks_of_a_batch_and_of_a_cache():
    both = mask(2, causal=True, kv_mask=bools([1, 0], [0, 1]))
    assert both == [[[[1, 0], [1, 0]]], [[[0, 0], [0, 1]]]]
    # Two queries that stand at places 2 and 3 of five keys, the last of which is not written yet.
    assert mask(2, 5, offset=2, causal=True) == [[[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]]
    assert mask(2, 5, offset=2, causal=True, window=2) == [[[[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]]]


def reference(q, k, v, allowed):
    """softmax(Q K^T / sqrt(K)) V in float64; float[B, T, N, K], a head of the keys per group of heads."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    logits = np.einsum("btnk,bsnk->bnts", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(allowed, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnk->btnk", weights / weights.sum(axis=-1, keepdims=True), v)


def bare(q, k, v, allowed):
    """The layer with projections that only pick: q from x, and k and v from the halves of a context."""
    (B, T, N, K), (S, M) = q.shape, k.shape[1:3]
    half = np.zeros((2 * M * K, M, K), np.float32)
    key, value = half.copy(), half.copy()
    key[: M * K] = value[M * K :] = np.eye(M * K).reshape(M * K, M, K)
    params = {
        "query": {"kernel": np.eye(N * K).reshape(N * K, N, K)},
        "key": {"kernel": key},
        "value": {"kernel": value},
        "out": {"kernel": np.eye(N * K).reshape(N, K, N * K)},
    }
    layer = Attention(num_heads=N, num_kv_heads=M, use_bias=False)
    context = jnp.concatenate([k.reshape(B, S, -1), v.reshape(B, S, -1)], axis=-1)
    y, _ = layer.apply({"params": params}, q.reshape(B, T, -1), context, mask=allowed)
    return y.reshape(B, T, N, K)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", ["none", "causal", "padded"])
def test_equals_the_formula(kv_heads, masked):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 5, 4, 6)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 7, kv_heads, 6)), jnp.float32) for _ in range(2))
    keys = jnp.asarray(rng.random((2, 7)) < 0.6).at[:, 0].set(True)
    options = {"none": {}, "causal": {"causal": True}, "padded": {"kv_mask": keys}}[masked]
    allowed = make_mask(jnp.arange(5), jnp.arange(7), **{"causal": False, **options})
    found = jax.jit(bare)(q, k, v, None if masked == "none" else allowed)
    np.testing.assert_allclose(found, reference(q, k, v, allowed), atol=2e-6)


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
def test_equals_the_reference_library():
    io = np.load(FIXTURE)
    q, k, v, k2, v2, cotangent = (
        jnp.asarray(io[f"in/{name}"].swapaxes(1, 2)) for name in ("q", "k", "v", "k2", "v2", "cot")
    )
    causal = make_mask(jnp.arange(7), jnp.arange(7), causal=True)
    for name, args in {
        "plain": (q, k, v, None),
        "causal": (q, k, v, causal),
        "masked": (q, k, v, jnp.asarray(io["in/keep"])),
        "grouped_causal": (q, k2, v2, causal),
    }.items():
        found = jax.jit(bare)(*args)
        np.testing.assert_allclose(found, io[f"out/sdpa_{name}"].swapaxes(1, 2), atol=2e-5, err_msg=name)
    gradients = jax.jit(lambda *args: jax.vjp(lambda *a: bare(*a, causal), *args)[1](cotangent))(q, k, v)
    for name, gradient in zip("qkv", gradients):
        expected = io[f"out/sdpa_causal_grad_{name}"].swapaxes(1, 2)
        np.testing.assert_allclose(gradient, expected, atol=2e-5, err_msg=name)


@functools.cache
def influence(depth):
    """Jitted bool[1, 1, T, T] -> float[T, T]: how much the input s of a Transformer moves its output t."""
    model = Transformer(depth=depth, num_heads=2, mlp_dim=8)
    x, weight = (jax.random.normal(jax.random.key(i), (1, 5, 8)) for i in (0, 1))

    def run(allowed):
        params = model.init(jax.random.key(2), x, train=False)
        outputs = lambda x: (model.apply(params, x, mask=allowed, train=False)[0] * weight)[0].sum(axis=-1)
        return jnp.abs(jax.jacrev(outputs)(x)[:, 0]).sum(axis=-1)

    return jax.jit(run)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window": 2},
        {"causal": True, "prefix": bools([1, 1, 1, 0, 0])},
        {"causal": True, **segments(1, 1, 2, 2, 2)},
        {"causal": False, "kv_mask": bools([1, 1, 1, 0, 1])},
    ],
    ids=["causal", "window", "prefix", "segments", "padding"],
)
def test_gradients_flow_where_the_mask_allows_and_are_exactly_zero_elsewhere(options, depth):
    allowed = make_mask(jnp.arange(5), jnp.arange(5), **options)
    found = np.asarray(influence(depth)(allowed))
    direct = np.asarray(allowed[0, 0]) | np.eye(5, dtype=bool)  # the residual stream
    reach = np.linalg.matrix_power(direct.astype(int), depth) > 0
    np.testing.assert_array_equal(found[~reach], 0)
    assert (found[reach] > 1e-4).all()


def test_misfits_are_told():
    x = jnp.zeros((1, 2, 10))
    with pytest.raises(UserError, match="num_heads=4 does not divide width=10"):
        Attention(num_heads=4).init(jax.random.key(0), x)
    with pytest.raises(UserError, match="num_kv_heads=3 does not divide num_heads=5"):
        Attention(num_heads=5, num_kv_heads=3).init(jax.random.key(0), x)


@pytest.mark.parametrize("window, softcap", [(None, None), (40, 3.0)])
def test_causal_chunks_are_the_whole(window, softcap):
    """A length that the chunks do not divide, grouped heads, padding and a bias; values and gradients."""
    rng, T = np.random.default_rng(3), 150
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    bias = jnp.asarray(rng.normal(size=(1, 4, T, T)), jnp.float32)
    padding = jnp.arange(T)[None] < jnp.asarray([[T], [70]])
    mask = make_mask(jnp.arange(T), jnp.arange(T), causal=True, window=window, kv_mask=padding)

    def run(q, k, v, causal):
        y = dot_product_attention(q, k, v, mask=mask, bias=bias, scale=0.3, softcap=softcap, causal=causal)
        y = jnp.where(mask.any(axis=-1)[:, 0, :, None, None], y, 0)  # what no key answers is undefined
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    step = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True), static_argnums=3)
    for found, wanted in zip(jax.tree.leaves(step(q, k, v, True)), jax.tree.leaves(step(q, k, v, False))):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
