"""How well an encoder and a linear head on its summary of an item learn classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def accuracy(model, train, held_out, *, steps: int, classes: int, batch_size: int = 64) -> float:
    """Accuracy on held-out (items, labels) after `steps` of Adam on the training ones."""
    x, label = map(jnp.asarray, train)
    params = {
        "encoder": jax.jit(lambda key: model.init(key, x[:1], train=False)["params"])(jax.random.key(0)),
        "head": 0.1 * jax.random.normal(jax.random.key(1), (model.width, classes)),
    }
    tx = optax.adam(3e-3)

    def logits(params, x):
        return model.apply({"params": params["encoder"]}, x, train=False)[1]["pooled"] @ params["head"]

    def loss(params, x, label):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), label).mean()

    @jax.jit
    def step(params, state, rows):
        updates, state = tx.update(jax.grad(loss)(params, x[rows], label[rows]), state)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(1)
    for _ in range(steps):
        params, state = step(params, state, rng.integers(0, len(x), batch_size))
    items, truth = map(jnp.asarray, held_out)
    return float((jax.jit(logits)(params, items).argmax(axis=-1) == truth).mean())
