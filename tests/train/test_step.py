"""The training step: what of a frozen block stays, and how its encoders are called."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import contrastive
from vfm import objectives
from vfm.experiment import Experiment
from vfm.layers.norm import BatchNorm
from vfm.plan import abstract_batch
from vfm.train.state import TrainState
from vfm.train.step import make_train_step, with_frozen_blocks


@pytest.mark.parametrize("kind", ["codebook", "batch_stats"])
def test_what_moves_without_a_gradient_stays_in_a_frozen_block(kind):
    trained = {"encoders_image": {"a": False, "b": {"c": False}}, "decoders_image": {"a": True, "b": False}}
    old = {kind: {"encoders_image": {"n": 0}, "decoders_image": {"n": 0}}, "perceptual": {"encoders_image": 0}}
    new = {kind: {"encoders_image": {"n": 1}, "decoders_image": {"n": 1}}, "perceptual": {"encoders_image": 1}}
    found = with_frozen_blocks(new, old, trained)
    assert found == {**new, kind: {"encoders_image": {"n": 0}, "decoders_image": {"n": 1}}}
    assert with_frozen_blocks(new, old, None) == new


class Encoder(nn.Module):
    """Dropout, and a normalisation by the batch."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Model(nn.Module):
    def setup(self):
        self.encoders_x, self.head = Encoder(), nn.Dense(1)

    def __call__(self, x, *, train):
        return self.head(self.encoders_x(x, train=train))


def state_and_step(frozen, ema=0.0):
    model, x = Model(), jax.random.normal(jax.random.key(0), (8, 3))
    variables = model.init(jax.random.key(1), x, train=False)

    def loss_fn(params, variables, batch, rng, *, train):
        y, changed = model.apply(
            {"params": params, **variables}, batch["x"], train=train, rngs={"dropout": rng}, mutable=["batch_stats"]
        )
        return {"y": (1.0, y.sum(), jnp.ones(()))}, objectives.Aux({}, changed)

    params, tx = variables["params"], optax.sgd(0.1)
    trained = jax.tree.map(lambda _: True, params)
    if frozen:
        trained["encoders_x"] = jax.tree.map(lambda _: False, params["encoders_x"])
        labels = jax.tree.map(lambda learns: "on" if learns else "off", trained)
        tx = optax.partition({"on": tx, "off": optax.set_to_zero()}, labels)
    state = TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
        variables={"batch_stats": variables["batch_stats"]}, ema=params if ema else {}, rng=jax.random.key(2),
    )  # fmt: skip
    run = jax.jit(make_train_step(loss_fn, tx, lambda step: 0.1, ema_decay=ema, trained=trained))
    return state, lambda state: run(state, {"x": x}), model.apply(variables, x, train=False).sum()


def test_an_encoder_that_is_frozen_is_called_as_in_evaluation():
    """With its stored statistics, which stay, and without dropout; another one is not."""
    state, run, evaluated = state_and_step(frozen=True)
    after, measured = run(state)
    np.testing.assert_allclose(measured["loss"][0], evaluated, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after.variables, state.variables)
    state, run, evaluated = state_and_step(frozen=False)
    after, measured = run(state)
    assert abs(measured["loss"][0] - evaluated) > 1e-2
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.variables, state.variables))) > 0


def test_the_average_of_a_frozen_parameter_keeps_every_bit():
    state, run, _ = state_and_step(frozen=True, ema=0.9)
    zero = lambda p: jnp.full_like(p, -0.0)
    encoder = jax.tree.map(zero, state.params["encoders_x"])
    params = {**state.params, "encoders_x": encoder}
    after, _ = run(state.replace(params=params, ema=params))
    assert all(np.signbit(leaf).all() for leaf in jax.tree.leaves((after.params, after.ema)) if not leaf.any())
    assert np.signbit(after.ema["encoders_x"]["Dense_0"]["kernel"]).all()


def test_the_encoders_of_a_model_are_those_that_are_frozen():
    """By their names in VFM, and with the layers inside them."""
    config = contrastive.get_config("smoke").copy_and_resolve_references()
    config.model.encoders.image.norm = "batch"
    config.optimizer.frozen = ("encoders_image/.*",)
    experiment, called = Experiment(config), {}

    def spy(method, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            called.setdefault(context.module.path[0], set()).add(kwargs["train"])
        return method(*args, **kwargs)

    with nn.intercept_methods(spy), experiment.use_mesh():
        jax.eval_shape(experiment.train_step, experiment.abstract_state, abstract_batch(experiment))
    assert called == {"encoders_image": {False}}
