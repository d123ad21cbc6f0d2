import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recency import Recency
from vfm.beam import beam_search, gather_beams
from vfm.errors import UserError
from vfm.generate import Reader, generate

V, NEW = 5, 4


@pytest.fixture(scope="module")
def small():
    """A model with few tokens, prompts of unequal length, and the log-probabilities of all answers to them."""
    model = Recency(V)
    variables = model.variables(sharpness=1.0)
    tokens = jnp.asarray([[1, 2, 3], [4, 0, 0], [0, 3, 1]], jnp.int32)
    mask = jnp.asarray([[True, True, True], [True, False, False], [False, True, True]])
    answers = np.array(list(itertools.product(range(V), repeat=NEW)), np.int32)
    forward = jax.jit(
        lambda tokens: jax.nn.log_softmax(model.apply(variables, tokens, input_mask=tokens >= 0, train=False)[0])
    )
    table = []
    for row, real in zip(tokens, mask):
        prompt = np.asarray(row)[np.asarray(real)]
        full = np.concatenate([np.tile(prompt, (len(answers), 1)), answers], axis=1)
        logp = np.asarray(forward(full), np.float64)[:, len(prompt) - 1 : -1]
        table.append(np.take_along_axis(logp, answers[:, :, None], axis=2)[:, :, 0])
    return model, variables, {"tokens": tokens, "input_mask": mask}, answers, table


def best(answers, logp, ends, length_penalty, count):
    """The best answers among all: those that `ends` cuts off early, and those that run to the end."""
    found = {}
    for answer, each in zip(answers, logp):
        n = next((i for i in range(1, NEW + 1) if ends(tuple(answer[:i]))), NEW)
        found[tuple(answer[:n])] = each[:n].sum() / n**length_penalty
    ranked = sorted(found.items(), key=lambda item: -item[1])[:count]
    return [tokens for tokens, _ in ranked], [score for _, score in ranked]


@pytest.mark.parametrize(
    "eos_id, stop, length_penalty",
    [((), (), 1.0), (2, (), 0.0), ((2, 0), (), 1.0), ((2, 0), (), -0.5), ((), [(3, 1), (4,)], 2.0)],
    ids=["none", "one", "two", "short", "stop"],
)
def test_with_beams_for_all_prefixes_it_finds_the_best_of_all_answers(small, eos_id, stop, length_penalty):
    model, variables, batch, answers, table = small
    tokens, scores = beam_search(model, variables, batch, max_new=NEW, eos_id=eos_id, stop=stop, pad_id=V - 1,
                                 beams=V ** (NEW - 1), num_return=20, length_penalty=length_penalty,
                                 early_stopping="never")  # fmt: skip
    eos = np.atleast_1d(eos_id) if eos_id != () else ()
    ends = lambda prefix: prefix[-1] in eos or any(prefix[-len(s) :] == s for s in stop)
    lengths = set()
    for found, score, logp in zip(np.asarray(tokens), np.asarray(scores), table):
        expected, expected_scores = best(answers, logp, ends, length_penalty, 20)
        np.testing.assert_allclose(score, expected_scores, rtol=1e-4, atol=1e-4)
        assert [tuple(row) for row in found] == [(*row, *[V - 1] * (NEW - len(row))) for row in expected]
        lengths |= {len(row) for row in expected}
    assert len(lengths) > 1 or eos_id == stop == ()


def plain_search(logp, beams, eos, length_penalty, early_stopping):
    """(tokens, score) of one prompt's answers, as `beam_search` describes them, with lists."""
    next_logp = lambda prefix: [
        logp[int("".join(map(str, (*prefix, t))).ljust(NEW, "0"), V), len(prefix)] for t in range(V)
    ]
    running, pool, score = [((), 0.0)], [], lambda item: -item[1]
    for step in range(1, NEW + 1):
        found = [((*seq, t), total + each) for seq, total in running for t, each in enumerate(next_logp(seq))]
        found = sorted(found, key=score)
        ended = lambda item, step=step: item[0][-1] in eos or step == NEW
        new = [(seq, total / step**length_penalty) for seq, total in filter(ended, found[:beams])]
        pool = sorted(pool + new, key=score)[:beams]
        running = [item for item in found if not ended(item)][:beams]
        if not running or (len(pool) == beams and early_stopping is True):
            break
        length = NEW if early_stopping == "never" and length_penalty > 0 else step
        if len(pool) == beams and running[0][1] / length**length_penalty <= pool[-1][1]:
            break
    return pool


