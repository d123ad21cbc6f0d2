"""Which token comes next: constraints and filters on logits, and the draw.

Every filter takes logits float[R, V] and returns them with what is ruled out at -inf.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vfm.errors import UserError


class History(NamedTuple):
    """tokens int32[R, S]: the prompt, ending at column S - max_new, and the tokens so far behind it. real bool[R, S]:
    where text stands. step int32[]: how many new tokens there are."""

    tokens: jax.Array
    real: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the order in which the fields apply is that of `transformers`.

    Constraints, for every kind of search:
      repetition_penalty    logits of tokens in the prompt or the answer: / penalty if positive, else * penalty
                            (Keskar et al. 2019, arXiv:1909.05858)
      no_repeat_ngram_size  no n-gram twice in prompt and answer (Paulus et al. 2017, arXiv:1705.04304); 0: off
      min_new               no end of sequence before so many new tokens
      forced_bos_id         the first new token; forced_eos_id: the last, if the answer is as long as it may be
      suppress              ids never chosen; begin_suppress: ids not chosen as the first token (after a forced one)
    Filters, for sampling:
      temperature           logits / temperature; 0: the best token, no sampling
      top_k                 the k best tokens; 0: all (Fan et al. 2018, arXiv:1805.04833)
      top_p                 the fewest tokens whose probabilities reach top_p (Holtzman et al. 2020, arXiv:1904.09751)
      min_p                 tokens of at least min_p times the best probability (Nguyen et al. 2024, arXiv:2407.01082)
      typical_p             the fewest most typical tokens that reach typical_p (Meister et al. 2022, arXiv:2202.00666)
      epsilon_cutoff, eta_cutoff   probability >= epsilon; >= min(eta, sqrt(eta) exp(-entropy)) (Hewitt et al. 2022,
                            arXiv:2210.15191)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new: int = 0
    forced_bos_id: int | None = None
    forced_eos_id: int | tuple[int, ...] | None = None
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("suppress", "begin_suppress"):  # hashable, as a static argument of jit must be
            object.__setattr__(self, name, tuple(map(int, getattr(self, name))))
        if isinstance(self.forced_eos_id, Sequence):
            object.__setattr__(self, "forced_eos_id", tuple(self.forced_eos_id))
        for name in ("top_k", "no_repeat_ngram_size", "min_new"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"{name}={value!r} must be a whole number >= 0")
        for name, (low, high), words in (
            ("temperature", (0, float("inf")), "0 (the best token) or more"),
            ("repetition_penalty", (1e-6, float("inf")), "more than 0 (1: none)"),
            ("top_p", (1e-9, 1), "a share, more than 0 and at most 1 (all)"),
            ("typical_p", (1e-9, 1), "a share, more than 0 and at most 1 (all)"),
            ("min_p", (0, 1), "a share, from 0 (all) to 1"),
            ("epsilon_cutoff", (0, 1), "a probability, from 0 (all) to 1"),
            ("eta_cutoff", (0, 1), "a probability, from 0 (all) to 1"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high or value == float("inf"):
                raise UserError(f"{name}={value!r} must be {words}")
        if not self.temperature:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name in _FILTERS and value != field.default:
                    raise UserError(f"{field.name}={value} needs a temperature > 0: at 0 the best token is taken")

    def constrain(self, logits, history: History, max_new: int, eos: Sequence[int]) -> jax.Array:
        """Applies the constraints to logits float32[R, V]."""
        first, last = history.step == int(self.forced_bos_id is not None), history.step == max_new - 1
        if self.repetition_penalty != 1:
            logits = penalize_repetition(logits, history, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            logits = forbid_repeated_ngrams(logits, history, self.no_repeat_ngram_size, max_new)
        if self.min_new and len(eos):
            logits = jnp.where(history.step < self.min_new, forbid(logits, eos), logits)
        if self.forced_bos_id is not None:
            logits = jnp.where(history.step == 0, force(logits, self.forced_bos_id), logits)
        if self.forced_eos_id is not None:
            logits = jnp.where(last, force(logits, self.forced_eos_id), logits)
        if self.suppress:
            logits = forbid(logits, self.suppress)
        if self.begin_suppress:
            logits = jnp.where(first, forbid(logits, self.begin_suppress), logits)
        return logits

    def choose(self, logits, keys) -> jax.Array:
        """int32[R]: the best tokens, or draws with one key per row after the filters."""
        if not self.temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p:
            logits = min_p(logits, self.min_p)
        if self.typical_p < 1:
            logits = typical(logits, self.typical_p)
        if self.epsilon_cutoff:
            logits = epsilon(logits, self.epsilon_cutoff)
        if self.eta_cutoff:
            logits = eta(logits, self.eta_cutoff)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


_FILTERS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def forbid(logits, ids) -> jax.Array:
    """The ids at -inf; ids outside of the vocabulary are passed over."""
    return logits.at[:, jnp.asarray(ids, jnp.int32)].set(-jnp.inf, mode="drop")


def force(logits, ids) -> jax.Array:
    """The ids at 0, all else at -inf."""
    ids = jnp.atleast_1d(jnp.asarray(ids, jnp.int32))
    return jnp.full_like(logits, -jnp.inf).at[:, ids].set(0.0, mode="drop")


def penalize_repetition(logits, history: History, penalty: float) -> jax.Array:
    """Makes the tokens of the history less likely (more, if the penalty is < 1)."""
    R, V = logits.shape
    ids = jnp.where(history.real, history.tokens, V)
    seen = jnp.zeros((R, V), bool).at[jnp.arange(R)[:, None], ids].set(True, mode="drop")
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def forbid_repeated_ngrams(logits, history: History, n: int, max_new: int) -> jax.Array:
    """Rules out the tokens that would end an n-gram which is in the history."""
    (R, V), S = logits.shape, history.tokens.shape[1]
    if n > S:
        return logits
    # Two n-grams of unreal places must not be taken for equal: these get an id of their own, which nothing follows.
    tokens = jnp.where(history.real, history.tokens, -1)
    end = S - max_new + history.step
    last = jax.lax.dynamic_slice_in_dim(tokens, end - (n - 1), n - 1, axis=1)
    count = S - n + 1
    repeats = tokens[:, n - 1 :] >= 0
    for i in range(n - 1):
        repeats &= (tokens[:, i : i + count] == last[:, i, None]) & (last[:, i, None] >= 0)
    repeats &= end >= n - 1  # else the slice above was moved
    ids = jnp.where(repeats, tokens[:, n - 1 :], V)
    banned = jnp.zeros((R, V), bool).at[jnp.arange(R)[:, None], ids].set(True, mode="drop")
    return jnp.where(banned, -jnp.inf, logits)


def top_k(logits, k: int) -> jax.Array:
    """Keeps the k highest logits, and those equal to the k-th."""
    return jnp.where(logits < _kth(logits, k), -jnp.inf, logits)


def top_p(logits, p: float, keep: int = 1) -> jax.Array:
    """Keeps the fewest of the most probable tokens whose probabilities reach p, at least `keep`."""
    order = jnp.argsort(logits, axis=-1)  # ascending
    mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
    removed = (mass <= 1 - p).at[:, -keep:].set(False)
    return _remove_sorted(logits, order, removed)


def min_p(logits, p: float) -> jax.Array:
    """Keeps the tokens whose probability is at least p times the highest."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probabilities < p * probabilities.max(axis=-1, keepdims=True), -jnp.inf, logits)


