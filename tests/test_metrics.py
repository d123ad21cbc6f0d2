import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import metrics


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(8, 5)).astype(np.float32), rng.random((8, 5)) < 0.4
    parts = [{"loss": metrics.mean(values[i : i + 2], mask[i : i + 2])} for i in range(0, 8, 2)]
    total = parts[0]
    for part in parts[1:]:
        total = jax.jit(metrics.add)(total, part)
    np.testing.assert_allclose(metrics.finalize(total)["loss"], values[mask].mean(), rtol=1e-5)


def test_mask_of_leading_dimensions_and_non_finite_values():
    values = jnp.array([[1.0, 3.0], [jnp.nan, jnp.inf]])
    assert metrics.finalize({"x": metrics.mean(values, jnp.array([1, 0]))}) == {"x": 2.0}
    grad = jax.grad(lambda v: metrics.mean(v, jnp.array([True, False]))[0])(values)
    np.testing.assert_array_equal(grad, [[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="does not fit"):
        metrics.mean(values, jnp.ones(3))
    # A mask of weights weighs both the sum and the count.
    assert metrics.finalize({"x": metrics.mean(jnp.array([1.0, 4.0]), jnp.array([1.0, 0.5]))}) == {"x": 2.0}


def test_nothing_measured_is_left_out_and_names_are_joined():
    empty = {"a": metrics.mean(jnp.ones(3), jnp.zeros(3))}
    assert metrics.finalize(empty) == {}
    joined = metrics.add(empty, {"b": metrics.mean(jnp.array([True, False]))})
    assert metrics.finalize(joined) == {"b": 0.5}
    assert metrics.finalize(metrics.add(joined, {"a": (6.0, 3.0)})) == {"a": 2.0, "b": 0.5}


def test_long_sums_on_the_host_are_exact():
    big = metrics.fetch({"n": (jnp.float32(2**24), jnp.float32(2**24))})
    assert metrics.add(big, {"n": (1.0, 1.0)})["n"] == (2**24 + 1, 2**24 + 1)
