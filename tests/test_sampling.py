import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vfm import sampling
from vfm.errors import UserError
from vfm.sampling import History, Sampling

FIXTURE = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "fixtures" / "functions" / "logits_processors"
V = 12


def history(tokens, max_new=4, step=0, real=None):
    """Rows of which the last max_new - step columns are still empty."""
    tokens = jnp.asarray(tokens, jnp.int32)
    return History(tokens, jnp.ones(tokens.shape, bool) if real is None else jnp.asarray(real), jnp.int32(step))


def logits(rows=1, seed=0, spread=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, V)) * spread, jnp.float32)


def kept(found):
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(found)]


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="the reference outputs are not here")
def test_filters_equal_those_of_transformers():
    arrays = np.load(FIXTURE / "io.npz")
    given, ids = jnp.asarray(arrays["in/logits"]), arrays["in/input_ids"]
    past = history(np.pad(ids, ((0, 0), (0, 4))), real=np.pad(np.ones_like(ids, bool), ((0, 0), (0, 4))))
    functions = {
        "TemperatureLogitsWarper": lambda temperature: given / temperature,
        "TopKLogitsWarper": lambda top_k: sampling.top_k(given, top_k),
        "TopPLogitsWarper": lambda top_p, min_tokens_to_keep=1: sampling.top_p(given, top_p, min_tokens_to_keep),
        "MinPLogitsWarper": lambda min_p: sampling.min_p(given, min_p),
        "TypicalLogitsWarper": lambda mass: sampling.typical(given, mass),
        "EpsilonLogitsWarper": lambda epsilon: sampling.epsilon(given, epsilon),
        "EtaLogitsWarper": lambda epsilon: sampling.eta(given, epsilon),
        "RepetitionPenaltyLogitsProcessor": lambda penalty: sampling.penalize_repetition(given, past, penalty),
        "NoRepeatNGramLogitsProcessor": lambda ngram_size: sampling.forbid_repeated_ngrams(given, past, ngram_size, 4),
    }
    changed = 0
    for name, (kind, options) in json.loads((FIXTURE / "meta.json").read_text())["params"]["processors"].items():
        found, expected = functions[kind](**options), arrays[f"out/{name}"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        changed += bool((expected != np.asarray(given)).any())
    assert changed >= 10


@pytest.mark.parametrize("seed", range(3))
def test_filters_keep_what_their_definitions_say(seed):
    x = logits(5, seed)
    p = np.asarray(jax.nn.softmax(x), np.float64)
    order = np.argsort(-p, axis=-1)
    assert kept(sampling.top_k(x, 3)) == [set(row[:3]) for row in order]
    assert kept(sampling.top_k(x, 99)) == [set(range(V))] * 5
    for share in (0.1, 0.5, 0.95):
        fewest = [1 + int((np.cumsum(row[best])[:-1] < share).sum()) for row, best in zip(p, order)]
        assert kept(sampling.top_p(x, share)) == [set(best[:n]) for best, n in zip(order, fewest)]
        assert kept(sampling.min_p(x, share)) == [set(np.flatnonzero(row >= share * row.max())) for row in p]
    assert kept(sampling.epsilon(x, 0.05)) == [
        set(np.flatnonzero((row >= 0.05) | (row == row.max()))) for row in p
    ]  # fmt: skip


def test_ties_at_the_last_place_of_top_k_stay():
    assert kept(sampling.top_k(jnp.asarray([[1.0, 3, 2, 2, 0]]), 2)) == [{1, 2, 3}]


def test_repetition_penalty_sees_real_tokens_only():
    x = jnp.asarray([[2.0, -2, 4, -4, 1, 1]])
    past = history([[5, 0, 1, 1, 9, 9]], max_new=2, real=[[False, True, True, True, False, False]])
    found = sampling.penalize_repetition(x, past, 2.0)
    np.testing.assert_array_equal(found, [[1, -4, 4, -4, 1, 1]])


def test_ngrams_are_not_repeated():
    def banned(tokens, n, step=0, real=None):
        past = history([tokens], max_new=3, step=step, real=None if real is None else [real])
        return set(range(V)) - kept(sampling.forbid_repeated_ngrams(jnp.zeros((1, V)), past, n, 3))[0]

    written = [True] * 6
    # Prompt 1 2 3 1 2, nothing or 3, then 3 1 generated.
    assert banned([1, 2, 3, 1, 2, 0, 0, 0], 3, real=[*written[:5], *[False] * 3]) == {3}
    assert banned([1, 2, 3, 1, 2, 0, 0, 0], 2, real=[*written[:5], *[False] * 3]) == {3}
    assert banned([1, 2, 3, 1, 2, 3, 1, 0], 2, step=2, real=[True] * 7 + [False]) == {2}
    assert banned([1, 2, 3, 1, 2, 0, 0, 0], 1, real=[*written[:5], *[False] * 3]) == {1, 2, 3}
    assert banned([1, 2, 3, 1, 2, 0, 0, 0], 4, real=[*written[:5], *[False] * 3]) == set()
    # Padding is no part of an n-gram, neither before nor between.
    assert banned([0, 0, 5, 0, 0, 0, 0, 0], 2, real=[False, False, True, *[False] * 5]) == set()
    assert banned([7, 2, 0, 7, 2, 0, 0, 0], 3, real=[True, True, False, True, True, *[False] * 3]) == set()
    assert banned([7, 0, 0, 0], 3, real=[True, False, False, False]) == set()  # too short to have one


def test_constraints_by_step():
    how = Sampling(min_new=2, forced_bos_id=3, forced_eos_id=5, suppress=(6,), begin_suppress=(7,))
    found = [
        kept(how.constrain(jnp.ones((1, V)), history(jnp.zeros((1, 8)), max_new=5, step=step), 5, (0, 1)))[0]
        for step in range(5)
    ]
    all_but = lambda *ids: set(range(V)) - set(ids)
    assert found == [{3}, all_but(0, 1, 6, 7), all_but(6), all_but(6), {5}]
    assert kept(Sampling(begin_suppress=(7,)).constrain(jnp.ones((1, V)), history(jnp.zeros((1, 8))), 4, ())) == [
        all_but(7)
    ]
    assert kept(sampling.forbid(jnp.ones((1, V)), (V, 2))) == [all_but(2)]


def test_draws_follow_the_filtered_distribution():
    """Chi-square; the filters apply one after the other, so top_p counts the mass that temperature and top_k left."""
    rows, x = 20_000, logits(1, seed=4)
    how = Sampling(temperature=1.5, top_k=8, top_p=0.9, min_p=0.05)
    keys = jax.random.split(jax.random.key(1), rows)
    draws = np.asarray(jax.jit(how.choose)(jnp.broadcast_to(x, (rows, V)), keys))
    p = np.asarray(jax.nn.softmax(x / 1.5), np.float64)[0]
    p[np.argsort(p)[:-8]] = 0
    p /= p.sum()
    best = np.argsort(-p)
    p[best[1 + int((np.cumsum(p[best])[:-1] < 0.9).sum()) :]] = 0
    p /= p.sum()
    p[p < 0.05 * p.max()] = 0
    support = np.flatnonzero(p)
    counts = np.bincount(draws, minlength=V)
    assert 3 <= len(support) < 8 and set(np.flatnonzero(counts)) == set(support)
    assert stats.chisquare(counts[support], rows * p[support] / p.sum()).pvalue > 1e-3


def test_fields_out_of_range_are_told():
    for fields, message in (
        ({"temperature": -1}, "temperature=-1 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"temperature": 1, "top_p": 0}, "top_p=0 must be a share, more than 0"),
        ({"temperature": 1, "top_k": 1.5}, "top_k=1.5 must be a whole number >= 0"),
        ({"temperature": 1, "min_p": 2}, "min_p=2 must be a share, from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be more than 0"),
        ({"top_k": 3}, "top_k=3 needs a temperature > 0"),
    ):
        with pytest.raises(UserError, match=message):
            Sampling(**fields)
