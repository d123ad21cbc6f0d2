"""Text generation with a key/value cache: one jitted program for the prompts and all new tokens."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm import tree
from vfm.errors import UserError, unknown
from vfm.layers.transformer import unstack
from vfm.model import INPUTS, layout
from vfm.sampling import History, Sampling
from vfm.stopping import stop_tokens


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed in the program of a request: see `generate`."""

    max_new: int
    eos: tuple[int, ...]
    pad: int
    start: int | None
    unroll: bool
    sampling: Sampling


class Reader(NamedTuple):
    """What a model has read: its cache; and int32[R, 1], where given, the place of the last token (see `PLACE`)."""

    cache: Any
    place: dict[str, jax.Array]


# Inputs that say where a token stands. The first that a batch has counts the new tokens on, the others stay: in a
# blank that is filled (GLM), `positions` is where the blank is. Types always stay.
PLACE = {
    "decoder_only": ("block_positions", "positions", "token_types"),
    "encoder_decoder": ("decoder_positions",),
}


class State(NamedTuple):
    """Between two tokens: the reader without the newest token, the history with it, which rows are done, and where in
    the automaton of the stop sequences they are."""

    reader: Reader
    history: History
    done: jax.Array
    stopping: jax.Array


def generate(
    model,
    variables,
    batch,
    *,
    max_new: int,
    eos_id: int | Sequence[int],
    pad_id: int | None = None,
    stop: Sequence[Sequence[int]] | np.ndarray = (),
    start_id: int | None = None,
    unroll: bool | None = None,
    rng: jax.Array | None = None,
    **sampling,
) -> jax.Array:
    """Continues every row of `batch`: -> int32[B, max_new].

    The prompts may be of unequal length, padded at either end (`input_mask`, see `VFM`; without it there is no
    padding). A row ends with an `eos_id` (one or several; (): none) or a `stop` sequence, which it keeps; `pad_id` (by
    default the first `eos_id`) fills it up. The program ends when all rows have.

    stop: sequences of token ids, or what `vfm.stopping.stop_strings` gives.
    start_id: what the decoder of an encoder-decoder begins with, where the batch has no `decoder_tokens`.
    unroll: compile every layer on its own for the new tokens: a longer compilation, a copy of the layers' parameters,
      and faster steps, on CPU nearly twice as fast for models of the size of GPT-2. None: as `unrolls` says.
    rng: one key, or a key per row; needed at a temperature > 0. A row's draws depend on its key (or its number and
      the one key) alone, not on the other rows.
    sampling: fields of `vfm.sampling.Sampling`; by default the best token is taken.

    Raises `UserError` for fields out of range, and for prompts too long for the backbone.
    """
    plan = make_plan(model, variables, batch, max_new, eos_id, pad_id, start_id, unroll, **sampling)
    inputs, stop = inputs_of(batch), stop_table(model, stop)
    keys = _keys(plan, rng, len(inputs["input_mask"]))
    return _generate(model, plan, variables, inputs, stop, keys)


def stream(
    model, variables, batch, *, max_new, eos_id, pad_id=None, stop=(), start_id=None, unroll=None, rng=None, **sampling
):
    """As `generate`, token by token: an iterator of int32[B], at most `max_new` of them, until all rows have ended."""
    plan = make_plan(model, variables, batch, max_new, eos_id, pad_id, start_id, unroll, **sampling)
    inputs, stop = inputs_of(batch), stop_table(model, stop)
    keys = _keys(plan, rng, len(inputs["input_mask"]))

    def tokens() -> Iterator[jax.Array]:
        state, token, ended = _first(model, plan, variables, inputs, stop, keys)
        yield token
        later = jax.jit(for_steps, static_argnums=0)(plan, variables) if plan.unroll else variables
        while not ended:
            state, token, ended = _next(model, plan, later, stop, keys, state)
            yield token

    return tokens()


def unrolls(params: Any) -> bool:
    """Whether a backbone's layers are compiled one by one for new tokens, by the size of its stacks float[L, ...].

    From 4 MiB a layer on, to copy a layer out of its stack for every token costs much of the time; up to 2 GiB in all,
    since the layers are kept a second time.
    """
    stacks = [leaf for path, leaf in tree.flatten(params).items() if "transformer/layers/" in path]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in stacks)
    return bool(stacks) and 2**22 * stacks[0].shape[0] <= size <= 2**31


