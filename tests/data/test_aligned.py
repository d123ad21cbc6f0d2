import numpy as np
import pytest

from vfm.data import build
from vfm.data.aligned import parse_pairs, slots, text_item
from vfm.data.interleave import Layout, Modality
from vfm.data.records import CorruptRecord
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LAYOUT = Layout(
    20,
    {"image": Modality((8, 16, 1), 8), "audio": Modality((2048,), 4), "text": Modality((12,), 12, dtype="int32")},
)
DEPTH = Layout(9, {**LAYOUT.modalities, "depth": Modality((4,), 1)})
SOURCES = {"image": {"name": "digits"}, "audio": {"name": "dtmf", "duration": 0.128, "tone": (0.05, 0.1)}}
PAIRS = ("image-text", "audio-text", "image-audio")


def dataset(split="train", layout=LAYOUT, **fields):
    cfg = {"name": "composed", "sources": SOURCES, "words": WORDS, "pairs": PAIRS, "compose": 2, "size": 50} | fields
    return build(cfg, split, layout=layout, tokenizer=TOKENIZER)


def rng():
    return np.random.default_rng(0)


def test_items_of_a_pair_show_its_string():
    data = dataset(held_out=0.2)
    assert len(data) == 50
    single = {name: source for name, source in data.sources.items()}
    for index in range(10):
        row = data.example(index, rng())
        assert row["inputs"]["image"].shape == (2, 8, 16, 1) and row["inputs"]["text"].dtype == np.int32
        for k, (pair, places) in enumerate(zip(data.pairs, slots(data.pairs))):
            digits = data.digits(int(row["label"][k]))
            assert len(digits) == 2 and digits[0] * 10 + digits[1] == row["label"][k]
            for name, place in zip(pair, places):
                item = row["inputs"][name][place]
                if name == "text":
                    ids = item[item != TOKENIZER.pad_id].tolist()
                    assert ids[-1] == TOKENIZER.eos_id
                    assert TOKENIZER.decode(ids[:-1]) == f"{WORDS[digits[0]]} {WORDS[digits[1]]}"
                    continue
                for digit, part in zip(digits, np.split(item, 2, axis=1 if name == "image" else 0)):
                    rows = np.flatnonzero(single[name].labels == digit)
                    assert any(np.array_equal(part, single[name][i][name]) for i in rows)


def test_training_never_shows_what_is_held_out_and_the_others_show_it_once():
    train, test = dataset(held_out=0.3, size=300), dataset("test", held_out=0.3)
    seen = {int(label) for i in range(len(train)) for label in train.example(i, rng())["label"]}
    asked = [test.example(i, rng())["label"] for i in range(len(test))]
    assert all(len(set(row.tolist())) == 1 for row in asked)  # all pairs show the row's string
    held_out = [int(row[0]) for row in asked]
    assert len(held_out) == len(set(held_out)) == 30 and not seen & set(held_out) and len(seen) == 70
    assert len(dataset("test")) == 100 and len(dataset("test", held_out=0.3, gallery=7)) == 7
    twice = dataset("test", gallery=7, repeats=2)
    first, again = twice.example(3, rng()), twice.example(10, rng())
    assert len(twice) == 14 and first["label"][0] == again["label"][0]
    assert not np.array_equal(first["inputs"]["audio"], again["inputs"]["audio"])


def test_a_row_is_a_pure_function_of_its_index_and_the_amount_of_data_is_the_size():
    one, two = dataset(), dataset()
    for index in (3, 0, 3):
        a, b = one.example(index, rng()), two.example(index, np.random.default_rng(1))  # nothing is augmented
        for name in a["inputs"]:
            np.testing.assert_array_equal(a["inputs"][name], b["inputs"][name])
    assert any(not np.array_equal(one.example(0, rng())["label"], one.example(i, rng())["label"]) for i in range(1, 9))


def test_shuffled_pairs_show_strings_of_their_own():
    data = dataset(shuffled=("text-image",), size=200)
    text = lambda item: TOKENIZER.decode([i for i in item.tolist() if i not in (TOKENIZER.pad_id, TOKENIZER.eos_id)])
    same, kept = 0, 0
    for i in range(200):
        row = data.example(i, rng())
        same += text(row["inputs"]["text"][0]) == data.text(int(row["label"][0]))
        kept += text(row["inputs"]["text"][1]) == data.text(int(row["label"][1]))
    assert same < 12 and kept == 200


def test_augmentation_is_for_training():
    fields = {"augment": {"image": {"shift": 1}}}
    train, test = dataset(**fields), dataset("test", **fields)
    image = lambda data, seed: data.example(1, np.random.default_rng(seed))["inputs"]["image"]
    assert not np.array_equal(image(train, 0), image(train, 1))
    np.testing.assert_array_equal(image(test, 0), image(test, 1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pairs": ("image-texts",)}, "unknown modality 'texts'"),
        ({"pairs": ("image-text", "text-image")}, "there twice"),
        ({"pairs": ("depth-text",), "layout": DEPTH}, "depth.*no source"),
        ({"compose": 3}, "does not divide into compose=3 parts"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"held_out": 0.004}, "held_out=0.004 of 100 strings must be one at least"),
        ({"held_out": 0.998}, "held_out=0.998 of 100 strings must be one at least, and not all"),
        ({"words": WORDS[:9]}, "label 9, but `words` names only 9"),
        ({"words": ("a very long name", *WORDS[1:])}, "longer than model.encoders.text.length=12"),
        ({"sources": {"image": {"name": "digits"}}}, "audio.*no source"),
    ],
)  # fmt: skip
def test_bad_fields_are_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        dataset(**fields)


def test_records_hold_their_own_pairs(tmp_path):
    images = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    depths = images + 1
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", vector=images, depth=depths, label=np.arange(5))
    layout = Layout(4, {"vector": Modality((4,), 1), "depth": Modality((4,), 1)})
    paths = {split: str(tmp_path / f"{split}.npz") for split in ("train", "test")}
    source = {"name": "npz", "paths": paths, "arrays": {"vector": "vector", "depth": "depth"}}
    cfg = {"name": "records", "source": source, "pairs": ("vector-depth",)}
    data = build(cfg, "train", layout=layout, tokenizer=TOKENIZER)
    row = data.example(3, rng())
    np.testing.assert_array_equal(row["inputs"]["vector"], images[3:4])
    np.testing.assert_array_equal(row["inputs"]["depth"], depths[3:4])
    assert row["label"].tolist() == [3] and len(data) == 5
    wrong = Layout(4, {"vector": Modality((4,), 1), "touch": Modality((4,), 1)})
    with pytest.raises(CorruptRecord, match="record 0 has no 'touch'; it has depth"):
        build({**cfg, "pairs": ("vector-touch",)}, "train", layout=wrong, tokenizer=TOKENIZER).example(0, rng())
    with pytest.raises(UserError, match="shape"):
        small = Layout(4, {"vector": Modality((3,), 1), "depth": Modality((4,), 1)})
        build(cfg, "train", layout=small, tokenizer=TOKENIZER).example(0, rng())


def test_text_items():
    assert text_item("ab", LAYOUT, TOKENIZER, "").tolist()[:3] == [*TOKENIZER.encode("ab"), TOKENIZER.eos_id]
    with pytest.raises(UserError, match="here: a text of 15 tokens.*length=12: 'a long caption'"):
        text_item("a long caption", LAYOUT, TOKENIZER, "here")
    assert parse_pairs(("image - text",), LAYOUT.modalities, "") == (("image", "text"),)
