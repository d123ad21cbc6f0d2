import base64
import io
import json
import re
import wave
from html.parser import HTMLParser

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from vfm.errors import UserError
from vfm.report import Report, curves, write_json

TONE = np.sin(2 * np.pi * 1000 * np.arange(4000) / 8000)


class Page(HTMLParser):
    """Balanced tags, text and attributes of a page."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def decode_png(data):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255


def plot():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 2))
    figure.add_subplot().plot([0, 1], [0, 1])
    return figure


def test_page_is_self_contained_escaped_and_complete(tmp_path):
    report = Report("a <run> & more")
    report.section("<h2>")
    report.text("first\n\nsecond <script>alert(1)</script>")
    report.table(["name", "n"], [["<b>x</b>", np.float32(0.123456)], ["y", 12345], ["z", True]], "a & b")
    report.figure("plot-1", plot(), 'say "hi"')
    image = np.linspace(0, 1, 64).reshape(8, 8)
    rows = [
        [("text", "<i>$5 & $6</i>"), ("image", image), ("audio", TONE, 8000)],
        [("text", ""), ("image", np.stack([image, image, 2 * image], -1)), ("audio", 3 * TONE, 8000)],
    ]
    report.samples("outputs", rows, "samples", header=["prompt", "image", "audio"])
    path = report.write(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["figures", "report.html"]
    assert sorted(p.name for p in (path.parent / "figures").iterdir()) == ["outputs.png", "plot-1.png"]

    page = Page(path.read_text())
    text = "".join(page.words)
    for expected in ("a <run> & more", "<script>", "<b>x</b>", "<i>$5 & $6</i>", "0.1235", "12,345", "True"):
        assert expected in text, expected
    assert "script" not in page.tags and "b" not in page.tags and "link" not in page.tags
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 1 + 2 * 3  # the figure; an image, a spectrogram and a sound per row
    assert all(value.startswith(("data:image/png;base64,", "data:audio/wav;base64,")) for value in sources)
    assert not re.search(r"url\(|@import", path.read_text())

    # The figure in the page is the file; the images and the sounds are what went in.
    payloads = [base64.b64decode(value.split(",")[1]) for value in sources]
    assert payloads[0] == (path.parent / "figures" / "plot-1.png").read_bytes()
    np.testing.assert_allclose(decode_png(payloads[1])[..., 0], image, atol=1 / 255)
    np.testing.assert_allclose(decode_png(payloads[4])[..., 2], np.minimum(2 * image, 1), atol=1 / 255)
    for payload in (payloads[3], payloads[6]):
        with wave.open(io.BytesIO(payload)) as sound:
            assert (sound.getframerate(), sound.getnchannels(), sound.getnframes()) == (8000, 1, 4000)
            samples = np.frombuffer(sound.readframes(4000), "<i2") / 32767
        np.testing.assert_allclose(samples, TONE, atol=1e-4)


def test_spectrogram_shows_the_tone_where_it_is(tmp_path):
    report = Report("tone")
    report.samples("tone", [[("audio", TONE, 8000)]])
    source = re.search(r"data:image/png;base64,([^\"]+)", report.write(tmp_path).read_text())[1]
    brightness = decode_png(base64.b64decode(source)).sum(-1).mean(1)
    # Rows from 4000 Hz (top) to 0 Hz: 1000 Hz lies three quarters down.
    assert np.argmax(brightness) == pytest.approx(0.75 * (len(brightness) - 1), abs=1)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (("image", np.zeros(3)), "must be"),
        (("image", np.zeros((4, 4, 2))), "must be"),
        (("image", np.full((4, 4), np.nan)), "not finite"),
        (("audio", np.zeros((4, 2)), 8000), "audio must be"),
        (("video", np.zeros(3)), "unknown kind of cell 'video'"),
    ],
)
def test_bad_samples_are_named(cell, message):
    with pytest.raises(ValueError, match=f"'outputs'.*{message}"):
        Report("x").samples("outputs", [[cell]])


def test_names_and_ragged_tables_are_refused():
    report = Report("x")
    with pytest.raises(ValueError, match="names a file"):
        report.figure("../x", plot())
    report.figure("x", plot())
    with pytest.raises(ValueError, match="already"):
        report.figure("x", plot())
    with pytest.raises(ValueError, match="a row of 1 cells under 2"):
        report.table(["a", "b"], [[1]])


def test_short_sounds_and_no_samples(tmp_path):
    report = Report("x")
    report.samples("none", [])
    report.samples("short", [[("audio", np.zeros(0), 8000)], [("audio", np.ones(3), 8000)]])
    report.write(tmp_path)


def test_unwritable_workdir_is_named_and_the_old_report_stays(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/run/figures: Not a directory"):
        Report("x").write(tmp_path / "file" / "run")
    path = Report("old").write(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="report.html: No space left on device"):
        Report("new").write(tmp_path)
    assert "<title>old</title>" in path.read_text()
    assert not list(tmp_path.glob("*.tmp"))


def test_curves_draw_every_loss_and_split(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train = {"split": "train", "text_loss": 1.0, "accuracy": 0.5}
    lines = [{"step": step, "loss": 9.0 / step, **train} for step in (1, 2, 3)]
    lines += [{"step": 2, "split": "validation", "loss": 5.0}, {"step": 4, "split": "train", "loss": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "los')
    axes = curves(path).axes
    assert [a.get_title() for a in axes] == ["loss", "text_loss"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes[0].lines}
    assert drawn == {"train": [[1, 9], [2, 4.5], [3, 3]], "validation": [[2, 5]]}
    path.write_text('{"step": 1, "split": "train", "accuracy": 1.0}\n')
    with pytest.raises(UserError, match="holds no loss"):
        curves(path)
    with pytest.raises(UserError, match="cannot read .*nothing.jsonl"):
        curves(tmp_path / "nothing.jsonl")


def test_write_json(tmp_path):
    path = tmp_path / "config.json"
    config = ml_collections.ConfigDict({"a": {"b": (1, 2.5)}, "none": None, "name": "é", "flag": True})
    write_json(path, {"config": config, "x": np.float32(0.5), "y": jnp.arange(2), "n": np.int64(3)})
    assert json.loads(path.read_text()) == {
        "config": {"a": {"b": [1, 2.5]}, "none": None, "name": "é", "flag": True},
        "x": 0.5,
        "y": [0, 1],
        "n": 3,
    }
    before = path.read_text()
    with pytest.raises(UserError, match=r"config.json: results.losses\[1\] is nan"):
        write_json(path, {"results": {"losses": [1.0, float("nan")]}})
    with pytest.raises(UserError, match="config.json: x is inf"):
        write_json(path, {"x": jnp.float32(jnp.inf)})
    with pytest.raises(TypeError, match="config.json: a.f is a function"):
        write_json(path, {"a": {"f": lambda: 0}})
    assert path.read_text() == before
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "missing" / "x.json", {})
