import gzip
import json
import pickle
import struct
import wave

import numpy as np
import pytest
from PIL import Image

from vfm.data.audio import DTMF_HZ, read_wav
from vfm.data.records import CorruptRecord
from vfm.data.sources import build_source
from vfm.errors import UserError

SPLITS = ("train", "validation", "test")


def test_digits_splits_are_disjoint_and_complete():
    sources = [build_source({"name": "digits"}, split) for split in SPLITS]
    rows = np.concatenate([source.rows for source in sources])
    assert sorted(rows) == list(range(1797))
    assert [round(len(source) / 1797, 1) for source in sources] == [0.7, 0.1, 0.2]
    item = sources[2][3]
    assert item["image"].shape == (8, 8, 1) and item["image"].dtype == np.float32
    assert item["image"].min() >= 0 and max(s.images.max() for s in sources) == 1
    assert item["label"] == sources[2].labels[3]
    assert set(sources[2].labels) == set(range(10))
    assert (build_source({"name": "digits"}, "test").rows == sources[2].rows).all()


def test_dtmf_energy_is_at_the_two_frequencies_of_the_key():
    source = build_source({"name": "dtmf", "snr_db": (10.0, 10.0), "duration": 0.25, "tone": (0.2, 0.25)}, "test")
    groups = sorted({low for low, _ in DTMF_HZ}), sorted({high for _, high in DTMF_HZ})
    assert groups == ([697, 770, 852, 941], [1209, 1336, 1477])
    assert len(set(DTMF_HZ)) == 10
    for index in range(40):
        item = source[index]
        assert item["audio"].shape == (2000,) and item["audio"].dtype == np.float32
        assert np.abs(item["audio"]).max() <= 1
        power = np.abs(np.fft.rfft(item["audio"])) ** 2
        hertz = np.fft.rfftfreq(2000, 1 / 8000)
        near = lambda f, power=power, hertz=hertz: power[np.abs(hertz - f) <= 16].sum()
        found = tuple(max(group, key=near) for group in groups)
        assert found == DTMF_HZ[index % 10] and item["label"] == index % 10 == source.labels[index]
        assert near(found[0]) + near(found[1]) > 0.5 * power.sum()


def test_dtmf_level_twist_and_noise_are_what_was_asked():
    cfg = {
        "name": "dtmf",
        "duration": 1.0,
        "tone": (1.0, 1.0),
        "level_db": (-20.0, -20.0),
        "twist_db": (6.0, 6.0),
    }
    audio = build_source(cfg | {"snr_db": (200.0, 200.0)}, "train")[5]["audio"].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(audio)) / 4000  # 1 s: bins of 1 Hz, and a sine of amplitude a has height a
    assert 20 * np.log10(spectrum[770]) == pytest.approx(-20, abs=0.01)
    assert 20 * np.log10(spectrum[1336]) == pytest.approx(-14, abs=0.01)
    noisy = build_source(cfg | {"snr_db": (3.0, 3.0)}, "train")[5]["audio"].astype(np.float64)
    noise = np.mean((noisy - audio) ** 2)
    assert 10 * np.log10(np.mean(audio**2) / noise) == pytest.approx(3, abs=0.3)


def test_dtmf_is_a_pure_function_of_split_and_index():
    one, two = (build_source({"name": "dtmf"}, "train") for _ in range(2))
    later = [one[i]["audio"] for i in (7, 3)]
    np.testing.assert_array_equal(later[1], two[3]["audio"])
    np.testing.assert_array_equal(later[0], two[7]["audio"])
    first = [build_source({"name": "dtmf"}, split)[3]["audio"] for split in SPLITS]
    first.append(build_source({"name": "dtmf", "seed": 1}, "train")[3]["audio"])
    first.append(one[13]["audio"])
    for a in range(len(first)):
        for b in range(a):
            assert np.abs(np.corrcoef(first[a], first[b])[0, 1]) < 0.9
    onsets = [np.flatnonzero(np.abs(two[i]["audio"]) > 0.3 * np.abs(two[i]["audio"]).max())[0] for i in range(20)]
    assert len(set(onsets)) > 10


