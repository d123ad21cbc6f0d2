"""Bits per byte of continuations: against one forward pass for every token, without padding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.evaluate import families
from vfm.data.passages import Passages
from vfm.errors import UserError
from vfm.evaluate.continuation import check_continuation, continuation


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def next_token(model, variables, known, written):
    return model.apply(variables, jnp.concatenate([known, written], axis=1), train=False)[0]


def prefix_lm(model, variables, known, written):
    tokens = jnp.concatenate([known, written], axis=1)
    return model.apply(variables, tokens, prefix=jnp.arange(tokens.shape[1])[None] < known.shape[1], train=False)[0]


def masked(model, variables, known, written):
    mask = jnp.asarray([[families.SPECIAL.index("<mask>")]])
    return model.apply(variables, jnp.concatenate([known, written, mask], axis=1), train=False)[0]


def span_corruption(model, variables, known, written):
    pad, eos, sentinel = (families.SPECIAL.index(name) for name in ("<pad>", "<eos>", "<extra_id_0>"))
    tokens = jnp.concatenate([known, jnp.asarray([[sentinel, eos]])], axis=1)
    decoder = jnp.concatenate([jnp.asarray([[pad, sentinel]]), written], axis=1)
    return model.apply(variables, tokens, decoder_tokens=decoder, train=False)[0]


def text_infilling(model, variables, known, written):
    bos, eos, mask = (jnp.asarray([[families.SPECIAL.index(name)]]) for name in ("<bos>", "<eos>", "<mask>"))
    tokens = jnp.concatenate([bos, known, mask, eos], axis=1)
    decoder = jnp.concatenate([eos, bos, known, written], axis=1)
    return model.apply(variables, tokens, decoder_tokens=decoder, train=False)[0]


WAYS = [next_token, prefix_lm, masked, span_corruption, text_infilling]


@pytest.mark.parametrize("ask", WAYS, ids=lambda ask: ask.__name__)
def test_every_family_against_one_pass_per_token(ask, tmp_path):
    experiment = families.experiment(tmp_path, ask.__name__)
    variables = {"params": experiment.init_state().params}
    found = continuation(experiment, variables["params"], {}, "test", None).metrics
    passages = Passages(experiment.config.data.source, split="test", tokenizer=experiment.tokenizer, length=8, most=12)
    assert {len(ids) for ids in passages.ids} == {6, 7, 8}  # padding in some rows
    logits = jax.jit(functools.partial(ask, experiment.model))
    bits, hits, first, count = 0.0, 0, len(families.SPECIAL), 0
    for ids in passages.ids:
        known = len(ids) - len(ids) // 4
        for at in range(known, len(ids)):
            row = logits(variables, jnp.asarray(ids[None, :known]), jnp.asarray(ids[None, known:at]))[0, -1]
            log_p = jax.nn.log_softmax(row[first : first + 256])
            bits -= float(log_p[ids[at] - first]) / math.log(2)
            hits += int(np.argmax(log_p) == ids[at] - first)
            count += 1
    assert found["continuation_bits_per_byte"] == pytest.approx(bits / count, rel=1e-5)  # a token is a byte
    assert found["continuation_accuracy"] == pytest.approx(hits / count)
    assert found["continuation_examples"] == len(passages)


def test_a_pass_for_every_token_costs_more(tmp_path):
    cost = {}
    for name in ("next_token", "masked"):
        experiment = families.experiment(tmp_path, name, **{"eval.continuation.examples": 4})
        state = experiment.init_state()
        found = continuation(experiment, state.params, {}, "test", 2).metrics
        assert found["continuation_examples"] == 2
        cost[name] = found["continuation_flops_per_byte"]
    assert 2 < cost["masked"] / cost["next_token"] < 2.4  # 2 tokens are ahead; and one position more is read


@pytest.mark.parametrize(
    "corruption, field, value, words",
    [
        ("next_token", "eval.continuation.share", 1.0, "share=1.0 must be above 0 and below 1"),
        ("next_token", "eval.continuation.length", 1, "length=1 must be at least 2"),
        ("span_corruption", "eval.continuation.length", 40, "longer than model.backbone.max_len=40"),
        ("next_token", "eval.continuation.size", 4, "unknown field 'size' in config.eval.continuation"),
        ("next_token", "data.corruption.name", "blank_infilling", "unknown corruption 'blank_infilling'"),
    ],
)
def test_what_is_refused(tmp_path, corruption, field, value, words):
    experiment = families.experiment(tmp_path, corruption)
    with experiment.config.unlocked():
        experiment.config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words):
        check_continuation(experiment)
