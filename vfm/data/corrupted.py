"""Pretraining examples out of a piece of text: which special tokens, how much room, which arrays.

A corruption is an entry of `CORRUPTIONS`, chosen by `data.corruption.name` of the data set `text`. It declares

    framed     whether documents reach it as <bos> text <eos>, or as bare text
    packing    the packing methods that it allows, its default first
    keys       the arrays that it adds to a row
    least      the fewest tokens of a piece
    documents  how many documents it needs

and `room(n)`, the positions that a piece of n tokens takes at most. `corruption(piece, rng)` gives the arrays of one
piece by the names of the batch; a row has `decoder_length` positions of the decoder, if it has one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vfm.data import corruption
from vfm.data.prepare import segment
from vfm.errors import UserError, unknown

PACKED = frozenset({"segment_ids", "positions"})
DECODER = frozenset({"decoder_tokens", "decoder_mask", "decoder_segment_ids", "decoder_positions"})
FRAMED, BARE = ("split", "first_fit", "none"), ("first_fit", "none")


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a corruption gets: ids int[n]; following: the tokens behind each, one fewer at the end of a document.

    other: rng -> the tokens of another document.
    """

    ids: np.ndarray
    following: np.ndarray
    other: Callable[[np.random.Generator], np.ndarray]


class Vocabulary:
    """What the bytes of a tokenizer's ids say: which ids are text, where words and sentences begin."""

    def __init__(self, tokenizer):
        ids = range(tokenizer.vocab_size)
        # Behind another token, for some tokenizers leave out the space in front of a text.
        before = next(i for i in ids if tokenizer.decode_bytes([i]))
        skip = len(tokenizer.decode_bytes([before]))
        self.pieces = [tokenizer.decode_bytes([before, i])[skip:] for i in ids]
        self.sizes = np.array([len(piece) for piece in self.pieces])
        self.text = self.sizes > 0  # special tokens decode to nothing
        self.text_ids = np.flatnonzero(self.text)

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """bool[n], True where a word begins in a token, with the spaces before it; punctuation is a word as well."""

        def boundaries(text):
            found, at = [], 0
            for word in segment.words(text, "characters"):
                at = text.index(word, at)
                found += [len(text[:at].rstrip()), at := at + len(word)]
            return found

        return self._begins(ids, boundaries)

    def sentence_starts(self, ids: np.ndarray) -> np.ndarray:
        """bool[n], True at the first token of each sentence, with the spaces before it."""

        def boundaries(text):
            at = 0
            return [at := text.index(sentence, at) + len(sentence) for sentence in segment.sentences(text)]

        return self._begins(ids, boundaries)

    def _begins(self, ids: np.ndarray, boundaries: Callable[[str], list[int]]) -> np.ndarray:
        """True at the first token that starts at a boundary of the text or behind it."""
        # Bytes that are no characters, such as the half of one at a cut, stay one place each.
        text = b"".join(self.pieces[i] for i in ids).decode("utf-8", "surrogateescape")
        at = np.asarray(boundaries(text), int)
        if not text.isascii():
            sizes = [len(char.encode("utf-8", "surrogateescape")) for char in text]
            at = np.concatenate([[0], np.cumsum(sizes)])[at]
        offsets = np.cumsum(self.sizes[ids]) - self.sizes[ids]
        found = np.zeros(len(ids), bool)
        found[:1] = True
        first = np.searchsorted(offsets, at)
        found[first[first < len(ids)]] = True
        return found


def special_ids(tokenizer, names: Sequence[str], kind: str) -> list[int]:
    """Ids of special tokens; UserError names all that the tokenizer lacks."""
    found, missing = [], []
    for name in names:
        try:
            found.append(tokenizer.token_id(name))
        except UserError:
            missing.append(name)
    if missing:
        some = ", ".join(missing) if len(missing) < 6 else f"{', '.join(missing[:2])}, … {missing[-1]} ({len(missing)})"
        raise UserError(f"corruption {kind!r} needs special tokens that the tokenizer does not have: {some}")
    return found


def capacity(room: Callable[[int], int], length: int, least: int, kind: str) -> int:
    """The most tokens n of a piece with room(n) <= length."""
    if room(least) > length:
        raise UserError(
            f"corruption {kind!r} needs rows of at least {room(least)} positions, but data.length is {length}"
        )
    n = least
    while room(n + 1) <= length:
        n += 1
    return n