def make_plan(model, variables, batch, max_new, eos_id, pad_id, start_id, unroll, **sampling) -> Plan:
    """Checks a request against the model."""
    if model.backbone.kind == "encoder_only":
        raise UserError("an encoder-only backbone continues no text: fill masked positions with vfm.generate.fill")
    if "text" not in model.decoders:
        raise UserError("a model without decoders.text gives no text")
    if isinstance(max_new, bool) or not isinstance(max_new, int) or max_new < 1:
        raise UserError(f"max_new={max_new!r} must be a whole number >= 1")
    known = [field.name for field in dataclasses.fields(Sampling)]
    for name in sampling:
        if name not in known:
            raise unknown("field", name, known, "generate")
    sampling = Sampling(**sampling)
    if model.backbone.kind == "encoder_decoder":
        if start_id is None and "decoder_tokens" not in batch:
            raise UserError("an encoder-decoder needs start_id, with which its answers begin, or decoder_tokens")
        length = batch["decoder_tokens"].shape[1] if "decoder_tokens" in batch else 1
    else:
        length = np.shape(batch["input_mask"] if "input_mask" in batch else batch["tokens"])[1]
    check_length(model, length, max_new)
    rows = model.backbone.num_block_positions if "block_positions" in batch else None
    if rows is not None and max_new >= rows:
        raise UserError(f"{max_new} new tokens do not fit in a blank of model.backbone.num_block_positions={rows}")
    eos = tuple(map(int, np.atleast_1d(eos_id)))
    pad = pad_id if pad_id is not None else eos[0] if eos else 0
    unroll = unrolls(variables.get("params", {}).get("backbone", {})) if unroll is None else unroll
    return Plan(max_new, eos, int(pad), None if start_id is None else int(start_id), bool(unroll), sampling)


def check_length(model, length: int, max_new: int) -> None:
    """Refuses prompt and answer that are together longer than the backbone's `max_len`."""
    if length + max_new > model.backbone.max_len:
        raise UserError(
            f"prompt of {length} positions + {max_new} new tokens is longer than "
            f"model.backbone.max_len={model.backbone.max_len}"
        )


def bucket(length: int, most: int) -> int:
    """The padded length for prompts of `length` positions: few different ones, so that few programs are compiled."""
    return min(max(16, 1 << (length - 1).bit_length()), most)


def stop_table(model, stop) -> np.ndarray | None:
    """The automaton for `generate`'s argument `stop`."""
    if isinstance(stop, np.ndarray | jax.Array):
        return stop
    return stop_tokens(stop, model.decoders["text"].vocab_size) if len(stop) else None


def _keys(plan, rng, rows):
    """A key per row; None for greedy choice."""
    if not plan.sampling.temperature:
        return None
    if rng is None:
        raise UserError("generate: sampling at a temperature needs a key: pass rng=jax.random.key(seed)")
    if jnp.ndim(rng):
        if rng.shape != (rows,):
            raise UserError(f"generate: rng holds {rng.shape} keys for {rows} rows; pass one key, or one per row")
        return rng
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))


