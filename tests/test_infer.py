"""`config.mode=generate`: one request from files and text to an answer in the folder of the run."""

import json
import wave

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vfm import infer
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.run import run

RUN = {"train.steps": 3, "train.batch_size": 8, "eval.batch_size": 8, "model.backbone.max_len": 24}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run, an image as PNG (twice the size, to be resized) and a tone as WAV."""
    with tiny.quick_compilation():
        folder = tmp_path_factory.mktemp("run")
        run(tiny.config(**RUN), str(folder), jax.devices()[:1])
        pixels = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
        Image.fromarray(pixels).save(folder / "four.png")
        with wave.open(str(folder / "tone.wav"), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(16000)
            sound.writeframes((3000 * np.sin(np.arange(512) / 5)).astype("<i2").tobytes())
        yield folder


def ask(folder, **generate):
    changes = {f"generate.{name}": value for name, value in generate.items()}
    run(tiny.config(**RUN, mode="generate", **changes), str(folder), jax.devices()[:1])
    assert (folder / "generated.html").read_text().startswith("<!doctype html>")
    return [json.loads(line) for line in (folder / "generated.jsonl").read_text().splitlines()]


def test_several_files_and_text_give_text(trained):
    files = f"image={trained}/four.png,audio={trained}/tone.wav"
    report = (trained / "report.html").read_text()
    greedy = ask(trained, task="audio+image+text->text", text="?", files=files, max_new=3, samples=2)
    assert len(greedy) == 2 and greedy[0] == greedy[1]
    sampled = ask(trained, task="audio+image+text->text", text="?", files=files, max_new=4, samples=3, temperature=3.0)
    assert len({record["answer"] for record in sampled}) > 1
    assert (trained / "report.html").read_text() == report  # the report of the training stays


def drawing(encoders, centre, decoder=None, **generate):
    """An experiment whose model has no backbone and one generative decoder, of images, and its random weights."""
    c = tiny.config(**RUN)
    with c.unlocked():
        c.model = {"centre": centre, "backbone": {}, "encoders": encoders}
        c.model.decoders = {"image": decoder or {"name": "tests.test_generative.Noisy", "item_shape": (4, 4, 1)}}
        c.data = {"name": "items", "length": 1, "source": {"name": "digits"}, "workers": 0, "skip_corrupt": False}
        c.objective, c.eval.evaluators = {"name": "generation"}, ()
        c.eval.generation = {"steps": 2} if decoder else {}
        c.generate.update(generate)
    experiment = Experiment(c, jax.devices()[:1])
    state = experiment.init_state()
    return experiment, {"params": state.params, "variables": state.variables}


LABEL = {"label": {"name": "label", "num_classes": 3, "width": 8}}


def test_a_class_gives_as_many_items_as_are_asked_for(tmp_path):
    experiment, weights = drawing(LABEL, "label", task="label->image", text="2", samples=2)
    infer.answer(experiment, weights, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    assert [record["answer"] for record in records] == ["generated_image_0.npy", "generated_image_1.npy"]
    first, second = (np.load(tmp_path / record["answer"]) for record in records)
    assert first.shape == (4, 4, 1) and np.abs(first - second).max() > 0.1
    assert (tmp_path / "generated.html").read_text().count("<img") == 2


def test_a_model_without_a_condition_draws_too(tmp_path):
    infer.answer(*drawing({}, "image", task="image->image"), tmp_path)
    assert np.load(tmp_path / "generated_image.npy").shape == (4, 4, 1)


@pytest.mark.parametrize(
    "generate, words",
    [
        ({"task": "label->image", "text": "3"}, "config.generate.text='3' must be the number of a class, 0 to 2"),
        ({"task": "label->image", "text": "two"}, "config.generate.text='two' must be the number of a class"),
        ({"task": "", "text": "two"}, "config.generate.task='' must be 'label->image' with this model"),
    ],
)
def test_what_a_model_without_a_backbone_cannot_answer(generate, words, tmp_path):
    with pytest.raises(UserError, match=words):
        infer.answer(*drawing(LABEL, "label", **generate), tmp_path)


def test_a_condition_that_is_no_class_comes_from_a_file(tmp_path):
    vector = {"source": {"name": "vector", "num_features": 4, "width": 8}}
    np.save(tmp_path / "v.npy", np.full(4, np.nan, np.float32))
    experiment, weights = drawing(vector, "source", task="source->image", files=f"source={tmp_path}/v.npy")
    with pytest.raises(UserError, match="holds numbers that are not finite"):
        infer.answer(experiment, weights, tmp_path)
    for content in (b"", b"no array"):
        (tmp_path / "v.npy").write_bytes(content)
        with pytest.raises(UserError, match="v.npy is not a .npy array"):
            infer.answer(experiment, weights, tmp_path)
    with open(tmp_path / "v.npy", "wb") as file:
        np.savez(file, a=np.ones(4))
    with pytest.raises(UserError, match="it is an archive of several arrays"):
        infer.answer(experiment, weights, tmp_path)
    np.save(tmp_path / "v.npy", np.ones(4, np.float32))
    infer.answer(experiment, weights, tmp_path)
    assert np.load(tmp_path / "generated_image.npy").shape == (4, 4, 1)
    text = {"text": {"name": "text_transformer", "vocab_size": 300, "length": 4, "width": 8}}
    text["text"]["backbone"] = {"name": "encoder_only", "depth": 1, "num_heads": 2, "mlp_dim": 8}
    with pytest.raises(UserError, match="config.generate.text='a' must be the number of a class; items of text"):
        infer.answer(*drawing(text, "text", task="text->image", text="a"), tmp_path)


@pytest.mark.slow
def test_a_control_is_given_as_a_file(tmp_path):
    network = {"name": "dit", "width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8, "control_depth": 1}
    decoder = {"name": "diffusion", "item_shape": (4, 4, 1), "network": network, "control": {"from": "mask"}}
    # Of the item itself: noise that random weights predict would take all values to an end of the range.
    decoder["process"] = {"name": "gaussian", "timesteps": 4, "prediction": "x0"}
    for name, value in (("zeros", 0.0), ("ones", 1.0)):
        np.save(tmp_path / f"{name}.npy", np.full((4, 4, 1), value, np.float32))
    found = {}
    for files in ("", f"mask={tmp_path}/zeros.npy", f"mask={tmp_path}/ones.npy"):
        task = "label+mask->image" if files else "label->image"
        experiment, weights = drawing(LABEL, "label", decoder, task=task, text="2", files=files)
        # At first the branch adds zero.
        params = jax.tree.map(
            lambda leaf: leaf + 0.3 * np.random.default_rng(0).normal(size=leaf.shape), weights["params"]
        )
        infer.answer(experiment, {**weights, "params": params}, tmp_path)
        found[files] = np.load(tmp_path / "generated_image.npy")
    plain, zeros, ones = found.values()
    assert min(np.abs(a - b).max() for a, b in ((plain, zeros), (plain, ones), (zeros, ones))) > 1e-3
    with pytest.raises(UserError, match="files: the task 'label.mask->image' needs mask=FILE"):
        infer.answer(*drawing(LABEL, "label", decoder, task="label+mask->image", text="2"), tmp_path)
    with pytest.raises(UserError, match="task='mask->image' must be 'label->image' or 'label.mask->image' with"):
        infer.answer(*drawing(LABEL, "label", decoder, task="mask->image", text="2"), tmp_path)


def test_a_file_gives_an_item_and_depends_on_it(trained):
    def image(audio):
        np.save(trained / "audio.npy", audio)
        (record,) = ask(trained, task="audio->image", files=f"audio={trained}/audio.npy")
        assert record["is"] == "decoded"
        return np.load(trained / record["answer"])

    time = np.arange(256)
    low, high = image(0.5 * np.sin(time / 8)), image(0.5 * np.sin(time / 2))
    assert low.shape == (8, 8, 1) and np.isfinite(low).all()
    assert np.abs(low - high).max() > 1e-4


def request(backbone=None, objective="next_token", corruption=None):
    """An untrained model of text alone: ask(folder, **fields of config.generate) -> records."""
    c = tiny.get_config("text")
    c.tokenizer.special = (*tiny.SPECIAL, "<mask>", "<extra_id_0>")
    c.model.backbone.update(dropout=0.0, max_len=24)
    if backbone:
        c.model.backbone = {"name": backbone, "width": tiny.WIDTH, "num_heads": 2, "mlp_dim": 16, "max_len": 24}
        c.objective, c.data.corruption = {"name": objective}, {"name": corruption}
    experiment = Experiment(c, jax.devices()[:1])
    state = experiment.init_state()
    defaults = c.generate.to_dict()

    def ask(folder, **fields):
        c.generate = {**defaults, "max_new": 6, **fields}
        infer.answer(experiment, {"params": state.params, "variables": state.variables}, folder)
        return [json.loads(line) for line in (folder / "generated.jsonl").read_text().splitlines()]

    return ask


@pytest.fixture(scope="module")
def text():
    with tiny.quick_compilation():
        yield request()


def test_an_answer_is_printed_as_it_comes_and_is_the_same(text, tmp_path, capsys):
    for fields in ({}, {"temperature": 3.0, "top_p": 0.9, "stop": ("a",)}):
        whole = text(tmp_path, text="ab", **fields)
        printed = capsys.readouterr().out
        assert text(tmp_path, text="ab", stream=True, **fields) == whole
        assert capsys.readouterr().out == printed and whole[0]["answer"] + "\n" in printed


def test_stop_strings_are_left_out(text, tmp_path):
    asked = {"text": "x", "temperature": 2.0, "max_new": 9, "samples": 8}
    free = [record["answer"] for record in text(tmp_path, **asked)]
    stop = next(answer[2:4] for answer in free if len(answer) > 5 and "\ufffd" not in answer[:5])
    found = [record["answer"] for record in text(tmp_path, **asked, stop=(stop, "never"))]
    assert found == [answer.split(stop)[0] for answer in free] != free


def test_beam_search_gives_answers_with_scores(text, tmp_path):
    records = text(tmp_path, text="ab", beams=4, samples=3, early_stopping="true")
    assert [record["score"] for record in records] == sorted((r["score"] for r in records), reverse=True)
    assert len({record["answer"] for record in records}) == 3


def test_an_encoder_fills_the_masks_of_a_text(tmp_path):
    with tiny.quick_compilation():
        ask = request("encoder_only", "masked", "masked")
        (record,) = ask(tmp_path, text="ab<mask><mask>cd")
        answer = record["answer"]
        assert answer.startswith("ab") and answer.endswith("cd") and len(answer) > 4
        with pytest.raises(UserError, match="has no <mask> to be filled"):
            ask(tmp_path, text="abcd")


@pytest.mark.slow
def test_an_encoder_decoder_answers(tmp_path):
    with tiny.quick_compilation():
        ask = request("encoder_decoder", "denoising", "span_corruption")
        (one,), (other,) = ask(tmp_path, text="ab<extra_id_0>"), ask(tmp_path, text="xyz")
        assert one["answer"] != other["answer"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"top_p": 0.0, "temperature": 1.0}, "config.generate.top_p=0.0 must be a share"),
        ({"top_k": 5}, "config.generate.top_k=5 needs a temperature > 0"),
        ({"beams": 2, "temperature": 1.0}, "config.generate.beams=2 searches for the best answer"),
        ({"beams": 2, "samples": 3}, "config.generate.samples=3 is more than config.generate.beams=2"),
        ({"stream": True, "samples": 2}, "config.generate.stream prints one answer"),
        ({"stop": ("a", "")}, "config.generate.stop=.* must hold strings that are not empty"),
        ({"early_stopping": "flase"}, "'flase' in config.generate.early_stopping; did you mean 'false'"),
        ({"length_penalty": float("nan")}, "config.generate.length_penalty=nan must be a finite number"),
        ({"steps": 0}, "config.generate.steps=0 must be 1 or more"),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_told(text, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        text(tmp_path, text="ab", **fields)
