"""Rows of every corruption: nothing is lost, nothing is longer than its row, and the special tokens are right."""

import json
import pickle

import numpy as np
import pytest

from vfm.data import build
from vfm.data.corrupted import CORRUPTIONS, DECODER, Vocabulary
from vfm.data.interleave import Layout, Modality
from vfm.data.pipeline import Pipeline, rng
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", "<cls>", "<sep>", "<smask>", "<gmask>", "<start>", "<end>")
TOKENIZER = ByteTokenizer((*SPECIAL, *(f"<extra_id_{i}>" for i in range(20))))
ID = {name: TOKENIZER.token_id(name) for name in TOKENIZER.special}
BOS, EOS, MASK = ID["<bos>"], ID["<eos>"], ID["<mask>"]
SENTINELS = [ID[f"<extra_id_{i}>"] for i in range(20)]
LENGTH = 48
LEVELS = {"token": 0.5, "sentence": 0.3, "document": 0.2}
KINDS = [(name, method) for name, kind in CORRUPTIONS.items() for method in kind.packing]
every_kind = pytest.mark.parametrize("name, packing", KINDS)
every_name = pytest.mark.parametrize("name", CORRUPTIONS)


def texts(count=40, seed=0):
    """Documents of sentences of letters, of 3 to 120 bytes."""
    draw = np.random.default_rng(seed)
    word = lambda: "".join(map(chr, draw.integers(97, 123, draw.integers(1, 8))))
    sentence = lambda: " ".join(word() for _ in range(draw.integers(1, 6))) + "."
    return [" ".join(sentence() for _ in range(draw.integers(1, 6)))[: draw.integers(3, 120)] for _ in range(count)]


def dataset(tmp_path, documents, name, packing="", length=LENGTH, tokenizer=TOKENIZER, **fields):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    cfg = {
        "name": "text",
        "source": {"name": "jsonl", "paths": {"train": str(path)}},
        "packing": packing,
        "corruption": {"name": name, **fields},
    }
    layout = Layout(length, {"image": Modality((2,), 1)})
    return build(cfg, "train", layout=layout, tokenizer=tokenizer)


def original(name, piece):
    """The ids of a piece of text out of its corrupted form."""
    tokens, targets = piece["tokens"].tolist(), piece["targets"].tolist()
    if name == "text_infilling":
        return targets[1:-1]
    if name == "span_corruption":
        spans = {}
        for token in targets[:-1]:
            if token in SENTINELS:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        return [t for token in tokens[:-1] for t in spans.get(token, [token])]
    if name == "blank_infilling":
        size, blanks = int(piece["prefix"].sum()), {}
        for at, target in list(zip(piece["positions"].tolist(), targets))[size:]:
            blanks.setdefault(at, []).append(target)
        assert all(blank.pop() == ID["<end>"] for blank in blanks.values())
        return [t for at, token in enumerate(tokens[:size]) for t in blanks.get(at, [token])][1:]
    if name in ("masked", "permutation"):
        return targets
    if name == "sentence_pairs":  # of SOP
        a, b = (targets[: tokens.index(ID["<sep>"])], targets[tokens.index(ID["<sep>"]) : -1])
        return [*b[1:], *a[1:]] if piece["label"] else [*a[1:], *b[1:]]
    return tokens


def pieces(row):
    """The arrays of each piece of a row, of the decoder too."""
    segments = row.get("segment_ids", row["input_mask"].astype(np.int32))
    for number in range(1, segments.max() + 1):
        mine, theirs = segments == number, row.get("decoder_segment_ids", segments) == number
        of_decoder = lambda key: key in DECODER or ("decoder_tokens" in row and key in ("targets", "loss_mask"))
        yield {
            key: array if array.ndim == 0 else array[theirs if of_decoder(key) else mine]
            for key, array in row.items()
            if not isinstance(array, dict)
        }


