"""One training step and one evaluation step, as pure functions of the state and the batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vfm.objectives import LossFn
from vfm.objectives.next_token import MUTABLE
from vfm.train.state import TrainState


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: Callable,
    *,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    trained: Any = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """(state, batch) -> (state, {name: (sum, count)}).

    With `accumulate` > 1 the batch is cut into that many micro-batches, one after the other. The result is exactly
    that of the whole batch, also under masks: a first pass counts what each loss term divides by (the compiler drops
    all else of it), so that every micro-batch's gradient has the right weight.

    trained: for every parameter whether it learns. The gradient of the others is zero, and is not computed; and what
    training moves without a gradient, such as codebooks, stays in a block of which no parameter learns; an encoder of
    that kind works as in evaluation, without dropout and noise and with its stored batch statistics.
    """
    loss_fn = _frozen_encoders_evaluate(loss_fn, trained)

    def split(x):
        # Row r goes to micro-batch r % accumulate, which leaves each device its own rows. Scalars go to all.
        if x.ndim == 0:
            return jnp.broadcast_to(x, (accumulate,))
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def gradients(params, variables, batch, rng, counts=None):
        def scalar(params):
            if trained is not None:
                params = jax.tree.map(lambda p, learns: p if learns else jax.lax.stop_gradient(p), params, trained)
            terms, aux = loss_fn(params, variables, batch, rng, train=True)
            loss = sum(
                weight * total / jnp.maximum(counts[name] if counts else n, 1e-6)
                for name, (weight, total, n) in terms.items()
            )
            measured = {**aux.metrics, **{name: (total, n) for name, (_, total, n) in terms.items()}}
            return loss, (measured, aux.variables)

        (loss, (measured, variables)), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        return grads, variables, loss, measured

    def accumulated(params, variables, batch, rng):
        micro = jax.tree.map(split, batch)
        numbers = jnp.arange(accumulate)

        def count(args):
            i, batch = args
            terms, _ = loss_fn(params, variables, batch, jax.random.fold_in(rng, i), train=True)
            return {name: n for name, (_, _, n) in terms.items()}

        counts = jax.tree.map(lambda n: n.sum(), jax.lax.map(count, (numbers, micro)))

        def body(carry, args):
            i, batch = args
            grads, variables, loss = carry
            new, variables, new_loss, measured = gradients(params, variables, batch, jax.random.fold_in(rng, i), counts)
            return (jax.tree.map(jnp.add, grads, new), variables, loss + new_loss), measured

        zeros = jax.tree.map(jnp.zeros_like, params)
        carry, measured = jax.lax.scan(body, (zeros, variables, jnp.zeros(())), (numbers, micro))
        return *carry, jax.tree.map(lambda m: m.sum(axis=0), measured)

    def train_step(state: TrainState, batch: dict):
        rng = jax.random.fold_in(state.rng, state.step)
        differentiate = gradients if accumulate == 1 else accumulated
        grads, variables, loss, measured = differentiate(state.params, state.variables, batch, rng)
        variables = with_frozen_blocks(variables, state.variables, trained)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay:
            # The average of a frozen parameter stays the parameter, to the last bit: a sum would lose the sign of -0.
            follow = lambda average, p, learns: average + (1.0 - ema_decay) * (p - average) if learns else average
            ema = jax.tree.map(follow, ema, params, trained or jax.tree.map(lambda _: True, params))
        one = jnp.ones(())
        measured = {
            **measured,
            "loss": (loss, one),
            "grad_norm": (optax.tree.norm(grads), one),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), one),
        }
        if "skipped" in batch:
            measured["skipped_records"] = (batch["skipped"].sum().astype(jnp.float32), one)
        return state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, variables=variables, ema=ema
        ), measured

    return train_step


def _frozen_encoders_evaluate(loss_fn: LossFn, trained: Any) -> LossFn:
    """A loss under which encoders of which no parameter learns are called with train=False."""
    frozen = {block for block in trained or () if block.startswith("encoders_") and _stays(block, trained)}

    def call(method, args, kwargs, context):
        path = context.module.path
        if len(path) == 1 and path[0] in frozen and "train" in kwargs:
            kwargs = {**kwargs, "train": False}
        return method(*args, **kwargs)

    def wrapped(*args, **kwargs):
        with nn.intercept_methods(call):
            return loss_fn(*args, **kwargs)

    return wrapped if frozen else loss_fn


def _stays(block: str, trained: Any) -> bool:
    """Whether no parameter of a block learns."""
    return block in trained and not any(jax.tree.leaves(trained[block]))


def with_frozen_blocks(new: Any, old: Any, trained: Any) -> Any:
    """The new variables, with the old ones (`MUTABLE`: codebooks, batch statistics) of the blocks (encoders_X, …) of
    which no parameter learns."""
    if trained is None:
        return new
    keep = lambda kind: {
        block: old[kind][block] if _stays(block, trained) else leaf for block, leaf in new[kind].items()
    }
    return {**new, **{kind: keep(kind) for kind in MUTABLE if kind in new}}


def make_eval_step(loss_fn: LossFn) -> Callable:
    """(params, variables, batch, number) -> {name: (sum, count)} of the loss terms and metrics, without dropout.

    number: of the batch in its split; what is random in a loss, such as noise, is drawn by it, so that no two batches
    have the same draws, and every evaluation has the same ones.
    `total_loss` reports the whole loss once the sums are added up.
    """

    def eval_step(params, variables, batch, number=0):
        rng = jax.random.fold_in(jax.random.key(0), number)
        terms, aux = loss_fn(params, variables, batch, rng, train=False)
        return {**aux.metrics, **{name: (total, count) for name, (_, total, count) in terms.items()}}, {
            name: jnp.float32(weight) for name, (weight, _, _) in terms.items()
        }

    return eval_step


def total_loss(measured: dict[str, tuple[float, float]], weights: dict[str, float]) -> float:
    """Sum of weight · sum / count over the loss terms that were measured."""
    return sum(weight * measured[name][0] / measured[name][1] for name, weight in weights.items() if measured[name][1])