def test_stdlib_is_real_code_in_disjoint_splits():
    sources = {split: build_source({"name": "stdlib"}, split) for split in SPLITS}
    paths = {split: [path for path, _ in source.files] for split, source in sources.items()}
    assert paths["train"] == sorted(paths["train"], key=lambda p: p.split("/"))
    flat = sum(paths.values(), [])
    assert len(set(flat)) == len(flat) > 300
    assert 0.85 < len(paths["train"]) / len(flat) < 0.95
    assert not [p for p in flat if {"test", "tests", "site-packages"} & set(p.split("/"))]
    assert "def " in "".join(sources["test"][i]["text"] for i in range(len(sources["test"])))
    assert len(build_source({"name": "stdlib", "limit": 3}, "train")) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_reads_at_random_and_names_a_bad_line(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    lines = [
        '{"text": "één\\n", "kind": "b"}',
        "",
        '{"text": 3, "kind": "a"}',
        '{"text": "two", "kind": "a"}',
    ]
    lines += ['{"text": "cut', "[1]", '{"txt": "x", "kind": "b"}']
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    cfg = {"name": "jsonl", "paths": {"train": path.name}, "dir": str(tmp_path)}
    source = build_source(cfg, "train")
    assert len(source) == 6 and source.labels is None
    for reader in (source, pickle.loads(pickle.dumps(source))):
        assert [reader[2]["text"], reader[0]["text"]] == ["two", "één\n"]
        for index, line in ((1, 3), (3, 5), (4, 6), (5, 7)):
            with pytest.raises(CorruptRecord, match=f"rows.jsonl.*:{line}: "):
                reader[index]
    assert pickle.loads(pickle.dumps(source)).fd is None  # a descriptor of another process would be a stranger
    labelled = build_source(cfg | {"label_field": "kind"}, "train")
    assert labelled.class_names == ("a", "b") and labelled.labels.tolist() == [1, 0, 0, -1, -1, 1]
    with pytest.raises(UserError, match="did you mean 'b'|unknown class"):
        build_source(cfg | {"label_field": "kind", "classes": ("a", "bb")}, "train")


def test_truncated_gzip_and_missing_files_are_named(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "hello"}\n' * 1000)[:-20])
    for name, words in (("cut.jsonl.gz", "cut.jsonl.gz.*damaged"), ("no.jsonl", "no.jsonl.*does not exist")):
        with pytest.raises(UserError, match=words):
            build_source({"name": "jsonl", "paths": {"test": str(tmp_path / name)}}, "test")


def write_images(root):
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                picture = np.full((6, 4, 3), 100 * label + n, np.uint8)
                Image.fromarray(picture).save(root / split / name / f"{n}.png")
    (root / "train" / "dog" / "notes.txt").write_text("not an image")


def test_image_folder(tmp_path):
    write_images(tmp_path)
    source = build_source({"name": "image_folder", "dir": str(tmp_path)}, "train")
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    item = source[4]
    assert item["image"].shape == (6, 4, 3) and item["image"].dtype == np.float32 and item["label"] == 1
    np.testing.assert_allclose(item["image"], 101 / 255, rtol=1e-6)
    grey = build_source({"name": "image_folder", "dir": str(tmp_path), "mode": "L", "size": (3, 5)}, "test")
    assert grey[0]["image"].shape == (3, 5, 1) and len(grey) == 2
    with pytest.raises(UserError, match=r"size=\(0, 5\) must be \(H, W\)"):
        build_source({"name": "image_folder", "dir": str(tmp_path), "size": (0, 5)}, "test")
    deep = np.array([[0, 65535], [32768, 655]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "test" / "cat" / "deep.png")
    grey = build_source({"name": "image_folder", "dir": str(tmp_path), "mode": "L"}, "test")
    np.testing.assert_allclose(grey[1]["image"][..., 0], deep / 65535, atol=1e-6)


def test_a_number_is_the_same_class_in_every_split(tmp_path):
    for name in ("cat", "dog", "fox"):
        for split in ("train", "test") if name != "dog" else ("train",):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / split / name / "0.png")
    lines = {"train": "abcb", "test": "cac"}
    for split, labels in lines.items():
        rows = (json.dumps({"text": "x", "label": label}) for label in labels)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    paths = {split: f"{split}.jsonl" for split in lines}
    cfg = {"name": "jsonl", "dir": str(tmp_path), "paths": paths, "label_field": "label"}
    folder = {"name": "image_folder", "dir": str(tmp_path)}
    assert build_source(folder, "train").class_names == build_source(folder, "test").class_names
    assert build_source(folder, "test").labels.tolist() == [0, 2]
    test = build_source(cfg, "test")
    assert test.class_names == ("a", "b", "c") and test.labels.tolist() == [2, 0, 2]
    # A class that training does not have is told.
    (tmp_path / "test" / "owl").mkdir()
    with pytest.raises(UserError, match="unknown class folder 'owl'"):
        build_source(folder, "test")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "x", "label": "d"}))
    with pytest.raises(UserError, match="unknown class 'd'"):
        build_source(cfg, "test")


