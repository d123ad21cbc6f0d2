import numpy as np
import pytest

from vfm.errors import UserError
from vfm.tokenizers import build
from vfm.tokenizers.byte import ByteTokenizer

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")


def test_round_trip_of_random_bytes_and_text():
    tokenizer = build({"name": "byte", "special": SPECIAL})
    data = np.random.default_rng(0).bytes(5000) + bytes(range(256))
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert min(ids) == len(SPECIAL) and max(ids) == tokenizer.vocab_size - 1 == 259
    for text in ("", "naïve 数字 🎈 <image>", "a\x00b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_specials_are_skipped_and_cannot_be_forged():
    tokenizer = ByteTokenizer(SPECIAL)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.token_id("<image>") == 3
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 3, 2, 0]) == "hi"
    assert all(i >= len(SPECIAL) for i in tokenizer.encode("<image>"))
    assert tokenizer.decode([len(SPECIAL) + 0xFF]) == "\ufffd"


def test_streaming_gives_whole_characters():
    tokenizer = ByteTokenizer(SPECIAL)
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in [1, *tokenizer.encode("é🎈"), 2, len(SPECIAL) + 0xE4]]
    assert parts == ["", "", "é", "", "", "", "🎈", "", ""] and stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ByteTokenizer(SPECIAL).token_id("<imagee>"), ("<imagee>", "did you mean '<image>'")),
        (lambda: ByteTokenizer(("<bos>", "<pad>", "<eos>")), ("special", "<pad>")),
        (lambda: ByteTokenizer((*SPECIAL, "<image>")), ("twice",)),
        (lambda: ByteTokenizer().decode([259]), ("259", "vocabulary")),
        (lambda: build({"name": "bytes"}), ("'bytes'", "did you mean 'byte'")),
        (lambda: build({"name": "byte", "specials": ()}), ("specials", "did you mean 'special'")),
        (lambda: build({"special": ()}), ("no `name`",)),
    ],
)
def test_bad_input_is_told_in_one_line(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
