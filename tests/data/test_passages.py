"""Passages of documents, and the labels of the standard library."""

import json

import numpy as np
import pytest

from vfm.data.passages import Passages
from vfm.data.records import CorruptRecord
from vfm.data.sources import build_source
from vfm.errors import UserError
from vfm.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


def passages(tmp_path, texts, **fields):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text, "label": len(text) % 2}) if text is not None else "{" for text in texts]
    path.write_text("\n".join(lines) + "\n")
    label = fields.pop("label_field", "label")
    source = {"name": "jsonl", "paths": {"test": str(path)}, "label_field": label}
    return Passages(source, split="test", tokenizer=TOKENIZER, **fields)


def texts(found):
    return [TOKENIZER.decode(ids) for ids in found.ids]


def test_passages_lie_at_even_distances(tmp_path):
    found = passages(tmp_path, ["abcdefghijklmnopqrstuvw"], length=5, per_document=3)
    assert texts(found) == ["abcde", "jklmn", "stuvw"]
    assert texts(passages(tmp_path, ["abcdefgh"], length=5, per_document=3)) == ["abcde"]  # there is room for one
    assert texts(passages(tmp_path, ["abc", "d"], length=5)) == ["abc"]  # the other one has no second token
    row = passages(tmp_path, ["x", "abc"], length=5).example(0)
    assert TOKENIZER.decode(row["tokens"]) == "abc" and row["tokens"].shape == (5,)
    assert row["input_mask"].tolist() == [True] * 3 + [False] * 2 and not row["loss_mask"].any()
    assert row["document"] == 1


def test_a_few_passages_are_a_sample_of_all_documents(tmp_path):
    documents = [f"document {i:03}" for i in range(100)]
    some, same, more = (passages(tmp_path, documents, length=12, most=n).documents for n in (10, 10, 0))
    assert some.tolist() == same.tolist() == more[:10].tolist() and sorted(more) == list(range(100))
    assert some.max() > 50 and len(set(some)) == 10  # not the first ones
    assert len(passages(tmp_path, documents, length=3, per_document=4, most=10)) == 10


def test_labels_and_damaged_documents(tmp_path):
    documents = ["abc", None, "abcd"]
    with pytest.raises(CorruptRecord):
        passages(tmp_path, documents, length=4)
    found = passages(tmp_path, documents, length=4, skip_corrupt=True)
    assert sorted(zip(found.documents, found.labels)) == [(0, 1), (2, 0)]
    assert sorted(passages(tmp_path, documents, length=4, labelled=True).documents) == [0, 2]  # it has no label either
    with pytest.raises(UserError, match="has no labels"):
        passages(tmp_path, ["abc"], length=4, label_field="", labelled=True)
    with pytest.raises(UserError, match="test split .* has no document of 2 tokens or more"):
        passages(tmp_path, ["a"], length=4)


def test_packages_of_the_standard_library_are_labels():
    found = {split: build_source({"name": "stdlib", "label": "package"}, split) for split in ("train", "test")}
    names = found["train"].class_names
    assert names == found["test"].class_names and names == tuple(sorted(names))
    assert {"asyncio", "email", "encodings"} <= set(names) and "json" not in names  # five files
    for source in found.values():
        items = [source[i] for i in range(len(source))]
        assert [item["label"] for item in items] == source.labels.tolist()
        for item in items:
            package = item["path"].rpartition("/")[0].split("/")[0]
            assert item["label"] == (names.index(package) if package in names else -1)
        assert len(set(source.labels)) > 5 and (source.labels == -1).any()
    assert np.bincount(found["train"].labels + 1)[1:].min() >= 10
    assert build_source({"name": "stdlib"}, "test").labels is None
    with pytest.raises(UserError, match="unknown label 'packages'.*did you mean 'package'"):
        build_source({"name": "stdlib", "label": "packages"}, "test")
