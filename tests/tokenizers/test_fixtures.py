"""Every string of the reference fixtures: ids, offsets and decoded text of the libraries that wrote them."""

import pytest

from tests.tokenizers.texts import FIXTURES, references
from vfm import tokenizers

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="no ../shared/fixtures/tokenizers")


def streamed(tokenizer, ids, **options) -> str:
    stream = tokenizer.stream(**options)
    return "".join(map(stream.push, ids)) + stream.finish()


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("folder", ["bpe_1024", "bpe_2048"])
def test_byte_level_bpe(folder, file):
    tokenizer = tokenizers.load(FIXTURES / folder / file)
    cases = references(folder)
    assert len(cases) == 300
    for case in cases:
        text, ids = case["text"], case["ids"]
        assert tokenizer.encode(text, allow_special=True) == ids
        offsets = [tuple(span) for span in case["offsets"]]
        assert tokenizer.encode_offsets(text, allow_special=True) == (ids, offsets)
        assert (
            tokenizer.decode(ids, keep_special=True) == streamed(tokenizer, ids, keep_special=True) == case["decoded"]
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "folder, pattern, special",
    [("tiktoken_gpt2_pattern", "gpt2", 1024), ("tiktoken_cl100k_pattern", "cl100k", 2047)],
)
def test_tiktoken(folder, pattern, special):
    tokenizer = tokenizers.load(FIXTURES / folder, pattern=pattern, special={"<|endoftext|>": special})
    assert tokenizer.vocab_size == special + 1
    for case in references(folder):
        allowed, ordinary = case["ids_specials_allowed"], case["ids_ordinary"]
        assert tokenizer.encode(case["text"], allow_special=True) == allowed
        assert tokenizer.encode(case["text"]) == ordinary
        assert tokenizer.decode(allowed, keep_special=True) == tokenizer.decode(ordinary) == case["decoded"]


@pytest.mark.parametrize("folder", ["sentencepiece_bpe", "sentencepiece_unigram"])
def test_sentencepiece(folder):
    tokenizer = tokenizers.load(FIXTURES / folder)
    for case in references(folder):
        assert tokenizer.encode(case["text"]) == tokenizer.encode_offsets(case["text"])[0] == case["ids"]
        assert tokenizer.encode(case["text"], add_special=True) == case["ids_bos_eos"]
        assert tokenizer.decode(case["ids"]) == streamed(tokenizer, case["ids"]) == case["decoded"]


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_wordpiece(file):
    tokenizer = tokenizers.load(FIXTURES / "wordpiece" / file)
    options = {"allow_special": True, "add_special": True}
    for case in references("wordpiece"):
        assert tokenizer.encode(case["text"], **options) == case["ids"]
        assert tokenizer.encode_offsets(case["text"], **options)[0] == case["ids"]
    for case in references("wordpiece", "pair_references.json"):
        ids, types = tokenizer.encode_pair(case["text"], case["pair"], allow_special=True)
        assert (ids, types) == (case["ids"], case["type_ids"])


@pytest.mark.parametrize("folder, pad, bos, eos", [("sentencepiece_bpe", 2, 1, 2), ("sentencepiece_unigram", 0, 1, 1),
                                                   ("wordpiece", 0, 2, 3), ("bpe_2048", 0, 0, 0)])  # fmt: skip
def test_names_of_special_tokens(folder, pad, bos, eos):
    tokenizer = tokenizers.load(FIXTURES / folder)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (pad, bos, eos)


@pytest.mark.parametrize("folder", ["sentencepiece_bpe", "sentencepiece_unigram"])
def test_random_text_as_sentencepiece(folder):
    library = pytest.importorskip("sentencepiece")
    import random

    from tests.tokenizers.texts import STRINGS, code_points, mixed

    theirs = library.SentencePieceProcessor(str(FIXTURES / folder / "tokenizer.model"))
    ours = tokenizers.load(FIXTURES / folder)
    rng = random.Random(0)
    runs = ["".join(rng.choice("=-# a") for _ in range(rng.randrange(80))) for _ in range(200)]
    for text in [*STRINGS, *runs, *(code_points(i, 60) for i in range(100)), mixed(100_000)]:
        assert ours.encode(text) == theirs.encode(text), text
    for _ in range(300):
        ids = [rng.randrange(len(theirs)) for _ in range(rng.randrange(30))]
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ids)
