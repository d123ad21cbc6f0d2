import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.errors import UserError
from vfm.interop.configs import rope
from vfm.layers.positions import (
    alibi_slopes,
    relative_buckets,
    rotary,
    rotate,
    sinusoidal,
    sinusoidal_2d,
    timestep_embedding,
)

FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions"


def fixture(name, field, file="meta.json"):
    """Arrays of a reference, and a field of its parameters."""
    folder = FIXTURES / name
    return np.load(folder / "io.npz"), json.loads((folder / file).read_text())["params"][field]


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


@pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
@pytest.mark.parametrize(
    "variant",
    ("default", "theta", "linear", "dynamic", "yarn", "yarn_options", "yarn_mscale", "longrope", "llama3"),
)
def test_rotary_equals_the_reference_library(variant):
    io, options = fixture("rope_variants", "variants", "io.json")
    options = options[variant]
    read = rope({"rope_parameters": options["rope"], "max_position_embeddings": options["max_position_embeddings"]})
    table = lambda length: rotary(
        jnp.arange(length)[None], options["head_dim"], read["rope_theta"], read["rope_scaling"]
    )
    for length in (20, 48):
        for name, found in zip(("sin", "cos"), table(length), strict=True):
            expected = io[f"out/{variant}/{name}_L{length}"][:, : options["head_dim"] // 2]
            np.testing.assert_allclose(found[0], expected, atol=2e-5, rtol=1e-5)
    q = jnp.asarray(io[f"in/q_{variant}"])[None, :, None]
    for name, interleaved in (("q_rotated", False), ("q_rotated_interleaved", True)):
        found = rotate(q, table(48), interleaved)[0, :, 0]
        np.testing.assert_allclose(found, io[f"out/{variant}/{name}"], atol=5e-5, rtol=1e-5)


@pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
def test_alibi_equals_the_reference_library():
    io, heads = fixture("alibi", "heads")
    seen = (np.cumsum(io["in/mask"], axis=1) - 1) * io["in/mask"]
    for count in heads:
        slopes = alibi_slopes(count)
        np.testing.assert_allclose(slopes, io[f"out/slopes_{count}"], atol=1e-6)
        bias = slopes[None, :, None] * seen[:, None]
        np.testing.assert_allclose(bias, io[f"out/bias_{count}"].reshape(bias.shape), atol=1e-6)


@pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
def test_relative_buckets_equal_the_reference_library():
    io, cases = fixture("t5_relative_buckets", "cases")
    for i, case in enumerate(cases):
        distance = jnp.arange(case.pop("k"))[None] - jnp.arange(case.pop("q"))[:, None]
        np.testing.assert_array_equal(relative_buckets(distance, **case), io[f"out/case{i}"])


@pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
def test_sinusoidal_equals_the_reference_library():
    io, size = fixture("sincos_positions", "marian")
    np.testing.assert_allclose(sinusoidal(*size), io["out/marian"], atol=2e-5)


@pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
def test_positions_of_grids_equal_the_reference_library():
    io, width = fixture("sincos_positions", "dim")
    for side in (4, 8):
        np.testing.assert_allclose(sinusoidal_2d((side, side), width), io[f"out/dit_{side}"], atol=2e-5)
    np.testing.assert_allclose(sinusoidal_2d((6, 6), width), io["out/mae_6x6"][1:], atol=2e-5)
    np.testing.assert_allclose(sinusoidal_2d((8, 8), width, base=(4, 4)), io["out/dit_interpolated"], atol=2e-5)


@pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
def test_features_of_times_equal_the_reference_library():
    io, cases = fixture("sincos_positions", "timestep_cases")
    for n, case in enumerate(cases):
        found = timestep_embedding(
            jnp.asarray(io["in/timesteps"]), case["embedding_dim"],
            cosine_first=case["flip_sin_to_cos"], shift=case["downscale_freq_shift"],
        )  # fmt: skip
        np.testing.assert_allclose(found, io[f"out/timestep_{n}"], atol=1e-4)
