import numpy as np
import pytest

from vfm import data
from vfm.data import pipeline
from vfm.data.fused import Fused
from vfm.data.interleave import Layout, Modality
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TOKENIZER = ByteTokenizer(("<pad>", "<bos>", "<eos>", "<mask>"))
MASK = TOKENIZER.token_id("<mask>")
LAYOUT = Layout(16, {"image": Modality((8, 8, 1), 4, 4), "audio": Modality((800,), 3)})
IMAGE = {"image": {"name": "digits"}}
SOUND = {"audio": {"name": "dtmf", "duration": 0.1, "tone": (0.1, 0.1)}}
MATCHING = {"name": "matching", "sources": IMAGE, "words": WORDS}
PARITY = {"name": "parity", "sources": IMAGE, "words": WORDS}
CROSS = {"decoder_length": 8, "region_rate": 0.0}


def make(cfg, split="validation", layout=LAYOUT, **overrides):
    return data.build(cfg, split, layout=layout, tokenizer=TOKENIZER, **overrides)


def rows(dataset, count=200, seed=0):
    return [dataset.example(i % len(dataset), pipeline.rng(seed, i)) for i in range(count)]


def text(ids):
    return TOKENIZER.decode([i for i in ids if i >= 4])


def original(row):
    """The word of a row, with what was masked."""
    tokens = row.get("decoder_tokens", row["tokens"])
    return text(np.where(row["loss_mask"] > 0, row["targets"], tokens))


def test_one_sequence():
    image = np.ones((8, 8, 1), np.float32)
    row = Fused(LAYOUT, TOKENIZER).row({"image": image}, "six")
    np.testing.assert_array_equal(row["tokens"][:9], [1, 0, 0, 0, 0, *TOKENIZER.encode("six"), 2])
    assert row["starts"]["image"][0] == 1 and row["input_mask"].sum() == 9 and row["loss_mask"].sum() == 0
    assert row["inputs"]["image"].min() == 1 and "decoder_tokens" not in row


def test_two_sequences():
    image = np.ones((8, 8, 1), np.float32)
    row = Fused(LAYOUT, TOKENIZER, 8).row({"image": image}, "six")
    assert row["starts"]["image"][0] == 0 and row["input_mask"].tolist() == [True] * 4 + [False] * 12
    np.testing.assert_array_equal(row["decoder_tokens"], [1, *TOKENIZER.encode("six"), 2, 0, 0, 0])
    assert row["decoder_mask"].sum() == 5 and row["targets"].shape == row["loss_mask"].shape == (8,)
    alone = Fused(LAYOUT, TOKENIZER, 8).row({}, "six")
    assert not alone["input_mask"].any() and alone["starts"]["image"][0] == -1


@pytest.mark.parametrize("change", [{}, CROSS], ids=["one", "two"])
def test_corruption_leaves_items_and_special_tokens_alone(change):
    dataset = make(MATCHING | {"text_rate": 0.5, "mismatched": 0.0} | change)
    masked = kept = changed = 0
    for row in rows(dataset, 300):
        tokens = row.get("decoder_tokens", row["tokens"])
        at = np.flatnonzero(row["loss_mask"])
        begin = 1 if change else row["starts"]["image"][0] + 4  # what stands before is not text
        word = WORDS[dataset.sources["image"].labels[np.flatnonzero(
            (dataset.sources["image"].images == row["inputs"]["image"][0]).all(axis=(1, 2, 3)))[0]]]  # fmt: skip
        end = begin + len(word)
        assert ((at >= begin) & (at < end)).all() and tokens[end] == TOKENIZER.eos_id
        np.testing.assert_array_equal(row["targets"][at], np.asarray(TOKENIZER.encode(word))[at - begin])
        assert original(row) == word
        untouched = np.setdiff1d(np.arange(begin, end), at)
        np.testing.assert_array_equal(tokens[untouched], np.asarray(TOKENIZER.encode(word))[untouched - begin])
        if not change:
            np.testing.assert_array_equal(tokens[1:5], 0)
        masked += (tokens[at] == MASK).sum()
        kept += (tokens[at] == row["targets"][at]).sum()
        changed += len(at)
    assert 0.45 < changed / (300 * np.mean([len(word) for word in WORDS])) < 0.55
    assert 0.75 < masked / changed < 0.85 and 0.06 < kept / changed < 0.15


