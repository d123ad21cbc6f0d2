"""Sequences that tell their later symbols themselves: what repeats repeats, and what is held out is held out."""

import numpy as np
import pytest

from vfm import data
from vfm.data.interleave import Layout
from vfm.data.patterns import Functions, Lookup, Repeated
from vfm.errors import UserError
from vfm.tokenizers import ByteTokenizer, SymbolTokenizer

TOKENIZER = SymbolTokenizer(numbers=32, separator=" ")


def build(source, split="train", length=96, tokenizer=TOKENIZER, **fields):
    cfg = {"name": "in_context", "source": source, **fields}
    return data.build(cfg, split, layout=Layout(length), tokenizer=tokenizer)


@pytest.mark.parametrize("least", [0, 24])
def test_the_block_comes_again(least):
    source, found = Repeated("train", least=least), set()
    for i in range(200):
        symbols, shots = source[i]["symbols"], source[i]["shots"]
        assert symbols.shape == shots.shape == (96,) and symbols.min() >= 0 and symbols.max() < 32
        size = int(np.flatnonzero(shots >= 0)[0]) - 1  # the first that can be told is the second of the second block
        found.add(size)
        np.testing.assert_array_equal(symbols[size:], symbols[:-size])
        np.testing.assert_array_equal(shots, [-1 if at <= size else at // size for at in range(96)])
    assert found == ({48} if not least else set(range(24, 49)))


def test_a_block_of_different_symbols():
    source = Repeated("train", block=12, symbols=12, copies=3, distinct=True)
    assert source.length == 36 and all(len(set(source[i]["symbols"][:12])) == 12 for i in range(20))


def test_every_query_is_answered_with_the_value_of_its_key():
    source, asked = Lookup("train", pairs=8, queries=5), set()
    for i in range(200):
        pairs, shots = source[i]["symbols"].reshape(-1, 2), source[i]["shots"].reshape(-1, 2)
        table = dict(pairs[:8].tolist())
        assert len(table) == 8 and all(key < 16 <= value < 32 for key, value in table.items())
        assert len(set(pairs[8:, 0])) == 5
        assert all(table[key] == value for key, value in pairs[8:].tolist())
        assert (shots[:8] == -1).all() and (shots[:, 0] == -1).all() and (shots[8:, 1] == 8).all()
        asked.add(list(table).index(pairs[8, 0]))
    assert asked == set(range(8))  # wherever the pair stands


def tables(source):
    """Which of the functions of a family, as their outputs, there are in a split."""
    found = set()
    for i in range(600):
        x, y = source[i]["symbols"].reshape(-1, 2).T
        fits = [(a, b) for a in range(1, 7) for b in range(7) if ((a * x + b) % 7 + 7 == y).all()]
        assert len(fits) == 1  # five different inputs pin it
        found.add(fits[0])
        np.testing.assert_array_equal(source[i]["shots"].reshape(-1, 2), [[-1, k] for k in range(5)])
    return found


def test_functions_that_are_held_out_are_in_the_test_split_alone():
    fields = {"numbers": 7, "examples": 5, "distinct": True, "held_out": 0.25}
    found = {split: tables(Functions(split, **fields)) for split in ("train", "validation", "test")}
    assert found["train"] == found["validation"] and len(found["train"]) == 32 and len(found["test"]) == 10
    assert not found["train"] & found["test"]
    few = tables(Functions("train", functions=4, **fields))
    assert len(few) == 4 and few < tables(Functions("train", functions=8, **fields)) < found["train"]
    assert tables(Functions("test", functions=4, **fields)) == found["test"]


def test_tables_are_few_or_new_in_every_sequence():
    def seen(split, functions):
        source = Functions(split, numbers=3, family="table", examples=30, functions=functions)
        return {tuple(dict(sorted(source[i]["symbols"].reshape(-1, 2).tolist())).values()) for i in range(400)}

    assert len(seen("train", 5)) <= 5 and seen("train", 5) == seen("validation", 5)
    assert len(seen("train", 0)) == len(seen("test", 5)) == 27  # all that there are


@pytest.mark.parametrize("make", [Repeated, Lookup, lambda split, **more: Functions(split, family="table", **more)])
def test_items_are_pure_and_splits_and_seeds_differ(make):
    rows = lambda source: [tuple(source[i]["symbols"].tolist()) for i in range(50)]
    train = rows(make("train"))
    assert train == rows(make("train")) and len(set(train)) == 50
    for other in (make("validation"), make("test"), make("train", seed=1)):
        assert not set(train) & set(rows(other))
    assert len(make("test", sizes={"test": 7})) == 7
    with pytest.raises(IndexError):
        make("test", sizes={"test": 7})[7]


@pytest.mark.parametrize("loss", ["all", "asked"])
def test_rows_predict_every_symbol_from_those_before(loss):
    source = {"name": "lookup", "pairs": 3, "queries": 2}
    dataset = build(source, length=12, loss=loss)
    row, item = dataset.example(3), Lookup("train", pairs=3, queries=2)[3]
    ids = [TOKENIZER.encode(str(i))[0] for i in item["symbols"]]
    assert row["tokens"].tolist() == [TOKENIZER.bos_id, *ids[:-1], 0, 0] and row["targets"].tolist() == [*ids, 0, 0]
    assert row["input_mask"].tolist() == [True] * 10 + [False] * 2
    told = [False] * 7 + [True, False, True]
    assert (row["loss_mask"][:10] > 0).tolist() == (told if loss == "asked" else [True] * 10)
    assert row["loss_mask"][10:].sum() == 0
    asked = dataset.asked(3)
    np.testing.assert_array_equal(asked["shots"] == 3, [*told, False, False])
    assert set(asked) == {*row, "shots"}
    blank = data.blank({"name": "in_context", "source": source}, layout=Layout(12), tokenizer=TOKENIZER)
    assert {k: getattr(v, "shape", v) for k, v in blank.items()} == {k: getattr(v, "shape", v) for k, v in row.items()}


@pytest.mark.parametrize(
    "source, words",
    [
        ({"name": "repeated", "least": 49}, "block=48 must be at least least=49"),
        ({"name": "repeated", "distinct": True}, "block=48 .* with distinct=True at most symbols=32"),
        ({"name": "repeated", "copies": 1}, "copies=1 must be a whole number >= 2"),
        ({"name": "repeated", "block": 49}, "have 98 symbols, config.data.length is 96"),
        ({"name": "lookup", "queries": 9}, "pairs=8 must be at least queries=9 and at most keys=16"),
        ({"name": "functions", "numbers": 9}, "numbers=9 must be a prime for the family 'affine'"),
        ({"name": "functions", "family": "afine"}, "unknown family 'afine' .*did you mean 'affine'"),
        ({"name": "functions", "functions": 90}, "leaves 88 for training; .*functions=90 must be at most 88"),
        ({"name": "functions", "held_out": 0.0}, "held_out=0.0 of the 110 functions a x . b leaves 110"),
        ({"name": "functions", "examples": 12, "distinct": True}, "examples=12 .* are more than numbers=11"),
        ({"name": "functions", "numbers": 17}, "needs a token for each of 34 numbers|symbol '32'"),
        ({"name": "stdlib", "limit": 1}, "source 'stdlib' gives no symbols; use repeated, lookup or functions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(source, words):
    with pytest.raises(UserError, match=words):
        build(source)


def test_numbers_that_are_no_tokens_are_refused():
    with pytest.raises(UserError, match="needs a token for each of 32 numbers: config.tokenizer={'name': 'symbols'"):
        build({"name": "lookup"}, tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="unknown loss 'answer' in dataset 'in_context'"):
        build({"name": "lookup"}, loss="answer")