def _share(kind: str, field: str, value: float, most: float = 1.0) -> float:
    if not 0 < value <= most:
        raise UserError(f"corruption {kind!r}: {field}={value} must be above 0 and at most {most:g}")
    return value


def _span(kind: str, value: float) -> float:
    if value < 1:
        raise UserError(f"corruption {kind!r}: mean_span={value} must be at least 1")
    return value


class NextToken:
    """No corruption: every token of a document <bos> text <eos> but its first is the target of the one before it."""

    name = "next_token"
    framed, packing, keys, least, documents = True, FRAMED, PACKED, 1, 1

    def __init__(self, *, length: int, tokenizer):
        pass

    def room(self, n: int) -> int:
        return n

    def __call__(self, piece: Piece, rng) -> dict:
        n, known = len(piece.ids), len(piece.following)
        return {
            "tokens": piece.ids.astype(np.int32),
            "targets": np.pad(piece.following, (0, n - known)).astype(np.int32),
            "loss_mask": (np.arange(n) < known).astype(np.float32),
        }


class MaskedLM:
    """BERT's masked tokens (`corruption.mask_tokens`) on packed documents <bos> text <eos>.

    unit: "token", "word" (whole-word masking) or "span".
    """

    name = "masked"
    framed, packing, keys, least, documents = True, FRAMED, PACKED, 1, 1

    def __init__(self, *, rate: float = 0.15, unit: str = "token", mask: str = "<mask>", length: int, tokenizer):
        self.rate, self.unit = _share(self.name, "rate", rate), unit
        if unit not in corruption.UNITS:
            raise unknown("unit", unit, corruption.UNITS, f"corruption {self.name!r}")
        (self.mask_id,) = special_ids(tokenizer, [mask], self.name)
        self.vocabulary = Vocabulary(tokenizer)

    def room(self, n: int) -> int:
        return n

    def __call__(self, piece: Piece, rng: np.random.Generator) -> dict:
        return self.masked(piece.ids, rng)

    def masked(self, ids: np.ndarray, rng: np.random.Generator) -> dict:
        return corruption.mask_tokens(
            ids,
            rng,
            mask_id=self.mask_id,
            random_ids=self.vocabulary.text_ids,
            maskable=self.vocabulary.text[ids],
            rate=self.rate,
            unit=self.unit,
            word_starts=self.vocabulary.word_starts(ids) if self.unit == "word" else None,
        )


class SentencePairs:
    """BERT's rows: <cls> A <sep> B <sep> with masked tokens, token types, and a label (`corruption.sentence_pair`).

    method: "nsp" (is B what follows A: label 0, or from another document: 1) or "sop" (in order: 0, swapped: 1).
    The other fields are those of `masked`.
    """

    name = "sentence_pairs"
    framed, packing, keys, least, documents = False, ("none",), frozenset({"token_types", "label"}), 2, 1
    methods = ("nsp", "sop")

    def __init__(
        self,
        *,
        method: str = "nsp",
        rate: float = 0.15,
        unit: str = "token",
        mask: str = "<mask>",
        cls: str = "<cls>",
        sep: str = "<sep>",
        length: int,
        tokenizer,
    ):
        if method not in self.methods:
            raise unknown("method", method, self.methods, f"corruption {self.name!r}")
        self.cls_id, self.sep_id, _ = special_ids(tokenizer, [cls, sep, mask], self.name)
        self.method = method
        self.documents = 2 if method == "nsp" else 1
        self.masked_lm = MaskedLM(rate=rate, unit=unit, mask=mask, length=length, tokenizer=tokenizer)

    def room(self, n: int) -> int:
        return n + 3

    def __call__(self, piece: Piece, rng: np.random.Generator) -> dict:
        sentence_starts = self.masked_lm.vocabulary.sentence_starts

        def other(rng):
            ids = piece.other(rng)
            return ids[corruption.split_in_two(sentence_starts(ids), rng) :]  # from the beginning of a sentence

        a, b, label = corruption.sentence_pair(
            piece.ids, sentence_starts(piece.ids), rng, method=self.method, other=other
        )
        ids = np.concatenate([[self.cls_id], a, [self.sep_id], b, [self.sep_id]])
        types = (np.arange(len(ids)) >= len(a) + 2).astype(np.int32)
        return {**self.masked_lm.masked(ids, rng), "token_types": types, "label": np.asarray(label, np.int32)}


