import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from vfm.data.records import CorruptRecord
from vfm.data.sources import build_source
from vfm.errors import UserError

DIR = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "tfds"
pytest.importorskip("tensorflow_datasets")
pytestmark = pytest.mark.skipif(not DIR.is_dir(), reason="no ../shared/data/tfds")

MNIST = {
    "name": "tfds",
    "dataset": "mnist:3.0.1",
    "data_dir": str(DIR),
    "features": {"image": "image", "label": "label"},
    "splits": {"train": "train[:100]", "validation": "train[100:120]", "test": "test[:50]"},
}
SPEECH = {
    "name": "tfds",
    "dataset": "spoken_digit:1.0.9",
    "data_dir": str(DIR),
    "features": {"audio": "audio", "label": "label"},
    "splits": {"train": "train", "validation": "train", "test": "train"},
    "samples": 4000,
    "where": {
        "train": {"audio/filename": "_(george|jackson|nicolas)_"},
        "validation": {"audio/filename": "_yweweler_"},
        "test": {"audio/filename": "_theo_"},
    },
}


@pytest.mark.parametrize("cache", [False, True])
def test_images_are_scaled_and_labelled(cache):
    import tensorflow_datasets as tfds

    raw = tfds.builder_from_directory(DIR / "mnist" / "3.0.1").as_data_source("train")
    source = build_source(MNIST | {"cache": cache}, "validation")
    assert len(source) == 20
    for _ in range(2):
        item = source[7]
        assert item["image"].dtype == np.float32 and item["image"].shape == (28, 28, 1)
        np.testing.assert_allclose(item["image"], raw[107]["image"] / 255.0, atol=1e-6)
        assert item["label"] == raw[107]["label"] == source.labels[7]


def test_images_can_be_resized():
    source, small = build_source(MNIST, "validation"), build_source(MNIST | {"size": (14, 7)}, "validation")
    assert small[7]["image"].shape == (14, 7, 1) and small[7]["image"].dtype == np.float32
    # By such a factor it is about the mean of each block, and rounded to bytes.
    assert abs(small[7]["image"].mean() - source[7]["image"].mean()) < 0.01 and small[7]["image"].max() > 0.5
    with pytest.raises(UserError, match=r"size=\(14,\) must be \(H, W\)"):
        build_source(MNIST | {"size": (14,)}, "validation")


def test_speakers_are_disjoint_and_sound_is_scaled_and_padded():
    names = []
    for split in ("train", "validation", "test"):
        source = build_source(SPEECH | {"features": SPEECH["features"] | {"audio/filename": "text"}}, split)
        items = [source[i] for i in range(0, len(source), 97)]
        names.append({item["text"].split("_")[1] for item in items})
        assert len(source) == {"train": 1500}.get(split, 500)
        for n, item in enumerate(items):
            assert item["audio"].shape == (4000,) and item["audio"].dtype == np.float32
            assert 0.001 < np.abs(item["audio"]).max() <= 1
            assert item["text"].startswith(f"{item['label']}_") and item["label"] == source.labels[97 * n]
    assert names == [{"george", "jackson", "nicolas"}, {"yweweler"}, {"theo"}]


def test_audio_values_are_the_recording():
    import tensorflow_datasets as tfds

    raw = tfds.builder_from_directory(DIR / "spoken_digit" / "1.0.9").as_data_source("train")
    source = build_source(SPEECH | {"samples": 0}, "test")
    index = int(source.indices[5])
    np.testing.assert_array_equal(source[5]["audio"], (raw[index]["audio"] / 32768).astype(np.float32))
    fitted = build_source(SPEECH | {"samples": 1000}, "test")[5]["audio"]
    np.testing.assert_array_equal(fitted, source[5]["audio"][:1000])


def test_source_travels_to_another_process():
    source = pickle.loads(pickle.dumps(build_source(MNIST, "test")))
    np.testing.assert_array_equal(source[3]["image"], build_source(MNIST, "test")[3]["image"])


@pytest.mark.parametrize(
    "change, split, words",
    [
        ({"data_dir": "nowhere"}, "train", ("'nowhere'", "does not exist")),
        ({"dataset": "minst:3.0.1"}, "train", ("'minst'", "did you mean 'mnist'")),
        ({"dataset": "mnist"}, "train", ("needs a version", "mnist:3.0.1")),
        ({"dataset": "mnist:1.0.0"}, "train", ("'1.0.0'", "3.0.1")),
        ({}, "dev", ("'dev'", "validation")),
        ({"splits": {"train": "training"}}, "train", ("'training'", "did you mean 'train'")),
        ({"splits": {"train": "train[:x]"}}, "train", ("train[:x]",)),
        ({"features": {"pixels": "image"}}, "train", ("'pixels'", "image, label")),
        ({"features": {"image": "picture"}}, "train", ("'picture'", "audio, image")),
        ({"where": {"train": {"speaker": "x"}}}, "train", ("'speaker'", "where")),
        ({"where": {"train": {"label": "x"}}}, "train", ("leaves no record",)),
    ],
)
def test_bad_configs_are_told_in_one_line(change, split, words):
    with pytest.raises(UserError) as error:
        build_source(MNIST | change, split)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_damaged_file_is_named(tmp_path):
    shutil.copytree(DIR / "spoken_digit", tmp_path / "spoken_digit")
    cfg = SPEECH | {"data_dir": str(tmp_path)}
    folder = tmp_path / "spoken_digit" / "1.0.9"
    (file,) = folder.glob("*.array_record*")
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="1.0.9|spoken_digit"):
        source = build_source(cfg, "test")
        source[0]
    broken = bytearray(whole)
    broken[len(whole) // 2 : len(whole) // 2 + 4000] = b"\xff" * 4000
    file.write_bytes(bytes(broken))
    source = build_source(cfg, "test")
    bad = np.flatnonzero(source.labels == -1)
    good = np.flatnonzero(source.labels >= 0)
    assert len(bad) and len(good)
    source[int(good[0])]
    with pytest.raises(CorruptRecord, match=r"1\.0\.9.*record \d+"):
        source[int(bad[0])]
    (folder / "features.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="cannot be opened"):
        build_source(cfg, "test")
