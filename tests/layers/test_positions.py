import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.errors import UserError
from vfm.layers.positions import rotary, rotate

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions" / "rope_variants"


@jax.jit
def turned(x, positions):
    """x: float[T, K] at positions int32[T]."""
    return rotate(x[None, :, None, :], rotary(positions[None], x.shape[-1]))[0, :, 0]


def test_products_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(np.tile(rng.normal(size=(1, 16)), (6, 1)), jnp.float32) for _ in range(2))
    at = jnp.asarray([0, 3, 10, 57, 200, 1000])
    product = lambda distance: (turned(q, at + distance) * turned(k, at)).sum(axis=-1)
    for distance in (0, 1, 7):
        found = product(distance)
        np.testing.assert_allclose(found, jnp.full_like(found, found[0]), atol=2e-4)
    assert abs(float(product(1)[0] - product(7)[0])) > 0.1


def test_rotation_keeps_lengths_and_position_zero_is_the_identity():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    y = turned(x, jnp.asarray([0, 1, 2, 50, 999]))
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(y[0], x[0])
    assert (jnp.abs(y - x).max(axis=-1)[1:] > 0.1).all()
    half = turned(x.astype(jnp.bfloat16), jnp.arange(5))
    assert half.dtype == jnp.bfloat16  # turned in fp32, given back in the compute type


def test_an_odd_head_is_refused():
    with pytest.raises(UserError, match="even number of rotated dimensions, not 7"):
        rotary(jnp.zeros((1, 2), jnp.int32), 7)


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
@pytest.mark.parametrize("variant", ["default", "theta"])
def test_equals_the_reference_library(variant):
    io = np.load(FIXTURE / "io.npz")
    options = json.loads((FIXTURE / "io.json").read_text())["params"]["variants"][variant]
    theta, head_dim = options["rope"]["rope_theta"], options["head_dim"]
    q = jnp.asarray(io[f"in/q_{variant}"])
    for length in (20, 48):
        sin, cos = rotary(jnp.arange(length)[None], head_dim, theta)
        for name, table in (("sin", sin), ("cos", cos)):
            expected = io[f"out/{variant}/{name}_L{length}"][:, : head_dim // 2]
            np.testing.assert_allclose(table[0], expected, atol=2e-5, rtol=1e-5)
    found = rotate(q[None, :, None, :], rotary(jnp.arange(len(q))[None], head_dim, theta))[0, :, 0]
    np.testing.assert_allclose(found, io[f"out/{variant}/q_rotated"], atol=2e-5, rtol=1e-5)