@every_kind
def test_no_token_is_lost_and_rows_are_well_formed(tmp_path, name, packing):
    documents = texts()
    fields = {"method": "sop"} if name == "sentence_pairs" else {"levels": LEVELS} if name == "blank_infilling" else {}
    found = dataset(tmp_path, documents, name, packing, **fields)
    kind, restored, used = found.corruption, {}, 0
    for index in range(len(found)):
        row = found.example(index, rng(0, index))
        assert found.keys <= row.keys() and row["inputs"]["image"].shape == (1, 2)
        size = kind.decoder_length if "decoder_tokens" in row else LENGTH
        assert size <= LENGTH
        for key, array in row.items():
            if isinstance(array, np.ndarray) and array.ndim:
                assert len(array) == (size if key in DECODER or key in ("targets", "loss_mask") else LENGTH), key
        assert (row["tokens"][~row["input_mask"]] == 0).all()
        padding = ~row.get("decoder_mask", row["input_mask"])
        assert (row["loss_mask"][padding] == 0).all() and row["loss_mask"].dtype == np.float32
        assert (np.diff(row["input_mask"].astype(int)) <= 0).all()  # padding is at the end
        if "segment_ids" in row:
            np.testing.assert_array_equal(row["segment_ids"] > 0, row["input_mask"])
        if "decoder_tokens" in row:
            np.testing.assert_array_equal(row["decoder_segment_ids"] > 0, row["decoder_mask"])
        planned = found.plan.row(index)
        assert packing != "none" or len(planned) == 1
        used += row["input_mask"].sum()
        for (document, start, length), piece in zip(planned, pieces(row), strict=True):
            for key in ("positions", "decoder_positions"):
                if key in piece and (key, name) != ("positions", "blank_infilling"):
                    np.testing.assert_array_equal(piece[key], np.arange(len(piece[key])))
            ids = original(name, piece)
            assert len(ids) == length
            restored.setdefault(document, {})[start] = ids
    whole = [sum((parts[start] for start in sorted(parts)), []) for _, parts in sorted(restored.items())]
    frame = ([BOS], [EOS]) if kind.framed else ([], [])
    expected = [[*frame[0], *TOKENIZER.encode(text), *frame[1]] for text in documents]
    for short, ids in zip(whole, expected, strict=True):
        assert short == ids[: len(short)] and len(ids) - len(short) < kind.least
    if packing != "none":
        assert used / (len(found) * LENGTH) > 0.6


@every_name
def test_a_row_is_a_function_of_its_index_and_its_generator(tmp_path, name):
    one, two = (dataset(tmp_path, texts(), name) for _ in range(2))
    two = pickle.loads(pickle.dumps(two))  # as it goes to a worker
    differs = False
    for index in reversed(range(len(one))):
        row, again, other = one.example(index, rng(1, 5)), two.example(index, rng(1, 5)), one.example(index, rng(2, 5))
        for key in {*row} - {"inputs", "starts", "signal_starts"}:
            np.testing.assert_array_equal(row[key], again[key])
            assert row[key].shape == other[key].shape and row[key].dtype == other[key].dtype
            differs |= bool((row[key] != other[key]).any())
    assert differs == (name != "next_token")
    batch = Pipeline(one, 4, seed=0).batch(0)
    assert batch["tokens"].shape == (4, LENGTH)


@pytest.mark.parametrize("name", ["masked", "permutation"])
@pytest.mark.parametrize("fields", [{}, {"unit": "word"}, {"unit": "span"}])
def test_special_tokens_are_never_predicted(tmp_path, name, fields):
    if fields and name == "permutation":
        return
    found = dataset(tmp_path, texts(), name, **fields)
    for index in range(len(found)):
        row = found.example(index, rng(0, index))
        assert not np.isin(row["targets"][row["loss_mask"] > 0], [BOS, EOS, 0]).any()
        assert not np.isin(row["tokens"], [*range(4, len(TOKENIZER.special))]).any()  # nor do others come in


def test_pairs_look_as_bert_wants_them(tmp_path):
    documents = [f"{letter * 9}. {letter * 5}." for letter in "ABCDEFGH"]
    found = dataset(tmp_path, documents, "sentence_pairs")
    labels = []
    for index in range(len(found)):
        for seed in range(100):
            row = found.example(index, rng(seed, index))
            size = int(row["input_mask"].sum())
            ids, types = row["targets"][:size], row["token_types"]
            ends = np.flatnonzero(ids == ID["<sep>"])
            assert ids[0] == ID["<cls>"] and len(ends) == 2 and ends[1] == size - 1
            np.testing.assert_array_equal(types, (np.arange(LENGTH) > ends[0]) & (np.arange(LENGTH) < size))
            a, b = ids[1 : ends[0]], ids[ends[0] + 1 : -1]
            same = set(TOKENIZER.decode(a)) & set(TOKENIZER.decode(b)) - set(". ") != set()
            assert row["label"].shape == () and same == (row["label"] == 0)
            assert TOKENIZER.decode(a).endswith(".") and TOKENIZER.decode(b).startswith(" ")
            labels.append(int(row["label"]))
            assert not row["loss_mask"][[0, *ends]].any() and set(row) >= {"tokens", "label"} and "positions" not in row
    assert np.mean(labels) == pytest.approx(0.5, abs=0.05)