class SpanCorruption:
    """T5's span corruption (`corruption.span_corruption`) for an encoder and a decoder.

    sentinel: how the sentinels are named. The decoder starts with <pad>, as T5 does.
    """

    name = "span_corruption"
    framed, packing, keys, least, documents = False, BARE, PACKED | DECODER, 2, 1

    def __init__(
        self,
        *,
        rate: float = 0.15,
        mean_span: float = 3.0,
        sentinel: str = "<extra_id_{}>",
        length: int,
        tokenizer,
    ):
        self.rate, self.mean_span = _share(self.name, "rate", rate), _span(self.name, mean_span)
        if "{}" not in sentinel:
            raise UserError(f"corruption {self.name!r}: sentinel={sentinel!r} must have {{}} where the number stands")
        most = capacity(lambda n: max(self._lengths(n)), length, self.least, self.name)
        self.length, self.decoder_length = length, self._lengths(most)[1]
        count = corruption.noise_counts(most, self.rate, self.mean_span)[1]
        self.sentinels = special_ids(tokenizer, [sentinel.format(i) for i in range(count)], self.name)
        self.start_id, self.eos_id = tokenizer.pad_id, tokenizer.eos_id

    def _lengths(self, n: int) -> tuple[int, int]:
        return corruption.span_corruption_lengths(n, self.rate, self.mean_span)

    def room(self, n: int) -> int:
        return _room(*self._lengths(n), self)

    def __call__(self, piece: Piece, rng: np.random.Generator) -> dict:
        inputs, targets = corruption.span_corruption(
            piece.ids, rng, sentinels=self.sentinels, eos_id=self.eos_id, rate=self.rate, mean_span=self.mean_span
        )
        return _sequence_to_sequence(inputs, targets, self.start_id)


class TextInfilling:
    """BART's noise for an encoder and a decoder that writes the text: sentence permutation, then text infilling.

    Both sequences are <bos> text <eos>; the decoder starts with <eos>, as BART's does.
    """

    name = "text_infilling"
    framed, packing, keys, least, documents = False, BARE, PACKED | DECODER, 1, 1

    def __init__(
        self,
        *,
        rate: float = 0.3,
        mean_span: float = 3.0,
        permute_sentences: bool = True,
        mask: str = "<mask>",
        length: int,
        tokenizer,
    ):
        self.rate, self.mean_span = _share(self.name, "rate", rate), _span(self.name, mean_span)
        self.permute = permute_sentences
        (self.mask_id,) = special_ids(tokenizer, [mask], self.name)
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        self.vocabulary = Vocabulary(tokenizer)
        most = capacity(lambda n: self._lengths(n)[0], length, self.least, self.name)
        self.length, self.decoder_length = length, self._lengths(most)[1]

    def _lengths(self, n: int) -> tuple[int, int]:
        # Where all spans have length 0, every one adds a mask.
        return n + 2 + corruption.infilling_spans(n, self.rate, self.mean_span), n + 2

    def room(self, n: int) -> int:
        return _room(*self._lengths(n), self)

    def __call__(self, piece: Piece, rng: np.random.Generator) -> dict:
        ids = piece.ids
        if self.permute:
            ids = corruption.permute_sentences(ids, self.vocabulary.sentence_starts(ids), rng)
        inputs = corruption.text_infilling(ids, rng, mask_id=self.mask_id, rate=self.rate, mean_span=self.mean_span)
        whole = lambda ids: np.concatenate([[self.bos_id], ids, [self.eos_id]])
        return _sequence_to_sequence(whole(inputs), whole(piece.ids), self.eos_id)


