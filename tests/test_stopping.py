import numpy as np
import pytest

from vfm.errors import UserError
from vfm.stopping import TextStream, automaton, cut, stop_strings, stop_tokens
from vfm.tokenizers.byte import ByteStream, ByteTokenizer


class Pieces:
    """A tokenizer whose tokens are any bytes, also parts of characters."""

    def __init__(self, *pieces: str | bytes):
        self.pieces = [p.encode() if isinstance(p, str) else p for p in pieces]
        self.vocab_size = len(pieces)

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self):
        return ByteStream(self)


def found_after(table, tokens):
    """After how many tokens the automaton has found one of its sequences; None: it has not."""
    state = 0
    for count, token in enumerate(tokens, start=1):
        state = table[state, token]
        if state == len(table) - 1:
            return count
    return None


def test_the_automaton_finds_what_a_plain_search_finds():
    """Few symbols, so that sequences overlap themselves and each other."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        pieces = [tuple(rng.integers(0, 3, rng.integers(0, 4))) for _ in range(5)]
        sequences = [tuple(rng.integers(0, 3, rng.integers(1, 6))) for _ in range(rng.integers(1, 4))]
        tokens = rng.integers(0, 5, 12)
        text, expected = [], None
        for count, token in enumerate(tokens, start=1):
            text += pieces[token]
            if any(tuple(text[i : i + len(s)]) == s for s in sequences for i in range(len(text) - len(s) + 1)):
                expected = count
                break
        assert found_after(automaton(sequences, pieces), tokens) == expected
        found += expected is not None
    assert 100 < found < 290


def test_token_sequences_and_strings():
    table = stop_tokens([(3, 4), (4, 4, 5)], 7)
    assert found_after(table, [3, 3, 4]) == 3 and found_after(table, [4, 4, 4, 5]) == 4
    assert found_after(table, [3, 5, 4, 6]) is None
    words = Pieces("a", "ab", "bc", "b\n", "\n\n", "ü".encode()[:1], "ü".encode()[1:])
    assert found_after(stop_strings(["abb"], words, 9), [0, 1, 2]) == 3  # "aab" + "bc", across three tokens
    assert found_after(stop_strings(["\n\n"], words, 9), [3, 3, 4]) == 3
    assert found_after(stop_strings(["ü"], words, 9), [6, 5, 8, 6]) == 4  # id 8 stands for nothing
    with pytest.raises(UserError, match="empty sequence"):
        stop_tokens([()], 7)


def test_text_is_cut_where_the_first_stop_is_complete():
    assert cut("abcdef", ["cd"]) == "ab" and cut("abcdef", ["x"]) == "abcdef"
    assert cut("abcdef", ["ef", "bcd"]) == "a"
    assert cut("abcdef", ["bcde", "d"]) == "abc"  # "d" is complete before "bcde"
    assert cut("abcdef", ["d", "bcd"]) == "a"  # both end together: the longer
    assert cut("abcabc", ["c"]) == "ab"


def test_a_stream_of_text_is_the_text():
    """Characters and stop strings are cut anywhere; the pieces never have to be taken back."""
    rng = np.random.default_rng(1)
    alphabet = ["a", "b", "\n", "é", "語", "🙂"]
    stopped = 0
    for _ in range(300):
        data = "".join(rng.choice(alphabet, 12)).encode()
        if rng.random() < 0.2:
            data = data[int(rng.integers(1, 4)) :]  # begins inside a character, perhaps
        places = np.sort(rng.choice(np.arange(1, len(data)), 6, replace=False))
        tokenizer = Pieces(*(bytes(part) for part in np.split(np.frombuffer(data, np.uint8), places)))
        stops = ["".join(rng.choice(alphabet, rng.integers(1, 4))) for _ in range(2)]
        stream = TextStream(tokenizer, stops)
        pieces = []
        for token in range(tokenizer.vocab_size):
            pieces.append(stream.push(token))
            so_far = tokenizer.decode(range(token + 1))
            assert so_far.startswith("".join(pieces)) or stream.stopped
        text = "".join(pieces) + stream.finish()
        assert text == cut(tokenizer.decode(range(tokenizer.vocab_size)), stops)
        stopped += stream.stopped and text != tokenizer.decode(range(tokenizer.vocab_size))
    assert 50 < stopped < 290


def test_what_is_certain_comes_at_once():
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, ["\nend"])
    pieces = [stream.push(token) for token in tokenizer.encode("é x\ne")]
    assert pieces == ["", "é", " ", "x", "", ""]
    assert stream.push(tokenizer.eos_id) == "" and stream.finish() == "\ne"
