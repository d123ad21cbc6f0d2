import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.decoders.classifier import Classifier
from vfm.errors import UserError

X = jax.random.normal(jax.random.key(0), (3, 5, 4))
MASK = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0]]) > 0  # full, padded behind, padded on both sides
EXPECTED = {
    "first": [X[0, 0], X[1, 0], X[2, 2]],
    "last": [X[0, 4], X[1, 2], X[2, 3]],
    "mean": [X[0].mean(0), X[1, :3].mean(0), X[2, 2:4].mean(0)],
}


@pytest.mark.parametrize("pooling", EXPECTED)
def test_poolings_take_real_tokens_only(pooling):
    model = Classifier(num_classes=None, pooling=pooling)
    found, out = model.apply({}, X, input_mask=MASK, train=False)
    np.testing.assert_allclose(found, jnp.stack(EXPECTED[pooling]), atol=1e-6)
    np.testing.assert_array_equal(out["pooled"], found)
    np.testing.assert_allclose(model.apply({}, X, train=False)[0][0], EXPECTED[pooling][0], atol=1e-6)


def test_head_and_transform():
    model = Classifier(num_classes=2, transform="tanh")
    variables = model.init(jax.random.key(1), X, train=False)
    found, out = model.apply(variables, X, input_mask=MASK, train=False)
    hidden, classes = (variables["params"][name] for name in ("hidden", "classes"))
    pooled = jnp.tanh(jnp.stack(EXPECTED["first"]) @ hidden["kernel"])
    np.testing.assert_allclose(out["pooled"], pooled, atol=1e-6)
    np.testing.assert_allclose(found, pooled @ classes["kernel"], atol=1e-6)


def test_an_unknown_pooling_names_the_known():
    with pytest.raises(UserError, match="unknown pooling 'max'.*first, last, mean"):
        Classifier(pooling="max").init(jax.random.key(0), X, train=False)
