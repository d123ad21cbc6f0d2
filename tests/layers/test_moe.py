"""Mixture of experts: against a loop over tokens, on meshes, and its losses against the reference library."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import sharding
from vfm.errors import UserError
from vfm.layers.moe import MoE, load_balancing_loss, router_z_loss

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions" / "moe_losses" / "io.npz"
X = jax.random.normal(jax.random.key(0), (8, 6, 16))
FIELDS = dict(num_experts=4, experts_per_token=2, mlp_dim=24)


def parameters(model):
    params = jax.jit(lambda key: model.init(key, X, train=False))(jax.random.key(1))["params"]
    # A router that prefers some experts, and that never chooses the last.
    params["router"]["kernel"] = params["router"]["kernel"] * jnp.asarray([[1, 3, 1, 0]])
    return params


@pytest.mark.parametrize("normalise", [True, False])
def test_against_a_loop_over_tokens(normalise):
    model = MoE(**FIELDS, normalise_weights=normalise)
    params = parameters(model)
    found, logits = jax.jit(lambda params: model.apply({"params": params}, X, train=False))(params)
    found, logits, expert = (
        np.asarray(found),
        np.asarray(logits),
        jax.tree.map(lambda p: np.asarray(p, np.float64), params),
    )
    used = set()
    for b, t in np.ndindex(*X.shape[:2]):
        x = np.asarray(X[b, t], np.float64)
        score = x @ expert["router"]["kernel"]
        np.testing.assert_allclose(logits[b, t], score, atol=1e-4)
        weight = np.exp(score - score.max())
        weight /= weight.sum()
        chosen = np.argsort(-weight)[:2]
        used |= set(chosen.tolist())
        expected = np.zeros_like(x)
        for e in chosen:
            up, gate, down = (expert[f"experts_{name}"][e] for name in ("up", "gate", "down"))
            gated = x @ gate / (1 + np.exp(-(x @ gate)))
            share = weight[e] / weight[chosen].sum() if normalise else weight[e]
            expected += share * ((gated * (x @ up)) @ down)
        np.testing.assert_allclose(found[b, t], expected, atol=1e-5)
    assert len(used) > 2


def loss(params, x):
    y, logits = MoE(**FIELDS).apply({"params": params}, x, train=True)
    return jnp.sin(y).sum() + load_balancing_loss(logits[None], 2) + router_z_loss(logits)


MESHES = [pytest.param({"data": 8}, marks=pytest.mark.slow), {"fsdp": 2, "tensor": 4}, {"data": 2, "expert": 4}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_values_and_gradients_on_a_mesh(axes):
    params = parameters(MoE(**FIELDS))
    expected = jax.jit(jax.value_and_grad(loss))(params, X)
    mesh = sharding.make_mesh(axes)
    shardings = sharding.parameter_shardings({"moe": params}, mesh)["moe"]
    if "expert" in axes:
        assert shardings["experts_up"].spec[0] == "expert"
    with sharding.use_mesh(mesh):
        there = jax.device_put(params, shardings), jax.device_put(X, sharding.batch_sharding(mesh))
        found = jax.jit(jax.value_and_grad(loss))(*there)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4)


def test_equally_used_experts_have_the_least_loss():
    balanced = (20 * jnp.eye(4) + 10 * jnp.roll(jnp.eye(4), 1, axis=1))[None, None]
    np.testing.assert_allclose(load_balancing_loss(balanced, 2), 2, rtol=1e-3)
    assert load_balancing_loss(balanced[:, :, :1], 2) > 3.9  # one expert has it all


def test_more_choices_than_experts_are_refused():
    with pytest.raises(UserError, match="experts_per_token=5 is more than num_experts=4"):
        MoE(num_experts=4, experts_per_token=5).init(jax.random.key(0), X, train=False)


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
def test_losses_equal_the_reference_library():
    io = np.load(FIXTURE)
    logits = jnp.asarray(io["in/router_logits"]).reshape(2, 2, 9, 4)
    close = lambda found, name: np.testing.assert_allclose(found, io[f"out/{name}"], atol=1e-5, rtol=1e-5)
    value, gradient = jax.jit(jax.value_and_grad(load_balancing_loss), static_argnums=1)(logits, 2)
    close(value, "mixtral_aux")
    close(gradient.reshape(2, 18, 4), "grad_mixtral_aux")
    close(load_balancing_loss(logits, 2, jnp.asarray(io["in/mask"]) > 0), "mixtral_aux_masked")
    # That of Switch takes each row of the batch for itself.
    close(jnp.mean(jnp.stack([load_balancing_loss(logits[:1, i : i + 1], 1) for i in range(2)])), "switch_aux")
    value, gradient = jax.value_and_grad(router_z_loss)(logits[0].reshape(18, 4))
    close(value, "switch_z")
    close(gradient, "grad_switch_z")