def inputs_of(batch) -> dict:
    """The entries of a batch that the model reads; masks as bool, and `input_mask` also where it is left out."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    if "input_mask" not in inputs:
        inputs["input_mask"] = np.ones(np.shape(inputs["tokens"]), bool)
    return {name: jnp.asarray(x, bool) if name.endswith("_mask") else x for name, x in inputs.items()}


# ------------------------------------------------------------------------------- inside the program


def prefill(model, plan: Plan, variables, inputs) -> tuple[jax.Array, Reader, History]:
    """Reads the prompts: logits float32[B, V] for the first new token, and what reads and remembers the next ones."""
    B, T = inputs["input_mask"].shape
    if model.backbone.kind == "encoder_decoder":
        start = jnp.full((B, 1), plan.start, jnp.int32) if "decoder_tokens" not in inputs else inputs["decoder_tokens"]
        mask = inputs.get("decoder_mask", jnp.ones(start.shape, bool))
        inputs = {**inputs, "decoder_tokens": start, "decoder_mask": mask}
        moved = tuple(name for name in inputs if name.startswith("decoder_"))
        inputs, real = _end_together(inputs, mask, moved, signals=("signal_starts",))
        tokens, text, room = inputs["decoder_tokens"], real, (T,)
    else:
        moved = tuple(name for name in inputs if name not in ("inputs", "starts", "signal_starts"))
        inputs, real = _end_together(inputs, inputs["input_mask"], moved, signals=("starts", "signal_starts"))
        tokens, text, room = inputs.get("tokens", jnp.zeros((B, T), jnp.int32)), is_text(model, inputs), ()
    cache = model.init_cache(B, real.shape[1] + plan.max_new, *room)
    _, out = model.apply(variables, **inputs, cache=cache, train=False)
    # Of the last position alone: those of all, which the call gives, are then not computed.
    logits = model.apply(variables, out["output"][:, -1:], train=False, method="text_logits")
    new = ((0, 0), (0, plan.max_new))
    history = History(
        jnp.pad(tokens.astype(jnp.int32), new, constant_values=plan.pad), jnp.pad(text, new), jnp.int32(0)
    )
    place = {name: inputs[name][:, -1:] for name in PLACE[model.backbone.kind] if name in inputs}
    return logits[:, 0].astype(jnp.float32), Reader(out["backbone"]["cache"], place), history


def advance(model, variables, reader: Reader, tokens) -> tuple[jax.Array, Reader]:
    """Reads one more token of each row, int32[R]: logits float32[R, V] for the next."""
    place = {name: x + 1 if name == _counting(reader.place) else x for name, x in reader.place.items()}
    if model.backbone.kind == "encoder_decoder":
        call = {"decoder_tokens": tokens[:, None]}
    else:
        call = {"tokens": tokens[:, None], "input_mask": jnp.ones((len(tokens), 1), bool)}
    logits, out = model.apply(variables, **call, **place, cache=reader.cache, train=False)
    return logits[:, 0].astype(jnp.float32), Reader(out["backbone"]["cache"], place)


def for_steps(plan: Plan, variables):
    """The variables with which `advance` is called."""
    if not plan.unroll:
        return variables
    params = variables["params"]
    return {**variables, "params": {**params, "backbone": unstack(params["backbone"])}}


def _counting(names) -> str | None:
    """Which of these inputs the new tokens count on."""
    return next((name for kind in PLACE.values() for name in kind if name in names and name != "token_types"), None)


def _end_together(inputs, mask, names, signals):
    """The inputs with rows turned so that all of them end at the last position, and their mask.

    New tokens then stand right behind every prompt, as distances (windows, relative positions) demand.
    """
    length = mask.shape[1]
    shift = jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)  # how many positions of padding follow the prompt
    source = (jnp.arange(length)[None] - shift[:, None]) % length
    inputs = {**inputs, **{name: jnp.take_along_axis(inputs[name], source, axis=1) for name in names}}
    for name in signals:
        if name in inputs:
            moved = {key: jnp.where(at < 0, at, at + shift[:, None]) for key, at in inputs[name].items()}
            inputs[name] = moved
    return inputs, jnp.take_along_axis(mask, source, axis=1)


def is_text(model, inputs) -> jax.Array:
    """bool[B, T]: the real positions that hold no item of another modality."""
    real = inputs["input_mask"]
    T = real.shape[1]
    for name, modality in layout(model, T).modalities.items():
        for key, slots in (("starts", modality.slots), ("signal_starts", modality.signals)):
            if name in inputs.get(key, {}):
                place = jnp.arange(T)[None, None] - inputs[key][name][:, :, None]  # within the item: 0 to slots - 1
                item = (inputs[key][name][:, :, None] >= 0) & (place >= 0) & (place < slots)
                real = real & ~item.any(axis=1)
    return real


def append(history: History, tokens, max_new: int) -> History:
    """The history with one more token of each row, int32[R]."""
    at = history.tokens.shape[1] - max_new + history.step
    write = jax.lax.dynamic_update_slice_in_dim
    return History(
        write(history.tokens, tokens[:, None], at, axis=1),
        write(history.real, jnp.ones((len(tokens), 1), bool), at, axis=1),
        history.step + 1,
    )


def newest(history: History, max_new: int) -> jax.Array:
    """int32[R]: the token that was appended last."""
    at = history.tokens.shape[1] - max_new + history.step - 1
    return jax.lax.dynamic_index_in_dim(history.tokens, at, axis=1, keepdims=False)


def ends(plan: Plan, stop, stopping, tokens) -> tuple[jax.Array, jax.Array]:
    """(whether the tokens end their rows, the states of the automaton after them); any shape."""
    ended = jnp.isin(tokens, jnp.asarray(plan.eos, jnp.int32)) if plan.eos else jnp.zeros(tokens.shape, bool)
    if stop is None:
        return ended, stopping
    stopping = jnp.asarray(stop)[stopping, tokens]
    return ended | (stopping == len(stop) - 1), stopping


def _begin(model, plan, variables, inputs, stop, keys) -> State:
    logits, reader, history = prefill(model, plan, variables, inputs)
    B = len(logits)
    state = State(reader, history, jnp.zeros((B,), bool), jnp.zeros((B,), jnp.int32))
    return _choose(plan, stop, keys, logits, state)


def _step(model, plan, variables, stop, keys, state: State) -> State:
    logits, reader = advance(model, variables, state.reader, newest(state.history, plan.max_new))
    return _choose(plan, stop, keys, logits, state._replace(reader=reader))


def _choose(plan, stop, keys, logits, state: State) -> State:
    history = state.history
    logits = plan.sampling.constrain(logits, history, plan.max_new, plan.eos)
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, history.step)
    tokens = jnp.where(state.done, plan.pad, plan.sampling.choose(logits, keys)).astype(jnp.int32)
    ended, stopping = ends(plan, stop, state.stopping, tokens)
    return State(state.reader, append(history, tokens, plan.max_new), state.done | ended, stopping)


def _unfinished(plan, state: State) -> jax.Array:
    return (state.history.step < plan.max_new) & ~state.done.all()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model, plan, variables, inputs, stop, keys):
    state = jax.lax.while_loop(
        functools.partial(_unfinished, plan),
        functools.partial(_step, model, plan, for_steps(plan, variables), stop, keys),
        _begin(model, plan, variables, inputs, stop, keys),
    )
    return state.history.tokens[:, -plan.max_new :]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first(model, plan, variables, inputs, stop, keys):
    state = _begin(model, plan, variables, inputs, stop, keys)
    return state, newest(state.history, plan.max_new), ~_unfinished(plan, state)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _next(model, plan, variables, stop, keys, state):
    state = _step(model, plan, variables, stop, keys, state)
    return state, newest(state.history, plan.max_new), ~_unfinished(plan, state)


# --------------------------------------------------------------------------------------- encoder-only


def fill(model, variables, batch, *, mask_id: int, steps: int = 10, suppress: Sequence[int] = ()) -> jax.Array:
    """Fills the positions of `batch["tokens"]` that hold `mask_id`: -> int32[B, T]; all others stay.

    suppress: ids, besides `mask_id`, that are never chosen.

    Mask-predict (Ghazvininejad et al. 2019, arXiv:1904.09324): all masked positions are predicted at once, then in
    each of `steps` rounds the least certain ones, fewer each time, are masked and predicted again.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"fill: steps={steps!r} must be a whole number >= 1")
    return _fill(model, steps, variables, inputs_of(batch), mask_id, jnp.asarray([mask_id, *suppress], jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fill(model, steps, variables, inputs, mask_id, forbidden):
    given = inputs["tokens"]
    free = (given == mask_id) & inputs["input_mask"]
    count = free.sum(axis=1, keepdims=True)

    def body(t, carry):
        tokens, certainty = carry
        # The n least certain of the free positions; at t = 0 all of them.
        n = count * (steps - t) // steps
        rank = jnp.argsort(jnp.argsort(jnp.where(free, certainty, jnp.inf), axis=1), axis=1)
        masked = free & (rank < n)
        call = {**inputs, "tokens": jnp.where(masked, mask_id, tokens)}
        logits = model.apply(variables, **call, train=False)[0].astype(jnp.float32)
        logp = jax.nn.log_softmax(logits, axis=-1).at[:, :, forbidden].set(-jnp.inf)
        tokens = jnp.where(masked, jnp.argmax(logp, axis=-1).astype(jnp.int32), tokens)
        return tokens, jnp.where(masked, logp.max(axis=-1), certainty)

    start = (given.astype(jnp.int32), jnp.zeros(given.shape, jnp.float32))
    return jax.lax.fori_loop(0, steps, body, start)[0]