def _room(inputs: int, targets: int, kind: SpanCorruption | TextInfilling) -> int:
    """The positions of a row that a piece needs, so that pieces which fit by them fit into the decoder's row too."""
    return max(inputs, -(-targets * kind.length // kind.decoder_length))


def _sequence_to_sequence(inputs: np.ndarray, targets: np.ndarray, start_id: int) -> dict:
    return {
        "tokens": inputs.astype(np.int32),
        "decoder_tokens": np.concatenate([[start_id], targets[:-1]]).astype(np.int32),
        "decoder_mask": np.ones(len(targets), bool),
        "targets": targets.astype(np.int32),
        "loss_mask": np.ones(len(targets), np.float32),
    }


class BlankInfilling:
    """GLM's blank infilling (`corruption.blank_infilling`) behind a <bos>, for a decoder with a prefix.

    levels: {"token" | "sentence" | "document": weight}, which kind of blanks a piece gets; their masks are `mask`,
    `sentence_mask` and `document_mask` ([MASK], [sMASK], [gMASK]); each blank is between `start` and `end`.
    """

    name = "blank_infilling"
    framed, packing, keys, least, documents = False, BARE, PACKED | {"prefix", "block_positions"}, 1, 1

    def __init__(
        self,
        *,
        rate: float = 0.15,
        mean_span: float = 3.0,
        levels: Mapping[str, float] | None = None,
        mask: str = "<mask>",
        sentence_mask: str = "<smask>",
        document_mask: str = "<gmask>",
        start: str = "<start>",
        end: str = "<end>",
        length: int,
        tokenizer,
    ):
        self.rate, self.mean_span = _share(self.name, "rate", rate, 0.5), _span(self.name, mean_span)
        names = {"token": mask, "sentence": sentence_mask, "document": document_mask}
        levels = {"token": 1.0} if levels is None else levels
        for level in levels:
            if level not in names:
                raise unknown("level", level, names, f"corruption {self.name!r}")
        if not levels or min(levels.values()) < 0 or sum(levels.values()) <= 0:
            raise UserError(f"corruption {self.name!r}: levels={dict(levels)} must have a positive weight")
        self.levels = tuple(level for level, weight in levels.items() if weight)
        self.shares = np.array([levels[level] for level in self.levels]) / sum(levels.values())
        self.bos_id = tokenizer.bos_id
        self.start_id, self.end_id, *masks = special_ids(
            tokenizer, [start, end, *(names[level] for level in self.levels)], self.name
        )
        self.mask_ids = dict(zip(self.levels, masks))
        self.vocabulary = Vocabulary(tokenizer)

    def room(self, n: int) -> int:
        return n + 1 + 2 * self._most(n)

    def _most(self, n: int) -> int:
        return corruption.blank_count(n, self.rate, self.mean_span)

    def __call__(self, piece: Piece, rng: np.random.Generator) -> dict:
        n, level = len(piece.ids), self.levels[int(rng.choice(len(self.levels), p=self.shares))]
        if level == "token":
            spans = corruption.token_blanks(n, rng, self.rate, self.mean_span)
        elif level == "sentence":
            starts = self.vocabulary.sentence_starts(piece.ids)
            spans = corruption.sentence_blanks(starts, rng, self.rate, self._most(n))
        else:
            spans = corruption.document_blank(n, rng)
        ids = np.concatenate([[self.bos_id], piece.ids])
        return corruption.blank_infilling(
            ids, spans + [[1, 0]], rng, mask_id=self.mask_ids[level], start_id=self.start_id, end_id=self.end_id
        )


class PrefixLM:
    """Prefix language modelling (`corruption.prefix_lm`) on packed documents; a prefix for each piece."""

    name = "prefix_lm"
    framed, packing, keys, least, documents = True, FRAMED, PACKED | {"prefix"}, 1, 1

    def __init__(self, *, length: int, tokenizer):
        pass

    def room(self, n: int) -> int:
        return n

    def __call__(self, piece: Piece, rng: np.random.Generator) -> dict:
        return corruption.prefix_lm(piece.ids, piece.following, rng)


class PermutationLM:
    """XLNet's permutation language modelling (`corruption.permutation_order`) on packed documents.

    predict: the share of the tokens, last in the factorisation order, that is predicted (1/K in the paper).
    """

    name = "permutation"
    framed, packing, keys, least, documents = True, FRAMED, PACKED | {"order"}, 1, 1

    def __init__(self, *, predict: float = 1 / 6, length: int, tokenizer):
        self.predict = _share(self.name, "predict", predict)
        self.text = Vocabulary(tokenizer).text

    def room(self, n: int) -> int:
        return n

    def __call__(self, piece: Piece, rng: np.random.Generator) -> dict:
        order = corruption.permutation_order(self.text[piece.ids], rng, self.predict)
        ids = piece.ids.astype(np.int32)
        return {"tokens": ids, "targets": ids, "loss_mask": (order > 0).astype(np.float32), "order": order}


CORRUPTIONS = {
    kind.name: kind
    for kind in (
        NextToken,
        MaskedLM,
        SentencePairs,
        SpanCorruption,
        TextInfilling,
        BlankInfilling,
        PrefixLM,
        PermutationLM,
    )
}
