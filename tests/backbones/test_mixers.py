"""What mixes tokens: attention to all, attention in a window, and a convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import sharding, tree
from vfm.backbones.decoder_only import LLAMA, DecoderOnly
from vfm.backbones.encoder_only import EncoderOnly
from vfm.errors import UserError

B, T, D, DEPTH, REACH = 2, 12, 8, 2, 3
FIELDS = {"width": D, "num_heads": 2, "mlp_dim": 8, "depth": DEPTH, "max_len": T, **LLAMA}
CONVOLUTION = {"mixer": "convolution", "kernel_size": REACH, "positions": "none"}
MIXERS = {"attention": {}, "window": {"window": REACH}, "convolution": CONVOLUTION}
# How many places back a token sees through all layers; attention: all.
SEEN = {"attention": T, "window": DEPTH * (REACH - 1) + 1, "convolution": DEPTH * (REACH - 1) + 1}
X = jax.random.normal(jax.random.key(0), (B, T, D))
every_mixer = pytest.mark.parametrize("mixer", MIXERS)
local_mixers = pytest.mark.parametrize("mixer", ["window", "convolution"])


@functools.cache
def built(mixer):
    model = DecoderOnly(**{**FIELDS, **MIXERS[mixer]})
    params = jax.jit(lambda key: model.init(key, X, train=False))(jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.1, params)
    return model, params, jax.jit(lambda params, x, **call: model.apply(params, x, **call, train=False))


@every_mixer
def test_a_token_depends_on_what_the_mixer_sees_and_on_nothing_else(mixer):
    """By the gradient of one output with respect to all inputs."""
    _, params, run = built(mixer)
    at = 9
    gradient = jax.jit(jax.grad(lambda x: jnp.square(run(params, x)[0][0, at]).sum()))(X)
    depends = np.abs(gradient).sum(axis=2) > 1e-9
    place = np.arange(T)
    assert depends[0].tolist() == ((place <= at) & (at - place < SEEN[mixer])).tolist()
    assert not depends[1].any()


@local_mixers
def test_a_cache_gives_what_the_whole_row_gives(mixer):
    """A prompt of 5 behind 2 places of padding, then one by one."""
    model, params, run = built(mixer)
    real = jnp.ones((B, T), bool).at[0, :2].set(False)
    whole = run(params, X, input_mask=real)[0]
    cache, parts = model.init_cache(B, T), []
    for begin, end in [(0, 7), *((i, i + 1) for i in range(7, T))]:
        x, out = run(params, X[:, begin:end], input_mask=real[:, begin:end], cache=cache)
        cache = out["cache"]
        parts.append(x)
    found = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(found[0, 2:], whole[0, 2:], atol=1e-5)
    np.testing.assert_allclose(found[1], whole[1], atol=1e-5)
    without = run(params, X[:1, 2:])[0]  # padding is as nothing
    np.testing.assert_allclose(whole[:1, 2:], without, atol=1e-5)


@local_mixers
def test_packed_rows_are_as_rows_of_their_own(mixer):
    _, params, run = built(mixer)
    segments = jnp.asarray([[1] * 5 + [2] * 7] * B)
    positions = jnp.asarray([[*range(5), *range(7)]] * B)
    packed = run(params, X, segment_ids=segments, positions=positions)[0]
    np.testing.assert_allclose(packed[:, :5], run(params, X[:, :5])[0], atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], run(params, X[:, 5:])[0], atol=1e-5)


def test_a_convolution_is_the_one_of_its_formula():
    """One layer against numpy's convolution."""
    from vfm.layers.causal_convolution import CausalConvolution, taps

    layer = CausalConvolution(REACH, "silu")
    seen = taps(jnp.tril(jnp.ones((T, T), bool))[None, None], jnp.arange(T), REACH)
    params = jax.jit(lambda key: layer.init(key, X, taps=seen))(jax.random.key(2))["params"]
    up, gate, down = (np.asarray(params[name]["kernel"]) for name in ("up", "gate", "down"))
    h, g, kernel = np.asarray(X[0]) @ up, np.asarray(X[0]) @ gate, np.asarray(params["kernel"])
    y = np.stack([np.convolve(h[:, d], kernel[:, d])[:T] for d in range(D)], axis=1)
    expected = (g / (1 + np.exp(-g)) * y) @ down
    np.testing.assert_allclose(layer.apply({"params": params}, X, taps=seen)[0][0], expected, atol=1e-5)


def test_every_parameter_of_a_convolution_has_a_row():
    _, params, _ = built("convolution")
    names = {
        path: sharding.parameter_names(f"backbone/{path}", leaf.shape)
        for path, leaf in tree.flatten(params["params"]).items()
    }
    assert names["transformer/layers/mixer/kernel"] == ("layers", "space", "mlp")
    assert not any("/attention/" in path for path in names)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixer": "conv"}, "unknown mixer 'conv'"),
        ({**CONVOLUTION, "kernel_size": 0}, "kernel_size=0 must be at least 1"),
        ({**CONVOLUTION, "positions": "rope"}, "positions='rope' is for attention"),
        ({**CONVOLUTION, "window": 3}, "window=3 is for attention"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda x: DecoderOnly(**{**FIELDS, **fields}).init(jax.random.key(0), x, train=False), X)


def test_a_convolution_is_for_causal_stacks():
    encoder = EncoderOnly(**{**FIELDS, **CONVOLUTION})
    with pytest.raises(UserError, match="mixer='convolution' .* decoder-only backbones"):
        jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, train=False), X)
    decoder = built("convolution")[0]
    with pytest.raises(UserError, match="a prefix needs attention"):
        jax.eval_shape(lambda x: decoder.init(jax.random.key(0), x, prefix=jnp.ones((B, T), bool), train=False), X)
