import pytest

from vfm import tokenizers
from vfm.errors import UserError


def test_characters():
    tokenizer = tokenizers.build({"name": "symbols", "symbols": "0123456789+="})
    assert tokenizer.vocab_size == 3 + 12
    ids = tokenizer.encode("10+9=")
    assert ids == [4, 3, 13, 12, 14]
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "10+9="
    assert tokenizer.encode("<bos>1", allow_special=True) == [1, 4]


def test_words_and_numbers_are_single_tokens():
    tokenizer = tokenizers.build({"name": "symbols", "numbers": 12, "symbols": ("+", "="), "separator": " "})
    ids = tokenizer.encode("10 + 1 =")
    assert ids == [13, 15, 4, 16]
    assert tokenizer.decode(ids) == "10 + 1 ="
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in [1, *ids, 2]) + stream.finish() == "10 + 1 ="


def test_the_longest_symbol_first():
    tokenizer = tokenizers.SymbolTokenizer(symbols=("a", "ab", "b"))
    assert tokenizer.encode("abab") == [4, 4]
    assert tokenizer.encode("aab") == [3, 4]


@pytest.mark.parametrize(
    "fields, text, message",
    [
        ({"symbols": ""}, "", "not empty"),
        ({"symbols": "aa"}, "", "'a' is named twice"),
        ({"symbols": ("1",), "numbers": 2}, "", "'1' is named twice"),
        ({"symbols": ("a b",), "separator": " "}, "", "inside the symbol"),
        ({"symbols": "ab"}, "abc", "unknown symbol 'c'"),
        ({"symbols": "ab", "separator": " "}, "a ab", "unknown symbol 'ab'"),
        ({"numbers": -1}, "", "numbers=-1"),
    ],
    ids=str,
)
def test_refusals(fields, text, message):
    with pytest.raises(UserError, match=message):
        tokenizers.build({"name": "symbols", **fields}).encode(text)
