"""What must be on disk for the rows of test_bad_input.py.

A maker gets an empty folder and a function that gives the folder of a good run, and returns flags.
"""

import contextlib
import io
import shutil
import textwrap

import numpy as np
import pytest


def image_folder(folder, trained):
    """Two classes, three pictures of each in every split; dir/train/a/0.png is record 0."""
    from PIL import Image

    for split in ("train", "validation", "test"):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return [f"--config.data.sources.image.dir={folder}"]


def damaged(*names):
    def make(folder, trained):
        flags = image_folder(folder, trained)
        for name in names:
            file = folder / name
            file.write_bytes(file.read_bytes()[:50])
        return flags

    return make


def npz(shape=(8, 8, 1), nan_at=None):
    def make(folder, trained):
        x = np.zeros((6, *shape), np.float32)
        if nan_at is not None:
            x[nan_at, 0] = np.nan
        for split in ("train", "validation", "test"):
            np.savez(folder / f"{split}.npz", x=x, label=np.arange(6) % 2)
        return [f"--config.data.sources.image.dir={folder}"]

    return make


def missing_npz(folder, trained):
    flags = npz()(folder, trained)
    (folder / "test.npz").unlink()
    return flags


def jsonl(folder, trained):
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text('{"text": "some text"}\n{"text": "more"\n{"text": "the end"}\n')
    return [f"--config.data.source.dir={folder}"]


def array_record(damage):
    """A TFDS data set of 8 pictures, written without TensorFlow, then damaged."""

    def make(folder, trained):
        tfds = pytest.importorskip("tensorflow_datasets")
        pytest.importorskip("array_record")
        from PIL import Image

        class Dots(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                kinds = tfds.features
                features = {"image": kinds.Image(shape=(8, 8, 1)), "label": kinds.ClassLabel(num_classes=2)}
                return tfds.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

            def _split_generators(self, _):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(8):
                    file = io.BytesIO()
                    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(file, "png")
                    yield i, {"image": io.BytesIO(file.getvalue()), "label": i % 2}

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            Dots(data_dir=str(folder), file_format="array_record").download_and_prepare()
        (file,) = (folder / "dots" / "1.0.0").glob("*.array_record*")
        data = bytearray(file.read_bytes())
        damage(data)
        file.write_bytes(bytes(data))
        return [f"--config.data.sources.image.data_dir={folder}"]

    return make


def cut(data):
    del data[len(data) // 2 :]


def flip(data):
    data[1000:1030] = bytes(255 - byte for byte in data[1000:1030])


def in_trained(change=lambda folder: None):
    """The row runs in a changed copy of the folder of the good run."""

    def make(folder, trained):
        shutil.copytree(trained(), folder, dirs_exist_ok=True)
        change(folder)
        return [f"--workdir={folder}"]

    return make


def flip_all_checkpoints(folder):
    for step in (folder / "checkpoints").iterdir():
        if step.name.isdigit():
            file = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(bytes(data))


def below_a_file(folder, trained):
    (folder / "file").write_text("")
    return [f"--workdir={folder / 'file' / 'run'}"]


def file(text, name="broken.py"):
    """The row's config file is this text."""

    def make(folder, trained):
        (folder / name).write_text(textwrap.dedent(text))
        return [f"--config={folder / name}"]

    return make