def test_half_of_the_rows_do_not_match():
    dataset = make(MATCHING | {"text_rate": 0.15})
    labels = dataset.sources["image"].labels
    found, wrong = [], set()
    for i, row in enumerate(rows(dataset, 600)):
        label = labels[i % len(dataset)]
        np.testing.assert_array_equal(row["inputs"]["image"][0], dataset.sources["image"].images[i % len(dataset)])
        if row["label"]:
            assert original(row) == WORDS[label]
        else:
            wrong.add(text(row["tokens"]))
            assert row["loss_mask"].sum() == 0 and row["region_mask"]["image"].sum() == 0
        found.append(int(row["label"]))
    assert 0.45 < np.mean(found) < 0.55 and len(wrong) > 10
    clean = make(MATCHING | {"text_rate": 0.0, "mismatched": 1.0})
    words = [text(row["tokens"]) for row in rows(clean, 300)]
    assert all(word != WORDS[labels[i % len(clean)]] for i, word in enumerate(words)) and set(words) == set(WORDS)


def test_rows_that_do_not_match_are_corrupted_as_well():
    dataset = make(MATCHING | {"text_rate": 0.5, "region_rate": 0.5})
    count = {0: [], 1: []}
    for row in rows(dataset, 600):
        count[int(row["label"])].append([(row["tokens"] == MASK).sum(), row["masked"]["image"].sum()])
    for mean in (np.mean(count[0], axis=0), np.mean(count[1], axis=0)):
        assert 1.2 < mean[0] < 2.0 and 1.8 < mean[1] < 2.2


def test_masked_slots():
    dataset = make(MATCHING | {"region_rate": 0.3, "mismatched": 0.3})
    masks, found = [], rows(dataset, 400)
    for row in found:
        np.testing.assert_array_equal(row["region_mask"]["image"], row["masked"]["image"] * float(row["label"]))
        masks.append(row["masked"]["image"][0])
    assert masks[0].shape == (4,) and masks[0].dtype == bool and found[0]["region_mask"]["image"].dtype == np.float32
    assert {0, 1, 2, 3, 4} == {int(mask.sum()) for mask in masks}
    np.testing.assert_allclose(np.mean(masks, axis=0), 0.3, atol=0.06)


def test_items_of_two_sources_match_by_class():
    dataset = make(MATCHING | {"sources": IMAGE | SOUND, "inputs": ("image", "audio"), "text_rate": 0.0})
    sounds = {dataset.sources["audio"][i]["audio"].tobytes(): i % 10 for i in range(500)}
    for i, row in enumerate(rows(dataset, 60)):
        same = sounds[row["inputs"]["audio"][0].tobytes()] == dataset.sources["image"].labels[i % len(dataset)]
        assert same == row["label"] and row["starts"]["audio"][0] == 5
        assert set(row["masked"]) == {"image", "audio"} and row["masked"]["audio"].shape == (1, 3)


@pytest.mark.parametrize(
    "change", [{}, {"sources": IMAGE | SOUND, "inputs": ("audio", "image")}], ids=["text", "audio"]
)
def test_the_label_is_the_exclusive_or_of_the_parities(change):
    dataset = make(PARITY | change)
    anchor = next(name for name in dataset.inputs if name != "text")
    assert len(dataset) == 2 * len(dataset.sources[anchor])
    sounds = {} if not change else {dataset.sources["audio"][i]["audio"].tobytes(): i % 10 for i in range(500)}
    images = {image.tobytes(): label for image, label in zip(dataset.sources["image"].images,
                                                            dataset.sources["image"].labels)}  # fmt: skip
    seen, pairs = set(), []
    for row in rows(dataset, 300):
        image = images[row["inputs"]["image"][0].tobytes()]
        other = sounds[row["inputs"]["audio"][0].tobytes()] if change else WORDS.index(text(row["tokens"]))
        assert row["label"] == (image % 2) ^ (other % 2) and row["label"].dtype == np.int32
        seen.add(int(other))
        pairs.append((row["inputs"][anchor][0].tobytes(), int(row["label"])))
    assert seen == set(range(10))
    # Every item of the anchor has both labels, so that it alone tells nothing.
    assert all(first[0] == second[0] and {first[1], second[1]} == {0, 1} for first, second in zip(*[iter(pairs)] * 2))