def test_records_that_cannot_be_text_are_corrupt(tmp_path):
    lines = ['{"text": "a"}', "[" * 100_000, '{"text": "a\\ud800b"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = build_source({"name": "jsonl", "paths": {"train": str(tmp_path / "rows.jsonl")}}, "train")
    assert source[0] == {"text": "a"}
    for line, words in ((2, "not a line of JSON"), (3, "half a surrogate pair")):
        with pytest.raises(CorruptRecord, match=f"rows.jsonl:{line}: .*{words}"):
            source[line - 1]
    # A carriage return is no end of a line, compressed or not.
    for name, write in (("a.jsonl", lambda b: b), ("a.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(write(b'{"text":\r"a"}\n{"text": "b"}'))
        assert len(build_source({"name": "jsonl", "paths": {"train": str(tmp_path / name)}}, "train")) == 2


def test_pixels_without_a_range_are_corrupt(tmp_path):
    write_images(tmp_path)
    Image.fromarray(np.full((4, 4), 0.5, np.float32), mode="F").save(tmp_path / "train" / "cat" / "1.tiff")
    source = build_source({"name": "image_folder", "dir": str(tmp_path)}, "train")
    (index,) = (i for i, path in enumerate(source.paths) if path.suffix == ".tiff")
    with pytest.raises(CorruptRecord, match="1.tiff.*floating-point"):
        source[index]


@pytest.mark.parametrize(
    "label, words",
    [
        (np.array([0.9, 1.0, np.nan]), "'label' must be a whole number for each row; it is float64.3."),
        (np.eye(3), "'label' must be a whole number for each row; it is float64.3, 3."),
        (np.array(1), "'label' must be a whole number"),
    ],
    ids=["fractions", "one-hot", "scalar"],
)
def test_labels_of_arrays_are_whole_numbers(tmp_path, label, words):
    np.savez(tmp_path / "v.npz", x=np.ones((3, 2)), label=label)
    cfg = {"name": "npz", "paths": {"train": str(tmp_path / "v.npz")}, "arrays": {"x": "x"}}
    with pytest.raises(UserError, match=words):
        build_source(cfg, "train")


def test_image_folder_by_fractions_keeps_files_apart(tmp_path):
    (tmp_path / "cat").mkdir()
    for n in range(40):
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "cat" / f"{n}.png")
    cfg = {"name": "image_folder", "dir": str(tmp_path), "fractions": {"train": 0.6, "test": 0.4}}
    found = [{path.name for path in build_source(cfg, split).paths} for split in ("train", "test")]
    assert not found[0] & found[1] and len(found[0] | found[1]) == 40 and min(map(len, found)) > 5


def test_damaged_image_is_named(tmp_path):
    write_images(tmp_path)
    path = tmp_path / "train" / "cat" / "1.png"
    big = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(big).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"not a picture")
    source = build_source({"name": "image_folder", "dir": str(tmp_path)}, "train")
    assert source[0]["label"] == 0
    for index, name in ((1, "1.png"), (2, "2.png")):
        with pytest.raises(CorruptRecord, match=f"cat/{name}"):
            source[index]


def write_wav(path, samples, rate=8000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples * 32768).clip(-32768, 32767).astype("<i2").tobytes())


def test_audio_folder_mixes_down_resamples_and_fits(tmp_path):
    time = np.arange(8000) / 8000
    tone = 0.5 * np.sin(2 * np.pi * 500 * time)
    write_wav(tmp_path / "train" / "hum" / "a.wav", np.stack([tone, 0 * tone], axis=1), channels=2)
    write_wav(tmp_path / "train" / "zip" / "b.wav", tone[:100])
    cfg = {"name": "audio_folder", "dir": str(tmp_path), "sample_rate": 16000}
    audio = build_source(cfg, "train")[0]["audio"]
    assert audio.shape == (16000,) and audio.dtype == np.float32
    wanted = 0.25 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)
    np.testing.assert_allclose(audio[500:-500], wanted[500:-500], atol=2e-3)
    fixed = build_source(cfg | {"samples": 1000}, "train")
    assert fixed[0]["audio"].shape == fixed[1]["audio"].shape == (1000,)
    np.testing.assert_array_equal(fixed[1]["audio"][200:], 0)
    assert fixed.labels.tolist() == [0, 1]