def test_a_long_text_fills_the_rows_of_t5_exactly(tmp_path):
    tokenizer = ByteTokenizer(("<pad>", "<bos>", "<eos>", *(f"<extra_id_{i}>" for i in range(28))))
    found = dataset(tmp_path, ["x" * 568 * 3], "span_corruption", length=512, tokenizer=tokenizer)
    assert len(found) == 3
    row = found.example(1, rng(0, 0))
    assert row["input_mask"].all() and row["decoder_mask"].all() and row["targets"].shape == (114,)
    assert row["decoder_tokens"][0] == tokenizer.pad_id and row["tokens"][-1] == row["targets"][-1] == EOS
    np.testing.assert_array_equal(row["decoder_tokens"][1:], row["targets"][:-1])


def test_decoders_start_as_those_of_the_published_models(tmp_path):
    row = dataset(tmp_path, ["abcdefgh. ij"], "text_infilling").example(0, rng(0, 0))
    target = [BOS, *TOKENIZER.encode("abcdefgh. ij"), EOS]
    assert row["targets"][:14].tolist() == target and row["decoder_tokens"][:14].tolist() == [EOS, *target[:-1]]
    size = int(row["input_mask"].sum())
    assert row["tokens"][0] == BOS and row["tokens"][size - 1] == EOS and MASK in row["tokens"]
    # Without noise, only the order of the sentences changes.
    still = dataset(tmp_path, ["Abc. De"], "text_infilling", rate=1e-9)
    seen = {TOKENIZER.decode(still.example(0, rng(seed, 0))["tokens"]) for seed in range(20)}
    assert seen == {"Abc. De", " DeAbc."}
    still = dataset(tmp_path, ["Abc. De"], "text_infilling", rate=1e-9, permute_sentences=False)
    assert {TOKENIZER.decode(still.example(0, rng(seed, 0))["tokens"]) for seed in range(20)} == {"Abc. De"}


@pytest.mark.parametrize("level, mask", [("token", "<mask>"), ("sentence", "<smask>"), ("document", "<gmask>")])
def test_levels_of_blanks_have_their_masks(tmp_path, level, mask):
    found = dataset(tmp_path, ["one two. three four. five six."], "blank_infilling", levels={level: 1.0})
    row = found.example(0, rng(0, 0))
    part_a = row["tokens"][row["prefix"]]
    assert part_a[0] == BOS and {i for i in part_a.tolist() if i < len(TOKENIZER.special)} == {BOS, ID[mask]}
    part_b = row["tokens"][row["input_mask"] & ~row["prefix"]]
    assert (part_b == ID["<start>"]).sum() == (part_a == ID[mask]).sum() > 0
    if level == "sentence":
        blank = row["targets"][row["input_mask"] & ~row["prefix"]]
        assert {bytes(x) for x in TOKENIZER.decode_bytes(blank).split(b".")} <= {
            b"one two",
            b" three four",
            b" five six",
            b"",
        }
    if level == "document":
        assert part_a[-1] == ID[mask] and len(part_b) - 1 >= 15


class Words:
    """A tokenizer with pieces of several bytes, some of which are not whole characters."""

    pieces = [
        b"",
        b"Hel",
        b"lo",
        b" world",
        b".",
        b" \xe4\xbd",
        b"\xa0",
        b"\xe5\xa5\xbd",
        b"\xe3\x80\x82",
        b" caf",
        b"\xc3\xa9",
        b"\n\n",
    ]
    vocab_size = len(pieces)

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)