def test_one_modality_of_the_task_can_be_left_out():
    both = rows(make(PARITY), 20)
    for shown in (("image",), ("text",)):
        for change in ({}, {"decoder_length": 8}):
            for full, row in zip(both, rows(make(PARITY | {"shown": shown} | change), 20)):
                assert row["label"] == full["label"]
                word = text(row.get("decoder_tokens", row["tokens"]))
                assert word == (text(full["tokens"]) if shown == ("text",) else "")
                assert (row["starts"]["image"][0] >= 0) == (shown == ("image",)) == row["inputs"]["image"].any()


@pytest.mark.parametrize("cfg", [MATCHING, MATCHING | CROSS, PARITY, PARITY | {"decoder_length": 8}])
def test_a_row_is_a_function_of_seed_and_index_and_has_the_declared_arrays(cfg):
    dataset, again = make(cfg, "train"), make(cfg, "train")
    changed = 0
    for i in range(10):
        row, same, other = (d.example(i, pipeline.rng(seed, i)) for d, seed in ((dataset, 3), (again, 3), (dataset, 4)))
        pipeline.stack([row, same])
        assert all(np.array_equal(a, b) for a, b in zip(leaves(row), leaves(same)))
        changed += not all(np.array_equal(a, b) for a, b in zip(leaves(row), leaves(other)))
    assert changed
    blank = data.blank(cfg, layout=LAYOUT, tokenizer=TOKENIZER)
    described = lambda row: {name: (a.shape, a.dtype) for name, a in zip(names(row), leaves(row))}
    assert described(blank) == described(row)
    assert dataset.keys <= row.keys()
    (batch,) = pipeline.eval_batches(make(cfg), 8, limit=4)
    assert batch["example_mask"].tolist() == [1] * 4 + [0] * 4 and not batch["loss_mask"][4:].any()


def names(row, prefix=""):
    return [n for k, v in row.items() for n in (names(v, f"{prefix}{k}/") if isinstance(v, dict) else [f"{prefix}{k}"])]


def leaves(row):
    return [a for value in row.values() for a in (leaves(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize(
    "cfg, words",
    [
        (MATCHING | {"inputs": ("image",)}, ("two modalities or more",)),
        (MATCHING | {"inputs": ("image", "sound")}, ("'sound'", "source")),
        (MATCHING | {"inputs": ("image", "image")}, ("twice",)),
        (MATCHING | {"mismatched": 1.5}, ("mismatched=1.5", "share")),
        (MATCHING | {"mask": "<msk>"}, ("<msk>",)),
        (MATCHING | {"decoder_length": 8}, ("region_rate=0.15", "decoder_length")),
        (MATCHING | {"words": ("w" * 20,) * 10}, ("26", "longer", "16")),
        (MATCHING | CROSS | {"decoder_length": 6}, ("decoder_length=6", "5 tokens")),
        (MATCHING | {"words": WORDS[:9]}, ("dataset 'matching'", "label 9", "9 classes")),
        (PARITY | {"inputs": ("image",)}, ("two modalities",)),
        (PARITY | {"shown": ("imgae",)}, ("'imgae'", "did you mean 'image'")),
        (PARITY | {"sources": IMAGE | {"audio": {"name": "dtmf", "sizes": {"validation": 1}}},
                   "inputs": ("audio", "image"), "augment": {"audio": {"shfit": 1}}}, ("did you mean 'shift'",)),
    ],
)  # fmt: skip
def test_bad_configs_are_told_in_one_line(cfg, words):
    with pytest.raises(UserError) as error:
        make(cfg)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_classes_must_have_both_parities(tmp_path):
    np.savez(tmp_path / "v.npz", vector=np.ones((6, 2), np.float32), label=np.zeros(6, int))
    source = {"name": "npz", "paths": {"validation": str(tmp_path / "v.npz")}, "arrays": {"vector": "vector"}}
    layout = Layout(16, dict(LAYOUT.modalities) | {"vector": Modality((2,), 1)})
    cfg = PARITY | {"sources": {"vector": source}, "inputs": ("vector", "text")}
    assert len(make(cfg, layout=layout)) == 12
    with pytest.raises(UserError, match="classes of 'text', .0., must be odd ones and even ones"):
        make(cfg | {"words": ("zero",)}, layout=layout)