@pytest.mark.parametrize("kind, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_wav_formats(tmp_path, kind, bits):
    wanted = np.linspace(-1, 0.99, 50)
    if kind == 3:
        body = wanted.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        body = np.round(wanted * 128 + 128).astype(np.uint8).tobytes()
    else:
        whole = np.round(wanted * 2.0 ** (bits - 1)).astype("<i8")
        body = b"".join(int(v).to_bytes(bits // 8, "little", signed=True) for v in whole)
    width = bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE, 1, 8000, 8000 * width, width, bits) + struct.pack("<HHI", 22, bits, 0)
    form += struct.pack("<H", kind) + b"\x00" * 14
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\x00" + b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(body)) + body
    path = tmp_path / "x.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)
    audio, rate = read_wav(path)
    assert rate == 8000 and audio.shape == (50, 1) and audio.dtype == np.float32
    np.testing.assert_allclose(audio[:, 0], wanted, atol=2.0 ** (1 - min(bits, 24)))


def test_damaged_wav_is_named(tmp_path):
    path = tmp_path / "train" / "hum" / "a.wav"
    write_wav(path, np.zeros(1000))
    whole = path.read_bytes()
    source = build_source({"name": "audio_folder", "dir": str(tmp_path), "sample_rate": 8000}, "train")
    assert source[0]["audio"].shape == (1000,)
    for cut in (len(whole) - 100, 40, 20, 3, 0):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptRecord, match="hum/a.wav"):
            source[0]
    path.write_bytes(whole.replace(b"\x01\x00\x01\x00", b"\x07\x00\x01\x00", 1))
    with pytest.raises(CorruptRecord, match="format 7"):
        source[0]


def test_npz(tmp_path):
    x, label = np.arange(12).reshape(4, 3), np.array([0, 1, 1, 0])
    np.savez(tmp_path / "v.npz", x=x, label=label, short=x[:3])
    cfg = {"name": "npz", "paths": {"train": "v.npz"}, "dir": str(tmp_path), "arrays": {"vector": "x"}}
    source = build_source(cfg, "train")
    np.testing.assert_array_equal(source[2]["vector"], [6, 7, 8])
    assert source[2]["vector"].dtype == np.float32 and source[2]["label"] == 1 and len(source) == 4
    for arrays, words in (({"vector": "y"}, "unknown array 'y'"), ({"vector": "short"}, "3 rows")):
        with pytest.raises(UserError, match=words):
            build_source(cfg | {"arrays": arrays}, "train")
    (tmp_path / "v.npz").write_bytes((tmp_path / "v.npz").read_bytes()[:200])
    with pytest.raises(UserError, match="v.npz.*damaged"):
        build_source(cfg, "train")


@pytest.mark.parametrize(
    "cfg, split, words",
    [
        ({"name": "digit"}, "train", ("did you mean 'digits'", "dtmf")),
        ({}, "train", ("`name`",)),
        ({"name": "digits"}, "tests", ("'tests'", "did you mean 'test'", "validation")),
        ({"name": "dtmf"}, "dev", ("'dev'", "train")),
        ({"name": "dtmf", "snr": 3}, "train", ("'snr'", "snr_db")),
        ({"name": "dtmf", "tone": (0.1, 0.9)}, "train", ("tone", "0.5")),
        ({"name": "dtmf", "sample_rate": 2000}, "train", ("sample_rate=2000", "1477")),
        ({"name": "stdlib"}, "dev", ("'dev'",)),
        ({"name": "jsonl", "paths": {"train": "x"}}, "test", ("'test'", "train")),
        ({"name": "jsonl"}, "test", ("paths",)),
        ({"name": "image_folder", "dir": "nowhere"}, "train", ("'nowhere'", "does not exist")),
        ({"name": "image_folder", "dir": ""}, "train", ("no folder is given", "--config.data.dir")),
        ({"name": "audio_folder", "dir": "nowhere"}, "train", ("'nowhere'", "does not exist")),
    ],
)
def test_bad_configs_are_told_in_one_line(cfg, split, words):
    with pytest.raises(UserError) as error:
        build_source(cfg, split)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_bad_folders(tmp_path):
    write_images(tmp_path)
    for fields, split, words in (
        ({}, "dev", "unknown split 'dev'"),
        ({"mode": "RGBA"}, "train", "unknown image mode"),
        ({"classes": ("cat",)}, "train", "unknown class folder 'dog'"),
    ):
        with pytest.raises(UserError, match=words):
            build_source({"name": "image_folder", "dir": str(tmp_path)} | fields, split)
    with pytest.raises(UserError, match="no .wav file"):
        build_source({"name": "audio_folder", "dir": str(tmp_path)}, "train")
    reordered = build_source({"name": "image_folder", "dir": str(tmp_path), "classes": ("dog", "cow", "cat")}, "test")
    assert json.dumps(reordered.labels.tolist()) == "[0, 2]"
