import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.errors import UserError
from vfm.layers.mlp import ACTIVATIONS, MLP, residual_init

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions" / "basic_layers" / "io.npz"
NAMES = {"gelu_tanh": "gelu_new", "relu_squared": "relu2"}  # the library's, where they differ


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_the_reference_library(name):
    io = np.load(FIXTURE)
    np.testing.assert_allclose(ACTIVATIONS[name](io["in/x"]), io[f"out/act_{NAMES.get(name, name)}"], atol=2e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_formula(gated):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, up, gate, down = draw(2, 3, 4), draw(4, 5), draw(4, 5), draw(5, 4)
    params = {"up": {"kernel": up}, "down": {"kernel": down}} | ({"gate": {"kernel": gate}} if gated else {})
    layer = MLP(mlp_dim=5, activation="silu", gated=gated, use_bias=False)
    silu = lambda x: x / (1 + np.exp(-x))
    hidden = silu(x @ gate) * (x @ up) if gated else silu(x @ up)
    np.testing.assert_allclose(layer.apply({"params": params}, x, train=False), hidden @ down, atol=1e-4)


def test_residual_branches_start_small():
    for depth in (1, 8):
        kernel = residual_init(depth)(jax.random.key(0), (400, 400), jnp.float32)
        assert float(kernel.std()) == pytest.approx((400 * 2 * depth) ** -0.5, rel=0.02)


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'gelu'"):
        MLP(activation="gelou").init(jax.random.key(0), jnp.zeros((1, 2, 4)), train=False)
