import pickle
import random

import numpy as np
import pytest

from tests.tokenizers.texts import STRINGS, code_points, mixed
from vfm import tokenizers
from vfm.errors import UserError
from vfm.tokenizers import bpe, split
from vfm.tokenizers.bpe import BPE, Merges, byte_characters, merge, merge_long, to_characters

TEXT = mixed(40_000, seed=1)


@pytest.fixture(scope="module", params=["gpt2", "cl100k"])
def tokenizer(request):
    return tokenizers.train_bpe([TEXT], vocab_size=1000, pattern=request.param)


def naive(ids, ranks, result):
    """The definition: the leftmost of the neighbours of lowest rank, again and again."""
    ids = list(ids)
    while True:
        known = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        if not known:
            return ids
        rank, i = min(known)
        ids[i : i + 2] = [result[rank]]


def test_merging_is_the_definition():
    rng = random.Random(0)
    for case in range(300):
        letters = rng.randrange(1, 5)
        pairs, result, size = [], [], letters
        for _ in range(rng.randrange(12)):
            pair = rng.randrange(size), rng.randrange(size)
            if pair not in pairs:
                pairs.append(pair)
                result.append(size)
                size += 1
        order = rng.sample(range(len(pairs)), len(pairs))  # ranks need not be in the order in which tokens were made
        pairs, result = [pairs[i] for i in order], [result[i] for i in order]
        ids = [rng.randrange(letters) for _ in range(rng.randrange(40) * (20 if case % 10 == 0 else 1))]
        expected = naive(ids, {pair: rank for rank, pair in enumerate(pairs)}, result)
        assert merge(list(ids), Merges(pairs, result)) == expected
        found, starts = merge_long(ids, Merges(pairs, result))
        assert found == expected
        assert starts == sorted(set(starts)) and len(starts) == len(expected) and starts[:1] == [0][: len(ids)]


def test_round_trip_of_random_bytes_and_text(tokenizer):
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 100, 5000):
        for _ in range(20):
            data = rng.bytes(size)
            assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    data = bytes(range(256)) * 3
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    for text in (*STRINGS, TEXT, *(code_points(seed, 50) for seed in range(50))):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == tokenizer.encode(text.encode())


def test_long_words_take_no_quadratic_time(tokenizer):
    rng = random.Random(0)
    text = "".join(
        rng.choice(("return", "self", "import", "x")) for _ in range(50_000)
    )  # one word; hours if it were so
    ids = tokenizer.encode(text)
    assert len(ids) < len(text) and tokenizer.decode(ids) == text


def test_long_text_in_blocks(tokenizer, monkeypatch):
    expected = tokenizer.encode(TEXT)
    monkeypatch.setattr(tokenizers.tokenizer, "BLOCK", 1000)
    monkeypatch.setattr(split, "BLOCK", 1000)
    monkeypatch.setattr(split.Splitter.blocks, "__defaults__", (1000,))
    assert tokenizer.encode(TEXT) == expected


