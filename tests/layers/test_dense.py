import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vfm import sharding
from vfm.layers.dense import dot_general

X = jax.random.normal(jax.random.key(0), (2, 8, 4, 6))
LAYERS = {
    "dense": (nn.Dense, {"features": 5}),
    "heads": (nn.DenseGeneral, {"features": (3, 5)}),
    "from_heads": (nn.DenseGeneral, {"features": 5, "axis": (-2, -1)}),
    "inner_axis": (nn.DenseGeneral, {"features": 5, "axis": 1}),  # not one product of matrices: left to lax
}


def value_and_gradients(layer, fields, product):
    module = layer(**fields, dot_general=product)
    params = module.init(jax.random.key(1), X)
    loss = lambda params, x: jnp.sin(module.apply(params, x)).sum()
    return module.apply(params, X), jax.grad(loss, (0, 1))(params, X)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_layers_own_product(name):
    found, expected = (value_and_gradients(*LAYERS[name], product) for product in (dot_general, jax.lax.dot_general))
    assert found[0].shape == expected[0].shape
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_arrays_of_any_rank_and_the_compute_type():
    layer = nn.Dense(5, dtype=jnp.bfloat16, dot_general=dot_general)
    params = layer.init(jax.random.key(1), X)
    assert layer.apply(params, X).dtype == jnp.bfloat16
    row = X[0, 0, 0]
    np.testing.assert_array_equal(layer.apply(params, row), layer.apply(params, row[None])[0])


def test_a_sequence_cut_over_devices_keeps_its_rank():
    """Rows of a cut sequence are not contiguous: made one dimension, they would have to be gathered first."""
    mesh = sharding.make_mesh({"context": 8})
    layer = nn.Dense(5, dot_general=dot_general)
    params = layer.init(jax.random.key(1), X[:, :, 0])
    expected = layer.apply(params, X[:, :, 0])
    with sharding.use_mesh(mesh):
        x = jax.device_put(X[:, :, 0], jax.NamedSharding(mesh, P(None, "context")))
        compiled = jax.jit(layer.apply).lower(params, x).compile()
        np.testing.assert_allclose(compiled(params, x), expected, atol=1e-5)
    assert "all-gather" not in compiled.as_text()
