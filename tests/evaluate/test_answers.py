"""Answers of a small model: by teacher forcing, by greedy decoding, and read one by one."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vfm.data.construct import plain
from vfm.errors import UserError
from vfm.evaluate.answers import _edit_distances, _lengths, answers, final_of
from vfm.experiment import Experiment
from vfm.generate import generate


class Copies:
    """A few digits to be written again, so that even random weights are right now and then."""

    labels = None

    def __init__(self, split: str, size: int = 48):
        rng = np.random.default_rng(("train", "validation", "test").index(split))
        self.words = ["".join(map(str, rng.integers(2, size=n % 2 + 1))) for n in range(size)]

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        word = self.words[index]
        return {"prompt": f"{word}=", "answer": f"{word}>{word}", "final": word, "task": f"n{len(word)}"}


SYMBOLS = "01=>\n"


def config(**changes):
    c = tiny.get_config("text")
    c.tokenizer = {"name": "symbols", "symbols": SYMBOLS}
    c.model.backbone = {
        "name": "decoder_only", "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "max_len": 48, "remat": "none"
    }  # fmt: skip
    for block in (c.model.encoders.text, c.model.decoders.text):
        block.vocab_size = 3 + len(SYMBOLS) + 2  # two ids that the tokenizer has not
    c.data = {**plain(tiny.get_config("text").data), "name": "questions", "source": {"name": f"{__name__}.Copies"}}
    c.data.length = 12
    c.eval.update(evaluators=("answers",), batch_size=16, answers={"marker": ">"})
    c.lock()
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def experiment():
    return Experiment(config())


@pytest.fixture(scope="module")
def params(experiment):
    """Weights that answer some questions and not others: random ones, with logits that differ much."""
    import optax

    params = experiment.init_state().params
    batches = experiment.train_batches(0)
    tx = optax.adam(2e-2)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        loss = lambda p: experiment.loss_fn(p, {}, batch, jax.random.key(0), train=True)[0]["text"][1]
        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(12):
        params, state = step(params, state, next(batches))
    batches.close()
    return params


@pytest.fixture(scope="module")
def one_by_one(experiment, params):
    """What each test question is answered, by generation without this evaluator."""
    dataset, found = experiment.dataset("test"), []
    for prompt, _ in dataset.ids:
        # Padded on the left to one length, so that it compiles once.
        row = np.zeros((1, 4), np.int32)
        row[0, 4 - len(prompt) - 1 :] = [experiment.tokenizer.bos_id, *prompt]
        mask = np.arange(4)[None] >= 4 - len(prompt) - 1
        batch = {"tokens": jnp.asarray(row), "input_mask": jnp.asarray(mask)}
        ids = generate(
            experiment.model, {"params": params}, batch, max_new=6, eos_id=2, suppress=experiment.unused_ids
        )[0].tolist()
        found.append(ids[: ids.index(2)] if 2 in ids else ids)
    return found


def test_exact_match_is_that_of_greedy_generation(experiment, params, one_by_one):
    found = answers(experiment, params, {}, "test", None).metrics
    dataset, decode = experiment.dataset("test"), experiment.tokenizer.decode
    right = np.array([ids == answer for ids, (_, answer) in zip(one_by_one, dataset.ids, strict=True)])
    assert 0.05 < right.mean() < 0.95  # else this shows nothing
    assert found["answer_exact_match"] == pytest.approx(right.mean())
    for name in ("n1", "n2"):
        of_task = np.array([item["task"] == name for item in dataset.items])
        assert found[f"answer_exact_match_{name}"] == pytest.approx(right[of_task].mean())
    finals = [final_of(decode(ids), ">") == item["final"] for ids, item in zip(one_by_one, dataset.items, strict=True)]
    assert found["answer_final_match"] == pytest.approx(np.mean(finals))
    distances = [levenshtein(a, b) / max(len(a), len(b)) for a, (_, b) in zip(one_by_one, dataset.ids, strict=True)]
    assert found["answer_edit_distance"] == pytest.approx(np.mean(distances))
    assert 0 < found["answer_edit_distance"] < 1
    assert found["answer_questions"] == len(dataset)


def test_one_wrong_token_is_no_match(experiment, params, monkeypatch):
    def forced(model, unused, weights, batch):
        tokens = (np.asarray(batch["loss_mask"]) > 0).sum(axis=1)
        hits = tokens - np.array([0, 0, 1, 2])[np.arange(len(tokens)) % 4]
        return {"nll": np.ones(len(tokens)), "hits": hits, "tokens": tokens}

    monkeypatch.setattr(sys.modules["vfm.evaluate.answers"], "_teacher_forcing", forced)
    assert len(experiment.dataset("test")) % 4 == 0 == experiment.config.eval.batch_size % 4
    assert answers(experiment, params, {}, "test", None).metrics["answer_exact_match"] == 0.5


def levenshtein(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein(a[1:], b[1:]) + (a[0] != b[0]), levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1
    )  # fmt: skip


def test_log_likelihood_and_token_accuracy_are_the_objectives(experiment, params):
    found = answers(experiment, params, {}, "test", 20).metrics
    loss = experiment.evaluate_loss(params, {}, "test", 20)
    assert found["answer_log_likelihood"] == pytest.approx(-loss["loss"], rel=1e-5)
    assert found["answer_token_accuracy"] == pytest.approx(loss["token_accuracy"])
    assert found["answer_questions"] == 20


def test_other_prompts_and_an_objective_over_all_tokens(params):
    """Each has metrics of its own; the answers that are judged stay the answers."""
    prompts = {"few_shot": {"shots": 3, "length": 40}}
    other = Experiment(config(**{"eval.answers": {"prompts": prompts, "generate": False}}))
    other.config.unlock()
    other.config.data.loss = "all"
    found = answers(other, params, {}, "test", None)
    plain = answers(Experiment(config(**{"eval.answers": {"generate": False}})), params, {}, "test", None).metrics
    assert {name: value for name, value in found.metrics.items() if not name.startswith("few_shot_")} == plain
    assert found.metrics["few_shot_answer_log_likelihood"] != plain["answer_log_likelihood"]
    assert "answer_edit_distance" not in plain and found.samples == {}


def test_questions_of_another_split_as_a_prompt(params):
    asked = {"prompts": {"other": {"split": "validation"}}, "generate": False}
    found = answers(Experiment(config(**{"eval.answers": asked})), params, {}, "test", None).metrics
    theirs = answers(Experiment(config(**{"eval.answers": {"generate": False}})), params, {}, "validation", None)
    assert {f"other_{name}": value for name, value in theirs.metrics.items()}.items() <= found.items()
    assert found["other_answer_log_likelihood"] != found["answer_log_likelihood"]


def test_questions_of_another_source_as_a_prompt(params):
    source = {"name": f"{__name__}.Copies", "size": 20}
    asked = {"prompts": {"fewer": {"source": source}}, "generate": False}
    found = answers(Experiment(config(**{"eval.answers": asked})), params, {}, "test", None).metrics
    theirs = Experiment(config(**{"data.source": source, "eval.answers": {"generate": False}}))
    theirs = answers(theirs, params, {}, "test", None).metrics
    assert {f"fewer_{name}": value for name, value in theirs.items()}.items() <= found.items()
    assert found["fewer_answer_questions"] == 20 < found["answer_questions"]
    # The same by what is other in it alone.
    asked = {"prompts": {"fewer": {"source": {"size": 20}}}, "generate": False}
    assert answers(Experiment(config(**{"eval.answers": asked})), params, {}, "test", None).metrics == found


def test_final():
    assert final_of("1>2> 3 ", ">") == "3"
    assert final_of("12", ">") == final_of("12", "") == "12"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.name": "text"}, "config.data.name='questions'"),
        ({"eval.answers": {"prompts": {"a": {"shot": 1}}}}, "did you mean 'shots'"),
        ({"eval.answers": {"prompts": {"a": {"length": 99}}}}, "length=99 is longer than model.backbone.max_len=48"),
        ({"eval.answers": {"markers": ""}}, "did you mean 'marker'"),
    ],
    ids=["data", "field", "length", "option"],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message):
        Experiment(config(**changes))


def test_edit_distances_of_unequal_rows():
    tokens = np.array([[3, 4, 5, 2], [3, 2, 7, 7], [2, 9, 9, 9]])
    sizes = _lengths(tokens, 2)
    assert sizes.tolist() == [3, 1, 0]
    assert _edit_distances(tokens, sizes, [[3, 5], [3], [3, 4]]).tolist() == [1, 0, 2]
