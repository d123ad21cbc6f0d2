import json

import numpy as np
import pytest

from vfm.data import build, texts
from vfm.data.interleave import Layout, Modality
from vfm.data.records import CorruptRecord
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()


def corpus(tmp_path, texts):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"name": "jsonl", "paths": {"train": str(path)}}


@pytest.mark.parametrize("packing", ["split", "first_fit"])
def test_packed_rows_lose_no_token_and_never_predict_across_documents(tmp_path, packing):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(32, 126, size))) for size in rng.integers(0, 60, 40)]
    cfg = {"name": "text", "source": corpus(tmp_path, texts), "packing": packing}
    dataset = build(cfg, "train", layout=Layout(24, {"image": Modality((2,), 1)}), tokenizer=TOKENIZER)
    bos, eos = TOKENIZER.bos_id, TOKENIZER.eos_id
    documents = [[bos, *TOKENIZER.encode(text), eos] for text in texts]
    pairs, pieces = [], []
    for index in range(len(dataset)):
        row = dataset.example(index)
        assert row["inputs"]["image"].shape == (1, 2) and row["starts"]["image"][0] == -1
        real = row["input_mask"]
        np.testing.assert_array_equal(row["segment_ids"] > 0, real)
        assert (row["tokens"][~real] == TOKENIZER.pad_id).all() and (row["loss_mask"][~real] == 0).all()
        for segment in range(1, row["segment_ids"].max() + 1):
            at = np.flatnonzero(row["segment_ids"] == segment)
            np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
            tokens, targets, mask = (row[k][at] for k in ("tokens", "targets", "loss_mask"))
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            assert mask[:-1].all()  # inside a piece everything is predicted
            assert mask[-1] == (tokens[-1] != eos)  # a cut document knows its next token; an ended one has none
            pieces.append(tokens.tolist())
            pairs += [(int(a), int(b)) for a, b, m in zip(tokens, targets, mask) if m]
    assert sorted(sum(pieces, [])) == sorted(sum(documents, []))
    assert sorted(pairs) == sorted((a, b) for d in documents for a, b in zip(d, d[1:]))


def test_row_is_a_pure_function_of_its_index(tmp_path):
    cfg = {"name": "text", "source": corpus(tmp_path, ["abc", "de", "fghijklmnop"])}
    one, two = (build(cfg, "train", layout=Layout(8), tokenizer=TOKENIZER) for _ in range(2))
    for index in reversed(range(len(one))):
        for key, value in one.example(index).items():
            if not isinstance(value, dict):
                np.testing.assert_array_equal(value, two.example(index)[key])


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="no 'text'"):
        build({"name": "text", "source": {"name": "digits"}}, "train", layout=Layout(8), tokenizer=TOKENIZER)
    source = corpus(tmp_path, ["fine"])
    with open(source["paths"]["train"], "a") as file:
        file.write("{broken\n")
    with pytest.raises(CorruptRecord, match=r"corpus\.jsonl:2"):
        build({"name": "text", "source": source}, "train", layout=Layout(8), tokenizer=TOKENIZER)


def test_texts_are_in_order_and_damage_is_told_or_listed(tmp_path):
    source = corpus(tmp_path, ["one", "", "three"])
    with open(source["paths"]["train"], "a") as file:
        file.write('{broken\n{"text": "five"}\n')
    skipped = []
    assert list(texts(source, "train", skipped)) == ["one", "", "three", "five"]
    assert len(skipped) == 1 and "corpus.jsonl:4" in skipped[0]
    with pytest.raises(CorruptRecord, match=r"corpus\.jsonl:4"):
        list(texts(source, "train"))
