"""The evaluator of visual sentences, with answers that are known beforehand, and a probe of images."""

import importlib
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from tests import tiny
from vfm.data import pipeline
from vfm.errors import UserError
from vfm.evaluate.probe import Images
from vfm.experiment import Experiment

visual = importlib.import_module("vfm.evaluate.visual")  # its function has the same name
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "lvm.py"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def experiment(folder, arg="smoke", **changes):
    spec = importlib.util.spec_from_file_location("config_lvm", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(arg)
    c.eval.visual = {"pairs": (0, 2)}
    c.lock()
    small = {"model.backbone.width": 16, "model.encoders.text.width": 16, "model.backbone.depth": 2, "mesh.data": 1}
    c.update_from_flattened_dict({**small, **changes})
    found = Experiment(c, jax.devices()[:1])
    found.folder = folder
    return found


@pytest.mark.parametrize("wrong", [0, 3])
def test_right_tokens_and_whole_answers_are_counted(tmp_path, monkeypatch, wrong):
    """`wrong` tokens of every answer to a prompt with examples that tell nothing are wrong, all others right."""
    here, asked = experiment(tmp_path), []
    rows = {
        (n, shuffled): here.dataset("test", pairs=n, shuffled=shuffled, answer=False)
        for n, shuffled in ((0, False), (2, False), (2, True))
    }

    def answer(experiment, weights, batch, max_new):
        n, shuffled = list(rows)[len(asked)]
        found = [rows[n, shuffled].example(i, pipeline.rng(0, i)) for i in range(len(batch["tokens"]))]
        np.testing.assert_array_equal(batch["tokens"], [row["tokens"] for row in found])  # the prompts asked for
        asked.append((n, shuffled))
        answers = np.stack([row["answer"] for row in found])
        answers[:, : wrong * shuffled] = 0
        return answers

    monkeypatch.setattr(visual, "_continue", answer)
    monkeypatch.setattr(visual, "_cell", lambda image: ("image", image[..., :1]))
    if wrong:  # an answer that is no code cannot be drawn
        monkeypatch.setattr(visual, "SAMPLES", 0)
    result = visual.visual(here, {}, {}, "test", 8)
    assert asked == list(rows)
    right = 1 - wrong / 16
    assert result.metrics == {
        "visual_accuracy_0": 1, "visual_exact_0": 1, "visual_shuffled_accuracy_0": 1, "visual_shuffled_exact_0": 1,
        "visual_accuracy_2": 1, "visual_exact_2": 1,
        "visual_shuffled_accuracy_2": right, "visual_shuffled_exact_2": float(not wrong), "visual_examples": 8,
    }  # fmt: skip
    if not wrong:
        caption, shown = result.samples["sentences"]
        assert len(shown) == visual.SAMPLES and len(shown[0]) == 2 * 2 + 1 + 1 + 2
        np.testing.assert_array_equal(shown[0][-1][1], shown[0][-2][1])  # the answer is the truth


def test_the_model_answers_prompts_of_any_number_of_pairs(tmp_path):
    """End to end, with a model that knows nothing: codes alone, never special tokens."""
    here = experiment(tmp_path, **{"eval.test_limit": 8})
    weights = here.init_state().params
    prompts = here.dataset("test", pairs=1, answer=False)
    host, batch = next(here.eval_batches(prompts, 8))
    answers = visual._continue(here, {"params": weights}, batch, 16)
    assert answers.shape == host["answer"].shape == (8, 16)
    assert answers.min() >= len(here.tokenizer.special) and answers.max() < here.tokenizer.vocab_size
    whole = here.dataset("test", pairs=1)  # the rows with their answers, whose places are looked up
    rows = [whole.example(i, pipeline.rng(0, i)) for i in range(8)]
    inputs = {name: np.stack([row[name] for row in rows]) for name in ("tokens", "positions", "token_types")}
    used = int(host["input_mask"][0].sum())
    inputs["tokens"][:, used : used + 16] = answers  # greedy: each is the best code after those before it
    step = jax.jit(lambda inputs: here.model.apply({"params": weights}, **inputs, train=False)[0])
    logits = np.array(step(inputs))
    logits[..., : len(here.tokenizer.special)] = -np.inf
    np.testing.assert_array_equal(logits[:, used - 1 : used + 15].argmax(axis=-1), answers)


@pytest.mark.slow
def test_images_are_completed_and_probed(tmp_path):
    changes = {"eval.batch_size": 16, "model.backbone.depth": 1}
    here = experiment(tmp_path, "igpt", **changes)
    weights = here.init_state().params
    result = visual.visual(here, weights, {}, "test", 16)
    caption, shown = result.samples["completions"]
    assert not result.metrics and len(shown) == visual.SAMPLES
    for (_, completed), (_, truth) in shown:
        np.testing.assert_array_equal(completed[:4], truth[:4])
        assert (completed[4:] != truth[4:]).any()
    found = Images(here.dataset("train"), 30)
    assert len(found) == 30 and not found.example(0)["loss_mask"].any()
    for i in range(30):
        record = here.dataset("train").source[int(found.documents[i])]
        assert record["label"] == found.labels[i]
        np.testing.assert_array_equal(here.tokenizer.decode(found.example(i)["tokens"][1:]), record["image"])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"eval.visual.pairs": (0, 9)}, "eval.visual.pairs=.0, 9. must be from 0 to config.data.pairs=4"),
        ({"model.backbone.max_len": 180}, "max_len=180"),
    ],
    ids=["pairs", "room"],
)
def test_what_the_evaluator_cannot_do_is_refused_before_training(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        experiment(tmp_path, **changes)


def test_other_data_sets_are_refused():
    with pytest.raises(UserError, match="needs config.data.name='visual_sentences', not 'text'"):
        Experiment(tiny.config("text", **{"eval.evaluators": ("visual",)}), jax.devices()[:1])
