"""Train state: all that a checkpoint must hold about the model and its optimisation."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vfm import model as model_lib
from vfm.sharding import parameter_shardings
from vfm.train.optimizer import state_shardings


class TrainState(flax.struct.PyTreeNode):
    """Pure data, no functions. `step` int32[]: steps done. `rng`: the run's key; step keys are folded from it."""

    step: jax.Array
    params: Any
    opt_state: Any
    variables: Any  # without gradient: batch statistics, codebooks, teachers
    ema: Any  # exponential moving average of params; {} when off
    rng: jax.Array


def create(
    model, tx: optax.GradientTransformation, *, seed: int, length: int, ema: bool, more=lambda params: {}
) -> TrainState:
    """A fresh state. Pure: call it inside `jit` with `out_shardings` (see `shardings`).

    more: (params) -> variables that the objective keeps beside the model's.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = dict(model_lib.init(model, init_key, length))
    params = variables.pop("params")
    variables |= more(params)
    # A copy: the average must not share its buffer with parameters that are donated.
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), variables, average, run_key)


def shardings(state: TrainState, tx: optax.GradientTransformation, mesh: Mesh, rules) -> TrainState:
    """NamedShardings for a state of ShapeDtypeStructs: optimizer and average follow the parameters."""
    params = parameter_shardings(state.params, mesh, rules)
    replicated = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=replicated,
        params=params,
        opt_state=state_shardings(tx, state.params, params, mesh, state.opt_state),
        # Encoders that follow the trained ones are sharded like them.
        variables={
            name: params if name == "momentum" else jax.tree.map(lambda _: replicated, value)
            for name, value in state.variables.items()
        },
        ema=params if jax.tree.leaves(state.ema) else {},
        rng=replicated,
    )