def typical(logits, mass: float, keep: int = 1) -> jax.Array:
    """Keeps the fewest tokens whose information is nearest to the entropy and whose probabilities reach `mass`."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    distance = jnp.abs(-logp - _entropy(logp))
    order = jnp.argsort(distance, axis=-1)
    distance = jnp.take_along_axis(distance, order, axis=-1)
    reached = jnp.cumsum(jnp.exp(jnp.take_along_axis(logp, order, axis=-1)), axis=-1)
    last = jnp.minimum((reached < mass).sum(axis=-1, keepdims=True), logits.shape[-1] - 1)
    removed = (distance > jnp.take_along_axis(distance, last, axis=-1)).at[:, :keep].set(False)
    return _remove_sorted(logits, order, removed)


def epsilon(logits, threshold: float | jax.Array, keep: int = 1) -> jax.Array:
    """Keeps the tokens of at least this probability, and the `keep` best ones."""
    removed = (jax.nn.softmax(logits, axis=-1) < threshold) & (logits < _kth(logits, keep))
    return jnp.where(removed, -jnp.inf, logits)


def eta(logits, threshold: float) -> jax.Array:
    """As `epsilon`, with min(threshold, sqrt(threshold) exp(-entropy))."""
    entropy = _entropy(jax.nn.log_softmax(logits, axis=-1))
    return epsilon(logits, jnp.minimum(threshold, threshold**0.5 * jnp.exp(-entropy)))


def _kth(logits, k):
    return jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]


def _entropy(logp):
    """float[R, 1]; ruled out tokens have no part in it."""
    return -jnp.where(jnp.isneginf(logp), 0.0, jnp.exp(logp) * logp).sum(axis=-1, keepdims=True)


def _remove_sorted(logits, order, removed):
    """-inf where `removed`, which is in the order of `order`."""
    removed = jnp.put_along_axis(jnp.zeros_like(removed), order, removed, axis=-1, inplace=False)
    return jnp.where(removed, -jnp.inf, logits)
