"""Attention rollout against a product by hand, and the weights that it is made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.encoders import ViT
from vfm.errors import UserError
from vfm.evaluate.rollout import attention_maps, patch_map, rollout
from vfm.layers.attention import attention_weights, dot_product_attention
from vfm.layers.transformer import Transformer

RNG = np.random.default_rng(0)


def brute_force(weights):
    """All paths through the layers, summed one by one: the definition, not the matrix product."""
    L, B, N, T, _ = weights.shape
    found = np.zeros((B, T, T))
    for b in range(B):
        for path in np.ndindex(*(T,) * (L + 1)):  # input position, then the token of each layer
            share = 1.0
            for layer in range(L):
                before, after = path[layer], path[layer + 1]
                share *= 0.5 * (weights[layer, b, :, after, before].mean() + (before == after))
            found[b, path[-1], path[0]] += share
    return found


def test_rollout_is_the_sum_over_all_paths():
    weights = RNG.random((3, 2, 2, 4, 4))
    weights /= weights.sum(axis=-1, keepdims=True)
    found = rollout(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, brute_force(weights), atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    # A layer that looks at itself alone adds nothing.
    same = np.concatenate([weights, np.broadcast_to(np.eye(4), (1, 2, 2, 4, 4))])
    np.testing.assert_allclose(rollout(jnp.asarray(same, jnp.float32)), found, atol=1e-6)
    with pytest.raises(UserError, match=r"takes self-attention weights \[L, B, N, T, T\], not \(2, 4, 5\)"):
        rollout(jnp.zeros((2, 4, 5)))


def test_weights_are_those_of_the_attention():
    B, T, S, N, M, K = 2, 5, 7, 4, 2, 7
    q, k = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((B, T, N, K), (B, S, M, K)))
    bias, mask = jnp.asarray(RNG.normal(size=(1, N, T, S)), jnp.float32), jnp.asarray(RNG.random((B, 1, T, S)) > 0.3)
    how = {"mask": mask, "bias": bias, "scale": 0.6, "softcap": 2.0}
    weights = attention_weights(q, k, **how)
    assert weights.shape == (B, N, T, S)
    # Values that are one-hot give the weights back.
    v = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, M, S))
    found = dot_product_attention(q, k, v, **how).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found, weights, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_weights_of_a_stack_are_given_only_when_asked_for(remat):
    stack = Transformer(num_heads=2, depth=3, remat=remat)
    x = jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32)
    variables = jax.jit(lambda: stack.init(jax.random.key(0), x, train=False))()
    assert set(variables) == {"params"}
    maps = jax.jit(lambda v: attention_maps(stack, v, x, train=False))(variables)
    weights = maps["layers/attention"]
    assert set(maps) == {"layers/attention"} and weights.shape == (3, 2, 2, 5, 5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert float(jnp.abs(weights[0] - weights[1]).max()) > 1e-3
    program = str(jax.make_jaxpr(lambda v, x: stack.apply(v, x, train=False))(variables, x))
    asked = str(jax.make_jaxpr(lambda v, x: stack.apply(v, x, train=False, mutable=["intermediates"]))(variables, x))
    assert program.count("dot_general") < asked.count("dot_general")


@pytest.mark.parametrize("pooling", ["class", "map", ""])
def test_map_over_the_patches(pooling):
    encoder = ViT(image_size=(4, 6), patch_size=2, width=16, depth=2, pooling=pooling, num_registers=1)
    images = jnp.asarray(RNG.normal(size=(2, 4, 6, 1)), jnp.float32)
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(1), images, train=False))["params"]
    params = jax.tree.map(lambda p: jnp.asarray(RNG.normal(0, 0.4, p.shape), jnp.float32), params)
    both = lambda p: (patch_map(encoder, p, images), attention_maps(encoder, {"params": p}, images, train=False))
    found, maps = jax.jit(both)(params)
    assert found.shape == (2, 2, 3)
    mixed, first = brute_force(np.asarray(maps["transformer/layers/attention"])), encoder.num_extra
    if pooling == "class":
        expected = mixed[:, 0]
    elif pooling == "map":
        head = np.asarray(maps["pooling/attention"]).mean(axis=1)
        expected = (head @ mixed[:, first:])[:, 0]
    else:
        expected = mixed[:, first:].mean(axis=1)
    np.testing.assert_allclose(found.reshape(2, 6), expected[:, first:], atol=1e-5)
    assert (found > 0).all() and (found.sum(axis=(1, 2)) < 1).all()
    assert float(jnp.abs(found[0] - found[1]).max()) > 1e-4


def test_the_map_finds_the_patch_that_the_class_token_looks_at():
    """A class token whose query meets one patch's key, and no other."""
    encoder = ViT(image_size=(4, 6), patch_size=2, width=16, depth=1, num_heads=1, pooling="class")
    images = jnp.zeros((1, 4, 6, 1)).at[0, 2:4, 4:6].set(1.0)  # patch (1, 2) alone is not black
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(1), images, train=False))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    attention = params["transformer"]["layers"]["attention"]
    attention["query"]["bias"] = attention["query"]["bias"].at[0, 0, 0].set(40.0)
    attention["key"]["kernel"] = attention["key"]["kernel"].at[0, 3, 0, 0].set(1.0)
    params["transformer"]["layers"]["norm_attention"]["scale"] = jnp.ones((1, 16))
    params["patch"]["kernel"] = params["patch"]["kernel"].at[:, :, 0, 3].set(1.0)
    found = jax.jit(lambda p: patch_map(encoder, p, images))(params)[0]
    np.testing.assert_allclose(found, 0.5 * (np.arange(6).reshape(2, 3) == 5), atol=1e-4)
