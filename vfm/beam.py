"""Beam search with a key/value cache, one jitted program for the prompts and all new tokens."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm.errors import UserError
from vfm.generate import (
    PLACE,
    Plan,
    Reader,
    advance,
    append,
    ends,
    for_steps,
    inputs_of,
    make_plan,
    newest,
    prefill,
    stop_table,
)
from vfm.sampling import History

# What the decoder does not write: it is the same for all beams of a prompt.
_SHARED = ("cross_key", "cross_value", "cross_valid", *(name for kind in PLACE.values() for name in kind))
# The batch axis of the leaves of a `Reader`. None: no batch axis.
BATCH_AXIS = {**dict.fromkeys(_SHARED, 0), "key": 1, "value": 1, "cross_key": 1, "cross_value": 1, "valid": 0}
BATCH_AXIS["index"] = None

EARLY_STOPPING = (False, True, "never")


class Beams(NamedTuple):
    """n beams of each of B prompts. Running: reader and history of B·n rows; score float32[B, n], the sum of
    log-probabilities (-inf: no such beam); stopping int32[B, n]. Finished: tokens int32[B, n, max_new] and their final
    scores float32[B, n], best first (-inf: none yet). open bool[B]: the search goes on."""

    reader: Reader
    history: History
    score: jax.Array
    stopping: jax.Array
    tokens: jax.Array
    final: jax.Array
    open: jax.Array


def beam_search(
    model,
    variables,
    batch,
    *,
    max_new: int,
    eos_id: int | Sequence[int],
    beams: int,
    num_return: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    pad_id: int | None = None,
    stop: Sequence[Sequence[int]] | np.ndarray = (),
    start_id: int | None = None,
    unroll: bool | None = None,
    **constraints,
) -> tuple[jax.Array, jax.Array]:
    """The `num_return` best answers that were found: (int32[B, num_return, max_new], float32[B, num_return]).

    An answer's score is the sum of its log-probabilities / length ** length_penalty; the length counts the new
    tokens, the end included. The best come first; where fewer were found the score is -inf. Arguments that are not
    listed are those of `generate`; `constraints` are the fields of `vfm.sampling.Sampling` of that name, applied to the
    log-probabilities.

    early_stopping: True: a prompt is done when it has `beams` answers. False: when in addition its best running beam
      is, at its present length, worse than the worst of them. "never": when it is so at its best possible length.

    The candidates, the pool of answers and the ends are those of `transformers` 5 (`num_beams`), so that tokens and
    scores agree. Raises `UserError` for fields out of range.
    """
    for name, value in (("beams", beams), ("num_return", num_return)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number >= 1")
    if num_return > beams:
        raise UserError(f"num_return={num_return} is more than beams={beams}")
    if early_stopping not in EARLY_STOPPING:
        raise UserError(f'early_stopping={early_stopping!r} must be true, false or "never"')
    plan = make_plan(model, variables, batch, max_new, eos_id, pad_id, start_id, unroll, **constraints)
    if plan.sampling.temperature:
        raise UserError(f"temperature={plan.sampling.temperature} does not go with beams={beams}: set it to 0")
    options = (beams, num_return, float(length_penalty), early_stopping)
    return _search(model, plan, options, variables, inputs_of(batch), stop_table(model, stop))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(model, plan, options, variables, inputs, stop):
    beams, num_return, *rest = options
    logits, reader, history = prefill(model, plan, variables, inputs)
    B = len(logits)
    repeat = functools.partial(jnp.repeat, repeats=beams)
    state = Beams(
        reader=map_rows(repeat, reader),
        history=History(repeat(history.tokens, axis=0), repeat(history.real, axis=0), history.step),
        # All beams are alike at first: one is enough.
        score=jnp.full((B, beams), -jnp.inf).at[:, 0].set(0.0),
        stopping=jnp.zeros((B, beams), jnp.int32),
        tokens=jnp.full((B, beams, plan.max_new), plan.pad, jnp.int32),
        final=jnp.full((B, beams), -jnp.inf),
        open=jnp.ones((B,), bool),
    )
    select = functools.partial(_select, plan, *rest, stop)

    later = for_steps(plan, variables)

    def body(state):
        logits, reader = advance(model, later, state.reader, newest(state.history, plan.max_new))
        return select(logits, state._replace(reader=reader))

    state = jax.lax.while_loop(
        lambda state: (state.history.step < plan.max_new) & state.open.any(),
        body,
        select(repeat(logits, axis=0), state),
    )
    return state.tokens[:, :num_return], state.final[:, :num_return]


def _select(plan: Plan, length_penalty, early_stopping, stop, logits, state: Beams) -> Beams:
    """Extends the beams by one token: some finish, the others go on."""
    (B, n), V = state.score.shape, logits.shape[-1]
    step = state.history.step + 1  # the length of an answer that ends with this token
    logp = jax.nn.log_softmax(logits, axis=-1)
    logp = plan.sampling.constrain(logp, state.history, plan.max_new, plan.eos)
    total = (logp.reshape(B, n, V) + state.score[:, :, None]).reshape(B, n * V)
    # Even if the best of them all end, as many others as there are beams are left.
    count = min(max(2, 1 + len(plan.eos)) * n, n * V)
    score, index = jax.lax.top_k(total, count)
    parent, token = index // V, (index % V).astype(jnp.int32)
    ended, stopping = ends(plan, stop, jnp.take_along_axis(state.stopping, parent, axis=1), token)
    ended |= step == plan.max_new

    # The pool of answers: only the n best candidates may enter it.
    power = step.astype(jnp.float32) ** length_penalty
    enters = ended & (jnp.arange(count) < n)[None] & state.open[:, None]
    entry = jnp.where(enters, score / power, -jnp.inf)
    answers = state.history.tokens[:, -plan.max_new :].reshape(B, n, -1)
    answers = jnp.where((jnp.arange(plan.max_new) == step - 1)[None, None], token[:, :, None], _take(answers, parent))
    final, best = jax.lax.top_k(jnp.concatenate([state.final, entry], axis=1), n)
    tokens = _take(jnp.concatenate([state.tokens, answers], axis=1), best)

    # The beams that go on.
    score, chosen = jax.lax.top_k(jnp.where(ended, -jnp.inf, score), n)
    parent, token, stopping = (jnp.take_along_axis(x, chosen, axis=1) for x in (parent, token, stopping))
    rows = (jnp.arange(B)[:, None] * n + parent).reshape(-1)
    history = History(state.history.tokens[rows], state.history.real[rows], state.history.step)
    longest = early_stopping == "never" and length_penalty > 0
    promise = score[:, 0] / (float(plan.max_new) ** length_penalty if longest else power)
    full = jnp.isfinite(final[:, -1])
    is_open = ~full if early_stopping is True else ~full | (promise > final[:, -1])
    return Beams(
        gather_beams(state.reader, rows),
        append(history, token.reshape(-1), plan.max_new),
        score,
        stopping,
        tokens,
        final,
        state.open & is_open & jnp.isfinite(score[:, 0]),
    )


def _take(x, index):
    """x[b, index[b, i]] for x [B, n, ...]."""
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


def gather_beams(reader: Reader, rows: jax.Array) -> Reader:
    """Row rows[i] in place of row i, int32[R]: each beam gets the cache of its parent, a beam of the same prompt."""
    return map_rows(functools.partial(jnp.take, indices=rows), reader, keep=_SHARED)


def map_rows(fn, reader: Reader, keep: Sequence[str] = ()) -> Reader:
    """fn(leaf, axis=its batch axis) for every leaf with rows; those named in `keep` stay."""

    def one(path, leaf):
        name = path[-1].key
        axis = BATCH_AXIS[name]
        return leaf if axis is None or name in keep else fn(leaf, axis=axis)

    return jax.tree_util.tree_map_with_path(one, reader)