@pytest.mark.parametrize(
    "beams, eos, length_penalty, early_stopping",
    [(2, (0, 2, 3), 1.0, False), (3, (4,), 2.0, "never"), (3, (1, 2), 0.5, True), (2, (0, 4), -1.0, False)],
)
def test_few_beams_find_what_a_plain_search_finds(small, beams, eos, length_penalty, early_stopping):
    model, variables, batch, _, table = small
    tokens, scores = beam_search(model, variables, batch, max_new=NEW, eos_id=eos, beams=beams, num_return=beams,
                                 length_penalty=length_penalty, early_stopping=early_stopping)  # fmt: skip
    for found, score, logp in zip(np.asarray(tokens), np.asarray(scores), table):
        expected = plain_search(logp, beams, eos, length_penalty, early_stopping)
        assert [tuple(row) for row in found] == [(*seq, *[eos[0]] * (NEW - len(seq))) for seq, _ in expected]
        np.testing.assert_allclose(score, [each for _, each in expected], rtol=1e-4)


def test_one_beam_is_greedy(small):
    model, variables, batch, *_ = small
    arguments = dict(max_new=9, eos_id=2, pad_id=1, no_repeat_ngram_size=3, min_new=2)
    tokens, _ = beam_search(model, variables, batch, beams=1, **arguments)
    np.testing.assert_array_equal(tokens[:, 0], generate(model, variables, batch, **arguments))


def test_a_prompt_does_not_notice_the_others(small):
    model, variables, batch, *_ = small
    for early_stopping in (True, "never"):
        arguments = dict(max_new=8, eos_id=(2, 0), beams=3, num_return=3, early_stopping=early_stopping)
        tokens, scores = beam_search(model, variables, batch, **arguments)
        for b in range(3):
            alone = {name: x[b : b + 1] for name, x in batch.items()}
            one, score = beam_search(model, variables, alone, **arguments)
            np.testing.assert_array_equal(one[0], tokens[b])
            np.testing.assert_allclose(score[0], scores[b], rtol=1e-5)


def test_answers_that_were_not_found_have_no_score(small):
    model, variables, batch, *_ = small
    tokens, scores = beam_search(model, variables, batch, max_new=1, eos_id=(), beams=7, num_return=7)
    assert np.isfinite(scores[:, :V]).all() and np.isneginf(scores[:, V:]).all()
    assert all(len(set(row)) == V for row in np.asarray(tokens[:, :V, 0]))


def test_beams_take_the_cache_of_their_parents():
    L, R, S = 2, 4, 3
    cache = {
        "key": jnp.arange(L * R * S * 2.0).reshape(L, R, S, 1, 2),
        "valid": jnp.arange(R * S).reshape(R, S) % 5 > 0,
        "index": jnp.ones((L,), jnp.int32),
        "cross_key": jnp.ones((L, R, 2, 1, 2)),
    }
    rows = jnp.asarray([1, 1, 3, 2])
    found = gather_beams(Reader(cache, {"positions": jnp.ones((R, 1))}), rows).cache
    np.testing.assert_array_equal(found["key"], cache["key"][:, rows])
    np.testing.assert_array_equal(found["valid"], cache["valid"][rows])
    np.testing.assert_array_equal(found["index"], cache["index"])


def test_bad_requests_are_told(small):
    model, variables, batch, *_ = small
    for fields, message in (
        ({"beams": 0}, "beams=0 must be a whole number >= 1"),
        ({"beams": 2, "num_return": 3}, "num_return=3 is more than beams=2"),
        ({"beams": 2, "early_stopping": "always"}, "early_stopping='always' must be true, false or \"never\""),
        ({"beams": 2, "temperature": 0.5}, "temperature=0.5 does not go with beams=2"),
        ({"beams": 2, "lenght_penalty": 0.5}, "'lenght_penalty' in generate"),
    ):
        with pytest.raises(UserError, match=message):
            beam_search(model, variables, batch, max_new=2, eos_id=0, **fields)
