import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.encoders import TextEncoder, VectorEncoder
from vfm.errors import UserError


def test_text_is_looked_up_and_read_out_by_one_table():
    model = TextEncoder(vocab_size=7, width=4)
    tokens = jnp.asarray([[0, 3, 6], [3, 3, 1]])
    variables = model.init(jax.random.key(0), tokens, train=False)
    table = variables["params"]["embedding"]["embedding"]
    x, _ = model.apply(variables, tokens, train=False)
    np.testing.assert_array_equal(x, table[tokens])
    logits = model.apply(variables, x, method="attend")
    np.testing.assert_allclose(logits, x @ table.T, atol=1e-6)


def test_vectors_of_another_size_are_refused():
    model = VectorEncoder(num_features=5, num_tokens=3, width=4)
    y, _ = model.init_with_output(jax.random.key(0), jnp.ones((2, 5)), train=False)[0]
    assert y.shape == (2, 3, 4)
    with pytest.raises(UserError, match=r"VectorEncoder takes items of shape \(5,\), not \(6,\)"):
        model.init(jax.random.key(0), jnp.ones((2, 6)), train=False)
