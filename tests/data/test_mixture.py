import json

import numpy as np
import pytest

from vfm.data import build
from vfm.data.interleave import Layout, Modality
from vfm.data.pipeline import Pipeline
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer(("<pad>", "<bos>", "<eos>", "<text>"))


def text(tmp_path, name, count):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": f"{name}{n:03d}"}) + "\n" for n in range(count)))
    return {
        "name": "text",
        "source": {"name": "jsonl", "paths": {"train": str(path)}},
        "packing": "first_fit",
    }


def mixture(tmp_path, sizes, weights):
    names = [chr(ord("a") + n) for n in range(len(sizes))]
    datasets = {name: text(tmp_path, name, size) for name, size in zip(names, sizes)}
    cfg = {"name": "mixture", "datasets": datasets, "weights": dict(zip(names, weights))}
    return build(
        cfg, "train", layout=Layout(6), tokenizer=TOKENIZER
    )  # <bos>, one name and 3 digits, <eos>: one row each


@pytest.mark.parametrize("sizes, weights", [((30, 10, 60), (0.3, 0.2, 0.5)), ((7, 5), (1, 1)), ((1, 50), (2, 8))])
def test_ratios_are_exact_and_even_and_every_row_appears(tmp_path, sizes, weights):
    dataset = mixture(tmp_path, sizes, weights)
    share = np.array(weights) / sum(weights)
    counts = np.bincount(dataset.child, minlength=len(sizes))
    assert np.abs(counts - share * len(dataset)).max() < 1 and counts.sum() == len(dataset)
    for end in range(1, len(dataset) + 1):
        prefix = np.bincount(dataset.child[:end], minlength=len(sizes))
        assert np.abs(prefix - share * end).max() <= 1.5
    for child, size in enumerate(sizes):
        assert set(dataset.row[dataset.child == child]) == set(range(size))
    assert len(dataset) == np.ceil(max(size / s for size, s in zip(sizes, share)) - 1e-9)


def test_rows_come_from_the_chosen_data_set(tmp_path):
    dataset = mixture(tmp_path, (4, 8), (1, 2))
    for index in range(len(dataset)):
        row = dataset.example(index, np.random.default_rng(0))
        wanted = f"{'ab'[dataset.child[index]]}{dataset.row[index]:03d}"
        assert TOKENIZER.decode(row["tokens"]) == wanted


def test_unlike_data_sets_give_rows_of_one_structure(tmp_path):
    pairs = {
        "name": "pairs",
        "sources": {"image": {"name": "digits"}},
        "words": tuple("0123456789"),
        "tasks": ("image->text",),
    }
    cfg = {
        "name": "mixture",
        "datasets": {"pairs": pairs, "text": text(tmp_path, "a", 40)},
        "weights": {"pairs": 1.0, "text": 1.0},
    }
    layout = Layout(12, {"image": Modality((8, 8, 1), 2)})
    dataset = build(cfg, "train", layout=layout, tokenizer=TOKENIZER)
    batch = Pipeline(dataset, 16, seed=0).batch(0)
    assert set(np.unique(batch["label"] >= 0)) == {False, True}
    real = batch["input_mask"][batch["label"] >= 0]
    np.testing.assert_array_equal(batch["segment_ids"][batch["label"] >= 0], real.astype(int))
    np.testing.assert_array_equal(batch["positions"][batch["label"] >= 0], np.arange(12) * real)


def test_bad_weights(tmp_path):
    for weights, words in (
        ({"a": 1}, "positive weight"),
        ({"a": 1, "b": 0}, "positive"),
        ({"c": 1}, "unknown dataset"),
    ):
        cfg = {"name": "mixture", "datasets": {n: text(tmp_path, n, 2) for n in "ab"}, "weights": weights}
        with pytest.raises(UserError, match=words):
            build(cfg, "train", layout=Layout(6), tokenizer=TOKENIZER)
