"""`config.mode=generate`: one request from files and text to an answer in the folder of the run."""

import json
import wave

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
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
