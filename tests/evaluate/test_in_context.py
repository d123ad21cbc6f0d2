"""Scores of in-context learning: on losses and attention that are made by hand, and of a whole model against them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import in_context as config
from tests import tiny
from vfm.errors import UserError
from vfm.evaluate.in_context import by_position, check_in_context, in_context, prefix_matching, previous_token
from vfm.experiment import Experiment


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


TOKENS = np.array([[1, 5, 7, 6, 5, 7, 6]])  # <bos>, a block of three, and the block again
REAL = np.ones((1, 7), bool)


def heads(*looks):
    """Weights [1, 1, N, 7, 7] of heads that look from place t to place look(t)."""
    weights = np.zeros((1, 1, len(looks), 7, 7), np.float32)
    for n, look in enumerate(looks):
        for t in range(7):
            weights[0, 0, n, t, look(t)] = 1
    return weights


def mean(scores):
    return np.asarray(scores[0] / scores[1])[0]


def test_an_induction_head_has_a_prefix_matching_score_of_one():
    """From a token of the second block to the one behind its first occurrence, three back and one ahead."""
    asked = np.array([[False] * 4 + [True] * 3])
    weights = heads(lambda t: max(t - 2, 0), lambda t: max(t - 3, 0), lambda t: max(t - 1, 0), lambda t: 0)
    # What the last token of the first block has behind it is the first one of the second.
    np.testing.assert_allclose(mean(prefix_matching(weights, TOKENS, asked)), [1, 0, 0, 0])
    uniform = np.tril(np.ones((7, 7), np.float32)) / np.arange(1, 8, dtype=np.float32)[:, None]
    scores = prefix_matching(uniform[None, None, None], TOKENS, asked)
    np.testing.assert_allclose(mean(scores), np.mean([1 / 5, 1 / 6, 1 / 7]), rtol=1e-6)
    assert scores[1] == 3


def test_only_positions_that_are_asked_and_have_an_earlier_occurrence_count():
    asked = np.array([[True] * 5 + [False] * 2])
    total, count = prefix_matching(heads(lambda t: max(t - 2, 0)), TOKENS, asked)
    assert (total, count) == (1, 1)
    none, count = prefix_matching(heads(lambda t: t), np.arange(7)[None], REAL)
    assert (none, count) == (0, 0)


def test_a_token_is_no_earlier_occurrence_of_itself():
    """5 5: the second has the first before it, and itself behind that; the first has nothing."""
    total, count = prefix_matching(heads(lambda t: t), np.array([[5, 5, 1, 2, 3, 4, 6]]), REAL)
    assert (total, count) == (1, 1)


def test_all_earlier_occurrences_count_together():
    weights = np.zeros((1, 1, 1, 7, 7), np.float32)
    weights[0, 0, 0, 6, [2, 4]] = 0.25, 0.5
    total, count = prefix_matching(weights, np.array([[1, 5, 7, 5, 8, 2, 5]]), np.array([[False] * 6 + [True]]))
    assert (total, count) == (0.75, 1)


def test_a_previous_token_head_has_a_score_of_one():
    weights = heads(lambda t: max(t - 1, 0), lambda t: t, lambda t: max(t - 2, 0))
    np.testing.assert_allclose(mean(previous_token(weights, REAL)), [1, 0, 1 / 6])  # place 1 looks at place 0
    assert previous_token(weights, np.array([[True] * 4 + [False] * 3]))[1] == 3


CHOSEN = {"early": (0.25, 0.5), "late": (0.75, 1.0), "parts": 4, "beside": ""}


def test_scores_by_position_against_numbers_by_hand():
    loss = np.array([[4, 3, 2, 1, 4, 3, 1.0, 0.5], [4, 3, 2, 2, 4, 3, 2.0, 1.5]])
    hit = np.array([[0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1]], bool)
    shots = np.array([[-1, -1, 0, -1, -1, 1, -1, 2], [-1, -1, 0, -1, -1, 1, 1, 2]])
    found = by_position(loss, hit, shots, np.ones_like(hit), CHOSEN)
    assert found["early_loss"] == (2 + 1 + 2 + 2) / 4
    assert found["icl_score"] == (1 + 0.5 + 2 + 1.5) / 4 - found["early_loss"]
    assert found["late_loss"] == pytest.approx((0.5 + 2 + 1.5) / 3)
    assert found["late_accuracy"] == 1 and found["late_exact_match"] == 1  # what is missed cannot be told
    assert [found[f"loss_{k}_shots"] for k in range(3)] == pytest.approx([2, 8 / 3, 1])
    assert [found[f"accuracy_{k}_shots"] for k in range(3)] == pytest.approx([0.5, 1 / 3, 1])
    assert [found[f"loss_from_{i}"] for i in (0, 2, 4, 6)] == [3.5, 1.75, 3.5, 1.25]
    assert by_position(loss, hit & (shots < 2), shots, np.ones_like(hit), CHOSEN)["late_exact_match"] == 0


def test_what_is_not_trained_on_is_left_out():
    loss, asked = np.arange(16.0).reshape(2, 8), np.array([[False] * 4 + [True] * 4] * 2)
    found = by_position(loss, asked, np.where(asked, 3, -1), asked, CHOSEN)
    assert found["late_loss"] == 10.5 and "early_loss" not in found and "icl_score" not in found
    assert {name for name in found if name.startswith("loss_")} == {"loss_3_shots", "loss_from_4", "loss_from_6"}


def small(arg="", **changes):
    c = config.get_config(arg)
    c.model.backbone.update(width=16, depth=2)
    c.model.encoders.text.width = 16
    c.eval.update(limit=5, batch_size=4)
    c.update_from_flattened_dict(changes)
    return Experiment(c, jax.devices()[:1])


def test_the_scores_of_a_model_are_those_of_its_logits_and_weights():
    """Rows are asked one by one here: padding of the last batch, sums over batches, and which weights are read."""
    experiment = small("functions", **{"eval.in_context.beside": "validation", "data.length": 34})
    params = experiment.init_state().params
    found = in_context(experiment, params, {}, "test", 5).metrics
    dataset, losses, looks = experiment.dataset("test"), [], [[], []]

    @jax.jit
    def apply(tokens):
        out, kept = experiment.model.apply({"params": params}, tokens, train=False, mutable=["intermediates"])
        return jax.nn.log_softmax(out[0]), kept["intermediates"]["backbone"]["transformer"]["layers"]["attention"]

    for i in range(5):
        row = dataset.asked(i)
        log_p, kept = apply(row["tokens"][None])
        losses.append([-float(log_p[0, t, row["targets"][t]]) for t in range(32)])
        weights = np.asarray(kept["weights"][0])[:, 0]  # [L, N, T, T]
        for t in np.flatnonzero(row["shots"] >= 0):
            behind = [s + 1 for s in range(t) if row["tokens"][s] == row["tokens"][t]]
            if behind:
                looks[0].append(weights[:, :, t, behind].sum(axis=-1))
        looks[1] += [weights[:, :, t, t - 1] for t in range(1, 32)]
    losses = np.array(losses)
    assert found["late_loss"] == pytest.approx(losses[:, 25::2].mean(), rel=1e-5)
    assert found["loss_3_shots"] == pytest.approx(losses[:, 7].mean(), rel=1e-5)
    assert found["icl_score"] == pytest.approx(losses[:, 25::2].mean() - losses[:, 9:16:2].mean(), rel=1e-4)
    for name, seen in zip(("induction_score", "previous_token_score"), looks, strict=True):
        of_heads = np.mean(seen, axis=0)
        assert found[name] == pytest.approx(of_heads.max(), rel=1e-4)
        assert [found[f"{name}_layer_{i}"] for i in range(2)] == pytest.approx(of_heads.max(axis=1), rel=1e-4)
    beside = in_context(experiment, params, {}, "validation", 5).metrics
    assert found["validation_late_loss"] == beside["late_loss"] != found["late_loss"]
    assert not any(name.startswith("validation") for name in beside)


def test_attention_weights_are_not_computed_where_nobody_asks():
    experiment = small()
    batch = {"tokens": jnp.zeros((1, 96), jnp.int32)}
    params = jax.eval_shape(experiment.init_state).params
    text = str(jax.make_jaxpr(lambda params: experiment.model.apply({"params": params}, **batch, train=False))(params))
    asked = lambda params: experiment.model.apply({"params": params}, **batch, train=False, mutable=["intermediates"])
    assert "[1,2,96,96]" not in text.replace("f32", "") and "[1,2,96,96]" in str(jax.make_jaxpr(asked)(params))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"eval.in_context": {"late": (0.75, 1.5)}}, r"late=\(0.75, 1.5\) must be two shares of the sequence"),
        ({"eval.in_context": {"early": (0.5, 0.25)}}, "early=.* must be two shares of the sequence"),
        ({"eval.in_context": {"parts": 0}}, "parts=0 must be a whole number >= 1"),
        ({"eval.in_context": {"beside": "valid"}}, "unknown split 'valid' in config.eval.in_context.beside"),
        ({"eval.in_context": {"part": 3}}, "unknown field 'part' in config.eval.in_context; did you mean 'parts'"),
        ({"data": {"name": "text"}}, "needs config.data.name='in_context'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_scored_is_refused(changes, words):
    c = config.get_config()
    experiment = type("Stub", (), {"config": c, "model": type("Model", (), {"decoders": {"text": None}})})
    check_in_context(experiment)
    for name, value in changes.items():
        section, _, last = name.rpartition(".")
        (c[section] if section else c)[last] = value
    with pytest.raises(UserError, match=words):
        check_in_context(experiment)