def test_words_and_sentences_begin_where_they_do():
    vocabulary = Vocabulary(Words())
    # <s> Hel lo " world" . " 你" (2) 好 。 " caf" é . \n\n Hel lo
    ids = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 4, 11, 1, 2]
    assert np.flatnonzero(vocabulary.sentence_starts(np.array(ids))).tolist() == [0, 5, 9, 12]
    assert np.flatnonzero(vocabulary.word_starts(np.array(ids))).tolist() == [0, 3, 4, 5, 7, 8, 9, 11, 12]
    assert vocabulary.text.tolist() == [False] + [True] * 11
    encoded = np.array(TOKENIZER.encode("Éa bc, d 你好。Ja! Nö"))
    found = Vocabulary(TOKENIZER).word_starts(encoded)
    words = np.split(encoded, np.flatnonzero(found)[1:])
    assert [TOKENIZER.decode(w) for w in words] == ["Éa", " bc", ",", " d", " 你", "好", "。", "Ja", "!", " Nö"]
    found = Vocabulary(TOKENIZER).sentence_starts(encoded)
    assert [TOKENIZER.decode(s) for s in np.split(encoded, np.flatnonzero(found)[1:])] == [
        "Éa bc, d 你好。",
        "Ja!",
        " Nö",
    ]
    half = encoded[1:]  # begins within a character
    np.testing.assert_array_equal(
        Vocabulary(TOKENIZER).word_starts(half)[2:], Vocabulary(TOKENIZER).word_starts(encoded)[3:]
    )


PLAIN = ByteTokenizer()


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("masked", {"tokenizer": PLAIN}, ("'masked'", "special tokens", "<mask>")),
        ("sentence_pairs", {"tokenizer": PLAIN}, ("<cls>, <sep>, <mask>",)),
        ("span_corruption", {"tokenizer": PLAIN, "length": 512}, ("<extra_id_0>, <extra_id_1>, … <extra_id_27> (28)",)),
        ("blank_infilling", {"tokenizer": PLAIN}, ("<start>, <end>, <mask>",)),
        ("blank_infilling", {"levels": {"word": 1.0}}, ("'word'", "sentence")),
        ("blank_infilling", {"levels": {"token": 0.0}}, ("positive weight",)),
        ("blank_infilling", {"rate": 0.7}, ("rate=0.7", "at most 0.5")),
        ("masked", {"rate": 0.0}, ("rate=0.0", "above 0")),
        ("masked", {"rates": 0.1}, ("'rates'", "did you mean 'rate'")),
        ("masked", {"unit": "words"}, ("'words'", "did you mean 'word'")),
        ("mask", {}, ("'mask'", "did you mean 'masked'")),
        ("span_corruption", {"mean_span": 0.5}, ("mean_span=0.5", "at least 1")),
        ("span_corruption", {"sentinel": "<extra>"}, ("sentinel='<extra>'", "{}")),
        ("span_corruption", {"length": 2}, ("at least 3 positions", "data.length is 2")),
        ("text_infilling", {"length": 3}, ("at least 4 positions", "data.length is 3")),
        ("text_infilling", {"packing": "split"}, ("'split'", "text_infilling", "first_fit, none")),
        ("sentence_pairs", {"packing": "first_fit"}, ("'first_fit'", "none")),
        ("sentence_pairs", {"method": "nps"}, ("'nps'", "did you mean 'nsp'")),
        ("sentence_pairs", {"documents": ["only one."]}, ("2 document(s)", "has 1")),
        ("span_corruption", {"documents": ["a", ""]}, ("1 document(s) of 2 token(s)", "has 0")),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, name, fields, words):
    fields = {"documents": texts(3), **fields}
    with pytest.raises(UserError) as error:
        dataset(tmp_path, name=name, **fields)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_mixtures(tmp_path):
    dataset(tmp_path, texts(), "prefix_lm")
    child = {"name": "text", "source": {"name": "jsonl", "paths": {"train": str(tmp_path / "corpus.jsonl")}}}
    mix = lambda *names: {
        "name": "mixture",
        "datasets": {name: child | {"corruption": {"name": name}} for name in names},
        "weights": dict.fromkeys(names, 1.0),
    }
    build_mix = lambda cfg: build(cfg, "train", layout=Layout(LENGTH), tokenizer=TOKENIZER)
    found = build_mix(mix("next_token", "prefix_lm", "blank_infilling"))
    batch = Pipeline(found, 9, seed=0).batch(0)
    assert batch["prefix"].dtype == bool and batch["block_positions"].dtype == np.int32
    assert {bool(row.any()) for row in batch["prefix"]} == {True, False}
    with pytest.raises(UserError, match="'next_token' has no decoder_.*, which another one has"):
        build_mix(mix("next_token", "span_corruption"))
