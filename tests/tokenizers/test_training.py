import collections
import gzip
import itertools
import json
import random

import jax
import pytest

from tests import tiny
from tests.tokenizers.texts import mixed
from vfm import tokenizers
from vfm.data.records import CorruptRecord
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.tokenizers import corpus, learning, split, training
from vfm.tokenizers.learning import learn
from vfm.tokenizers.split import Splitter
from vfm.tokenizers.training import count_words

TEXT = mixed(300_000, seed=2)
DOCUMENTS = TEXT.split("\n\n")


def merges(tokenizer) -> list[tuple[str, str]]:
    return tokenizer.model.listed_merges()


@pytest.mark.parametrize("pattern", split.PATTERNS)
@pytest.mark.parametrize("min_frequency", [0, 7])
def test_merges_are_those_of_tokenizers(pattern, min_frequency):
    hf = pytest.importorskip("tokenizers")
    special = ["<pad>", "<bos>", "<eos>"]
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(split.PATTERNS[pattern]), "isolated"),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trainer = hf.trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=min_frequency, show_progress=False,
    )  # fmt: skip
    theirs.train_from_iterator(DOCUMENTS, trainer)
    written = json.loads(theirs.to_str())["model"]
    ours = tokenizers.train_bpe(DOCUMENTS, vocab_size=4000, pattern=pattern, min_frequency=min_frequency)
    assert merges(ours) == [tuple(pair) for pair in written["merges"]]
    assert ours.model.vocab == written["vocab"]
    assert len(ours.model.vocab) == 4000 or min_frequency


def naive(words, counts, size, steps):
    """The definition: count all pairs again before every merge."""
    words, found = [list(word) for word in words], []
    for new in range(size, size + steps):
        frequency = collections.Counter()
        for word, count in zip(words, counts):
            for pair in zip(word, word[1:]):
                frequency[pair] += count
        if not frequency:
            break
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        found.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
    return found


def numbering(first: int):
    """A new id for each pair, from `first` on."""
    ids, names = itertools.count(first), {}
    return lambda a, b: names.setdefault((a, b), next(ids))


def test_learning_is_the_definition():
    rng = random.Random(0)
    for _ in range(200):
        letters, size = rng.randrange(1, 5), rng.randrange(1, 12)
        words = [[rng.randrange(letters) for _ in range(rng.randrange(14))] for _ in range(size)]
        counts = [rng.randrange(1, 5) for _ in words]
        expected = naive(words, counts, letters, 15)
        assert learn(words, counts, letters + 15, numbering(letters)) == expected


@pytest.mark.parametrize("batch", [1000, 1 << 22])
def test_counting_in_workers_and_in_small_batches_changes_nothing(batch, monkeypatch):
    monkeypatch.setattr(training, "BATCH", batch)
    expected = collections.Counter(word for text in DOCUMENTS for word in Splitter("cl100k").findall(text))
    assert count_words(DOCUMENTS, Splitter("cl100k")) == expected
    if batch == 1000:
        assert count_words(iter(DOCUMENTS[:200]), Splitter("cl100k"), workers=2) == count_words(
            DOCUMENTS[:200], Splitter("cl100k")
        )


def test_texts_are_read_as_a_stream():
    held, most = 0, 0

    def stream():
        nonlocal held, most
        for _ in range(20):
            held += 1
            yield "word " * 200_000
            most = max(most, held)

    class Seen(Splitter):
        def findall(self, text):
            nonlocal held
            held = 0
            return super().findall(text)

    count_words(stream(), Seen("gpt2"))
    assert most <= 6  # texts that were asked for before earlier ones were counted


def test_files_are_read_in_parts_and_count_as_one_text(tmp_path, monkeypatch):
    text = TEXT + "\r\n\xff end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": part}) + "\n\n" for part in DOCUMENTS)
    monkeypatch.setattr(corpus, "BLOCK", 5000)
    monkeypatch.setattr(Splitter.blocks, "__defaults__", (3000,))
    for name in ("a.txt", "b.txt.gz"):
        for pattern in split.PATTERNS:
            parts = list(corpus.read([tmp_path / name], Splitter(pattern)))
            assert len(parts) > 20 and "".join(parts) == text
            words = [word for part in parts for word in Splitter(pattern).findall(part)]
            assert words == Splitter(pattern).findall(text)
    parts = list(corpus.read([tmp_path / "a.txt"], Splitter(r"\p{L}+|\P{L}")))
    assert "".join(parts) == text and all(part.endswith("\n") for part in parts[:-1])
    assert list(corpus.read([tmp_path / "c.jsonl.gz"], Splitter("gpt2"), field="body")) == DOCUMENTS


