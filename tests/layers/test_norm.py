import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.errors import UserError
from vfm.layers.norm import make_norm

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions" / "basic_layers" / "io.npz"


def norm(kind, epsilon, dtype="float32", use_bias=True):
    return make_norm(kind, epsilon=epsilon, use_bias=use_bias, dtype=dtype, name=None)


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
@pytest.mark.parametrize(
    "kind, epsilon, name",
    [("layernorm", 1e-5, "layer_norm_eps1e-5"), ("layernorm", 1e-12, "layer_norm_eps1e-12"),
     ("rmsnorm", 1e-6, "rms_norm_eps1e-6")],
)  # fmt: skip
def test_equals_the_reference_library(kind, epsilon, name):
    io = np.load(FIXTURE)
    params = {"scale": io["in/gamma"]} | ({"bias": io["in/beta"]} if kind == "layernorm" else {})
    found = norm(kind, epsilon).apply({"params": params}, io["in/x"])
    np.testing.assert_allclose(found, io[f"out/{name}"], atol=2e-5)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_statistics_are_taken_in_fp32(kind):
    # In bfloat16 the sum of 4096 squares would be off by far more than one rounding of the result.
    x = (jax.random.normal(jax.random.key(0), (2, 4096)) + 3).astype(jnp.bfloat16)
    half, full = norm(kind, 1e-6, "bfloat16"), norm(kind, 1e-6)
    params = full.init(jax.random.key(0), x)
    y = half.apply(params, x)
    assert y.dtype == jnp.bfloat16
    expected = full.apply(params, x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=2**-8)


def test_names_and_biases():
    x = jnp.ones((1, 4))
    assert set(norm("layernorm", 1e-5, use_bias=False).init(jax.random.key(0), x)["params"]) == {"scale"}
    assert set(norm("rmsnorm", 1e-5).init(jax.random.key(0), x)["params"]) == {"scale"}
    with pytest.raises(UserError, match="did you mean 'rmsnorm'"):
        norm("rms_norm", 1e-5)