def test_special_tokens_cannot_be_forged_unless_allowed(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    text = "a<eos> b<bos>"
    ids = tokenizer.encode(text)
    assert min(ids) > 2 and tokenizer.decode(ids) == text
    assert tokenizer.encode(text, allow_special=["<eos>"]) == [
        *tokenizer.encode("a"), 2, *tokenizer.encode(" b<bos>")
    ]  # fmt: skip
    allowed = tokenizer.encode(text, allow_special=True)
    assert allowed.count(2) == allowed.count(1) == 1
    assert tokenizer.decode(allowed) == "a b" and tokenizer.decode(allowed, keep_special=True) == text
    with pytest.raises(UserError, match="did you mean '<eos>'"):
        tokenizer.encode(text, allow_special=["<eoss>"])


def test_of_special_tokens_that_begin_alike_the_longest_counts(tokenizer):
    more = tokenizer.with_special(("<e", "<e>x", "<e>"))
    names = ("<e>x", "<e", "<e>")
    assert more.encode("".join(names), allow_special=True) == [more.token_id(name) for name in names]


def test_special_tokens_are_added_behind_the_others(tokenizer):
    more = tokenizer.with_special(("<image>", "<eos>", "<audio>"))
    assert more.vocab_size == tokenizer.vocab_size + 2
    assert more.token_id("<image>") == tokenizer.vocab_size and more.token_id("<eos>") == 2
    assert more.encode(TEXT) == tokenizer.encode(TEXT)
    assert more.decode([more.token_id("<audio>"), *tokenizer.encode("x")]) == "x"
    with pytest.raises(UserError, match="did you mean '<image>'"):
        more.token_id("<imag>")


def test_offsets_give_back_the_characters(tokenizer):
    for text in (*STRINGS, *(code_points(seed, 50) for seed in range(50))):
        ids, spans = tokenizer.encode_offsets(text)
        assert ids == tokenizer.encode(text)
        assert len(spans) == len(ids)
        for i, (start, end) in zip(ids, spans):
            assert tokenizer.decode_bytes([i]) in text[start:end].encode()
        assert spans == sorted(spans)
        assert {i for start, end in spans for i in range(start, end)} == set(range(len(text)))


def test_streaming_gives_whole_characters(tokenizer):
    for text in ("naïve 数字 🎈👩‍👧 x", *STRINGS):
        stream, out = tokenizer.stream(), []
        for i in tokenizer.encode(text):
            out.append(stream.push(i))
            assert "\ufffd" not in out[-1]
        assert "".join(out) + stream.finish() == text
    rng = np.random.default_rng(1)
    for _ in range(50):
        ids = rng.integers(0, tokenizer.vocab_size, 60).tolist()
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    half = tokenizer.encode("🎈".encode()[:2])
    stream = tokenizer.stream()
    assert "".join(map(stream.push, half)) == "" and stream.finish() == "\ufffd"


def test_batches_with_and_without_workers(tokenizer):
    texts = [*STRINGS, b"\xff\xfe", TEXT[:5000]] * 10
    expected = [tokenizer.encode(text) for text in texts]
    assert list(tokenizer.encode_batch(texts)) == expected
    assert list(tokenizer.encode_batch(iter(texts), workers=2, allow_special=True)) == [
        tokenizer.encode(text, allow_special=True) for text in texts
    ]


def test_a_copy_encodes_alike_and_has_an_empty_cache(tokenizer):
    tokenizer.encode(TEXT)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert not copy.model.cache and tokenizer.model.cache
    assert copy.encode(TEXT) == tokenizer.encode(TEXT)


def test_the_cache_is_bounded_and_changes_nothing(tokenizer, monkeypatch):
    expected = tokenizer.encode(TEXT)
    copy = pickle.loads(pickle.dumps(tokenizer))
    monkeypatch.setattr(bpe, "_REMEMBERED", 50)
    assert copy.encode(TEXT) == expected
    assert len(copy.model.cache) <= 50


def test_a_word_of_the_vocabulary_is_one_token_but_its_parts_are_merged():
    """ignore_merges looks up whole words only: not the parts into which a long one is cut."""
    base = {char: i for i, char in enumerate(byte_characters())}
    whole = to_characters("你".encode())  # a token that no merge makes
    model = BPE(base | {whole: 256}, [], ignore_merges=True)
    assert model.cache["你"] == (256,)
    assert model.cache["你你你"] == tuple(base[char] for char in whole * 3)


def test_unknown_characters():
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    model = BPE(vocab, [("a", "b")], byte_level=False, unk_token="<unk>")
    assert model.cache["abxya"] == (3, 0, 0, 1)
    assert BPE(vocab, [("a", "b")], byte_level=False, unk_token="<unk>", fuse_unk=True).cache["abxya"] == (3, 0, 1)
    assert BPE(vocab, [("a", "b")], byte_level=False).cache["axb"] == (3,)
    full = vocab | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    model = BPE(full, [("a", "b")], byte_level=False, byte_fallback=True)
    assert model.cache["é"] == tuple(4 + byte for byte in "é".encode())
    assert model.encode_spans(["aéb"]) == [([1, 4 + 0xC3, 4 + 0xA9, 2], [(0, 1), (1, 2), (1, 2), (2, 3)])]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda t: t.encode("x\ud800y"), ("surrogate", "position 1", "U+D800")),
        (lambda t: t.encode(3), ("int",)),
        (lambda t: t.decode([5, 1000]), ("1000", "vocabulary of 1000")),
        (lambda t: t.decode([-1]), ("-1", "vocabulary of 1000")),
        (lambda t: t.stream().push(10**6), ("1000000", "vocabulary")),
        (lambda t: BPE({c: i for i, c in enumerate(byte_characters())}, [("a", "b")]), ("merge 1", "'ab'")),
        (lambda t: BPE({"a": 0}, [], byte_level=False, unk_token="<unk>"), ("unk_token", "<unk>")),
        (lambda t: tokenizers.Tokenizer(t.model).eos_id, ("no token for the end", "special=")),
    ],
)
def test_bad_input_is_told_in_one_line(tokenizer, make, words):
    with pytest.raises(UserError) as error:
        make(tokenizer)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def agree_with_libraries(text: str, vocab_size: int, pattern: str):
    hf, tiktoken = pytest.importorskip("tokenizers"), pytest.importorskip("tiktoken")
    ours = tokenizers.train_bpe([text[: len(text) // 2]], vocab_size=vocab_size, pattern=pattern, special=())
    theirs = hf.Tokenizer.from_str(tokenizers.formats.dumps(ours))
    ranks = {ours.decode_bytes([i]): i for i in range(ours.vocab_size)}
    third = tiktoken.Encoding("x", pat_str=split.PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    assert ids == third.encode_ordinary(text)
    assert ours.decode(ids) == text


@pytest.mark.parametrize("pattern", split.PATTERNS)
def test_ids_on_a_megabyte_of_mixed_text(pattern):
    agree_with_libraries(mixed(1_000_000, seed=5), 3000, pattern)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", split.PATTERNS)
def test_ids_on_ten_megabytes_of_mixed_text(pattern):
    agree_with_libraries(mixed(10_000_000, seed=6), 8192, pattern)