def test_bytes_that_are_not_text_are_learned_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff\xfe " * 50)
    texts = corpus.read([tmp_path / "a.txt"], Splitter("gpt2"))
    tokenizer = tokenizers.train_bpe(texts, vocab_size=262)
    assert tokenizer.encode(b"\xff\xfe\xff\xfe") == [tokenizer.vocab_size - 2]


def test_progress_is_reported(monkeypatch):
    monkeypatch.setattr(training, "EVERY", 0.0)
    monkeypatch.setattr(learning, "EVERY", 0.0)
    monkeypatch.setattr(training, "BATCH", 20_000)
    lines = []
    tokenizers.train_bpe(DOCUMENTS, vocab_size=300, report=lines.append)
    assert any("characters read" in line for line in lines) and any("merges" in line for line in lines)


def test_a_small_text_gives_a_small_vocabulary(caplog):
    tokenizer = tokenizers.train_bpe(["abab"], vocab_size=1000)
    assert tokenizer.vocab_size == 3 + 256 + 2 and "allow a vocabulary of 261, not 1000" in caplog.text
    assert merges(tokenizer) == [("a", "b"), ("ab", "ab")]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: tokenizers.train_bpe(["x"], vocab_size=258), ("vocab_size=258", "259")),
        (lambda: tokenizers.train_bpe([], vocab_size=300), ("empty",)),
        (lambda: tokenizers.train_bpe(["", ""], vocab_size=300), ("empty",)),
        (lambda: tokenizers.train_bpe([b"x"], vocab_size=300), ("bytes",)),
        (lambda: tokenizers.train_bpe(["x\ud800"], vocab_size=300), ("surrogate",)),
        (lambda: tokenizers.train_bpe(["x"], vocab_size=300, special=("<a>", "<a>")), ("twice", "<a>")),
        (lambda: tokenizers.train_bpe(["pad pad"], vocab_size=300, special=("pad",)), ("'pad'", "<pad>")),
        (lambda: tokenizers.train_bpe(["x"], vocab_size=300, pattern="gpt3("), ("gpt3(", "regular expression")),
        (lambda: list(corpus.read(["/nowhere.txt"], Splitter("gpt2"))), ("/nowhere.txt", "does not exist")),
    ],
)
def test_bad_input_is_told_in_one_line(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ("a.jsonl:2", "JSON")),
        ("a.jsonl", b'{"body": "x"}\n', ("a.jsonl:1", "'text'")),
        ("a.jsonl", b"[1]\n", ("a.jsonl:1", "'text'")),
        ("a.txt.gz", b"not gzip", ("a.txt.gz", "cannot read")),
        ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], ("a.txt.gz", "cannot read")),
    ],
)
def test_damaged_files_are_told_in_one_line(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        list(corpus.read([tmp_path / name], Splitter("gpt2")))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("skip", [False, True])
def test_a_run_trains_its_tokenizer_on_what_is_not_damaged(tmp_path, skip):
    lines = [json.dumps({"text": "the cat sat on the mat"})] * 4
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]) + "\n")
    config = tiny.get_config("text")
    with config.unlocked():
        config.tokenizer = {"name": "bpe", "vocab_size": 264, "path": ""}
        config.data.source = {"name": "jsonl", "paths": {"train": str(path)}}
    config.data.skip_corrupt = skip
    config.mesh.data = 1
    experiment = Experiment(config, jax.devices()[:1])
    experiment.folder = tmp_path
    if skip:
        assert experiment.tokenizer.vocab_size == 264
        assert experiment.tokenizer.encode("the cat") == tokenizers.load(tmp_path / "tokenizer").encode("the cat")
    else:
        with pytest.raises(CorruptRecord, match=r"texts\.jsonl:3"):
            _ = experiment.tokenizer
        assert not (tmp_path / "tokenizer").exists()
