"""A tokenizer: normalise, split into words, encode each word by a model, and the way back."""

import array
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from vfm.errors import UserError, unknown
from vfm.tokenizers import decoders, normalizers, pretokenizers
from vfm.tokenizers.added import AddedToken, AddedTokens, check
from vfm.tokenizers.bpe import BPE
from vfm.tokenizers.decoders import Stream
from vfm.tokenizers.normalizers import SPACE, Edit
from vfm.tokenizers.pretokenizers import Cut
from vfm.tokenizers.split import BLOCK
from vfm.tokenizers.templates import template, trims_offsets
from vfm.tokenizers.unigram import Unigram
from vfm.tokenizers.wordpiece import WordPiece

# How published tokenizers call their special tokens, where nothing else says it.
_NAMES = {
    "bos": ("<bos>", "<s>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "<cls>"),
    "eos": ("<eos>", "</s>", "[SEP]", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<sep>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}
_BATCH = 256  # texts that a worker encodes at a time


class Tokenizer:
    """Text to ids and back, with the interface of `ByteTokenizer`.

    model: `BPE`, `Unigram` or `WordPiece`. normalizer, pre_tokenizer, post_processor, decoder: the components of a
    `tokenizer.json`, as they stand there, or None; the decoder may be an object as well, and `edits` are given instead
    of a normalizer. added: tokens besides those of the model. names: which tokens are "bos", "eos" and "pad", where
    they have not one of the usual names. A component that is not supported raises UserError.
    """

    def __init__(
        self,
        model: BPE | Unigram | WordPiece,
        *,
        normalizer: dict | None = None,
        pre_tokenizer: dict | None = None,
        post_processor: dict | None = None,
        decoder: dict | decoders.Decoder | None = None,
        added: Sequence[AddedToken] = (),
        names: Mapping[str, str] | None = None,
        edits: Sequence[Edit] | None = None,
    ):
        self.model, self.names = model, dict(names or {})
        self.components = {
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor,
            "decoder": decoder,
        }
        check(added, model.vocab)
        self._edits = normalizers.build([normalizer] if normalizer else []) if edits is None else list(edits)
        self._own_edits = edits
        # SentencePiece puts no space in front of the tokens that it looks for.
        self._added = AddedTokens(added, self._normal if edits is None else lambda text: text.replace(" ", SPACE))
        self.added, self.special = self._added.tokens, self._added.special
        self.vocab_size = max([*model.vocab.values(), *self._added.ids.values()]) + 1
        self._steps = pretokenizers.build([pre_tokenizer] if pre_tokenizer else [])
        self._steps += _word_cuts(model) if not self._steps or not isinstance(self._steps[-1], Cut) else []
        self._cut = self._steps[0] if len(self._steps) == 1 and isinstance(self._steps[0], Cut) else None
        single = template(post_processor, "single")
        middle = [item for item, _ in single].index("A")
        self._before, self._after = [i for i, _ in single[:middle]], [i for i, _ in single[middle + 1 :]]
        self._pair = template(post_processor, "pair")
        self._trim = trims_offsets(post_processor)
        if isinstance(decoder, decoders.Decoder):
            self._decoder = decoder
        else:
            tokens = {i: token for token, i in model.vocab.items()}
            self._decoder = decoders.build(decoder, tokens, {token.id: token.content for token in added})
        self._skipped = frozenset(self.special.values()) - self._decoder.shown

    # Names of special tokens.

    @functools.cached_property
    def pad_id(self) -> int:
        """Id that fills rows; that of <eos> where no token is for padding."""
        found = self._find("pad")
        return self.eos_id if found is None else found

    @functools.cached_property
    def bos_id(self) -> int:
        """Id in front of a text; that of <eos> where no token is for the beginning."""
        found = self._find("bos")
        return self.eos_id if found is None else found

    @functools.cached_property
    def eos_id(self) -> int:
        """Id at the end of a text; UserError where no token is for it."""
        found = self._find("eos")
        if found is None:
            raise UserError(
                "the tokenizer has no token for the end of a text; add one with the field `special`, such as "
                f"special=('<pad>', '<bos>', '<eos>'). Its special tokens: {', '.join(self.special) or 'none'}"
            )
        return found

    def _find(self, role: str) -> int | None:
        if role in self.names:
            return self.token_id(self.names[role])
        return next((self._added.ids[name] for name in _NAMES[role] if name in self._added.ids), None)

    def token_id(self, name: str) -> int:
        """Id of a special token, such as "<image>"; an unknown name raises UserError."""
        if name not in self._added.ids:
            raise unknown("special token", name, self._added.ids, where="the tokenizer")
        return self._added.ids[name]

    def with_added(self, tokens: Sequence[AddedToken]) -> "Tokenizer":
        """The same tokenizer with these added tokens instead of its own."""
        return Tokenizer(self.model, **self.components, added=tokens, names=self.names, edits=self._own_edits)

    def with_special(self, names: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with these special tokens; those that it has not get the next ids."""
        added, size = list(self.added), self.vocab_size
        for name in dict.fromkeys(names):
            if name in self._added.ids:
                added = [dataclasses.replace(t, special=True) if t.content == name else t for t in added]
            else:
                known = self.model.vocab.get(name)
                added.append(AddedToken(name, size if known is None else known))
                size += known is None
        return self.with_added(added)

    # Text to ids.

    def encode(
        self, text: str | bytes, *, allow_special: bool | Collection[str] = False, add_special: bool = False
    ) -> list[int]:
        """Ids of a text, or of bytes (which need not be UTF-8).

        allow_special: whether the names of special tokens in the text mean these tokens (True: all, or only those
        listed). They do not by default, so that no user text can forge a marker. add_special: puts the tokens around
        the text that the tokenizer's file asks for, such as [CLS] … [SEP].
        """
        ids = []
        for part, first in self._parts(_checked(text), allow_special):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            else:
                ids += self._encode(part, first)
        return self._around(ids) if add_special else ids

    def _encode(self, text: str, first: bool) -> list[int]:
        local = self._cut.local if self._cut else None
        if local is not None and len(text) > BLOCK:
            return [i for block in local.blocks(text) for i in self._encode_words(self._cut(block))]
        return self._encode_words(self._cut(text) if self._cut else self._words(text, first))

    def _encode_words(self, words: list[str]) -> list[int]:
        if isinstance(self.model, Unigram):
            return self.model.encode_words(words)
        return list(itertools.chain.from_iterable(map(self.model.cache.__getitem__, words)))

    def _words(self, text: str, first: bool) -> list[str]:
        words = [text] if text else []
        for step in self._steps:
            if isinstance(step, Cut):
                words = [word for part in words for word in step(part)]
            else:
                words = [step(word, first and not i) for i, word in enumerate(words)]
        return words

    def _around(self, ids: list[int]) -> list[int]:
        return self._before + ids + self._after

    def encode_pair(self, text: str, pair: str, **options) -> tuple[list[int], list[int]]:
        """Ids and type ids (0 first, 1 second) of two texts, with the tokens around them as in BERT."""
        ids, types = [], []
        for item, kind in self._pair:
            part = self.encode(text if item == "A" else pair, **options) if item in ("A", "B") else [item]
            ids += part
            types += [kind] * len(part)
        return ids, types

    def encode_batch(self, texts: Iterable[str | bytes], *, workers: int = 0, **options) -> Iterator[list[int]]:
        """Ids of each text in turn (see `encode`), by this or by `workers` other processes."""
        if workers <= 0:
            yield from (self.encode(text, **options) for text in texts)
            return
        texts, context = iter(texts), multiprocessing.get_context("spawn")  # not forked: JAX runs threads
        with concurrent.futures.ProcessPoolExecutor(workers, context, _set_worker, (self, options)) as pool:
            waiting: collections.deque = collections.deque()
            while True:
                while len(waiting) <= 2 * workers and (batch := list(itertools.islice(texts, _BATCH))):
                    waiting.append(pool.submit(_encode_in_worker, batch))
                if not waiting:
                    return
                yield from map(list, waiting.popleft().result())

    def encode_offsets(self, text: str, **options) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and for each the (start, end) of the characters that it comes from.

        A character that is split over several tokens belongs to each of them. Options: see `encode`; the tokens that
        add_special puts around the text have the span (0, 0).
        """
        add = options.pop("add_special", False)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for part, first, places in self._aligned(_checked(text), options.pop("allow_special", False)):
            if isinstance(part, AddedToken):
                ids.append(part.id)
                spans.append((places[0][0], places[-1][1]))
                continue
            words = self._aligned_words(part, first, places)
            for (found, inside), (_, where) in zip(self.model.encode_spans([word for word, _ in words]), words):
                ids += found
                spans += [(where[a][0], where[b - 1][1]) for a, b in inside]
        if self._trim[0]:
            added = set(self._added.ids.values())
            spans = [
                _trimmed(text[a:b].encode() if i in added else self._decoder.rest[i], a, b, self._trim[1] and not at)
                for at, (i, (a, b)) in enumerate(zip(ids, spans))
            ]
        if add:
            ids = self._around(ids)
            spans = [(0, 0)] * len(self._before) + spans + [(0, 0)] * len(self._after)
        return ids, spans

    def _aligned_words(self, text: str, first: bool, places) -> list[tuple[str, list[tuple[int, int]]]]:
        words = [(text, places)] if text else []
        for step in self._steps:
            if isinstance(step, Cut):
                words = [(w[a:b], where[a:b]) for w, where in words for a, b in step.spans(w)]
            else:
                words = [_edited(step, w, where, first and not i) for i, (w, where) in enumerate(words)]
        return words

    def _normal(self, text: str, first: bool = True) -> str:
        for edit in self._edits:
            text = edit(text, first)
        return text

    def _parts(self, text: str, allow) -> Iterator[tuple[str | AddedToken, bool]]:
        """The added tokens of a text and the normalised texts between them; and whether the input begins there."""
        before, after = self._added.patterns(allow)
        for part, start, _ in self._added.search(text, before, False):
            if isinstance(part, AddedToken):
                yield part, False
                continue
            begins = start == 0 and self._keeps_start(part)
            for piece, at, _ in self._added.search(self._normal(part, start == 0), after, True):
                yield piece, begins and at == 0

    def _keeps_start(self, text: str) -> bool:
        """Whether the normalised text begins with what the text begins with, where a step of the splitting asks."""
        if not self._edits or not any(isinstance(step, Edit) and step.only_first for step in self._steps):
            return True
        places = [(i, i + 1) for i in range(len(text))]
        for edit in self._edits:
            text, places = _edited(edit, text, places, True)
        return not places or places[0][0] == 0

    def _aligned(self, text: str, allow) -> Iterator[tuple[str | AddedToken, bool, list[tuple[int, int]]]]:
        """As `_parts`, with the place of every character in the input."""
        before, after = self._added.patterns(allow)
        for part, start, end in self._added.search(text, before, False):
            places = [(i, i + 1) for i in range(start, end)]
            if isinstance(part, AddedToken):
                yield part, False, places
                continue
            for edit in self._edits:
                part, places = _edited(edit, part, places, start == 0)
            for piece, a, b in self._added.search(part, after, True):
                yield piece, places[a][0] == 0, places[a:b]

    # Ids to text.

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of the ids: special tokens are skipped unless kept, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._decoder.parts(self._kept(ids, keep_special))).decode("utf-8", self._decoder.errors)

    def decode_bytes(self, ids: Iterable[int], *, keep_special: bool = False) -> bytes:
        """Bytes of the ids; an id outside the vocabulary raises UserError."""
        return b"".join(self._decoder.parts(self._kept(ids, keep_special)))

    def _kept(self, ids: Iterable[int], keep_special: bool) -> list[int]:
        ids, known, skipped = list(map(int, ids)), self._decoder.rest, self._skipped if not keep_special else ()
        if not known.keys() >= set(ids):
            wrong = next(i for i in ids if i not in known)
            if not 0 <= wrong < self.vocab_size:
                raise UserError(f"token id {wrong} is outside the vocabulary of {self.vocab_size} ids")
            ids = [i for i in ids if i in known]  # a hole in the numbering
        return [i for i in ids if i not in skipped] if skipped else ids

    def stream(self, *, keep_special: bool = False) -> Stream:
        """A decoder that takes ids one by one, as they are generated."""
        return Stream(self._decoder.parts, lambda i: self._kept([i], keep_special), self._decoder.errors)


def _checked(text: str | bytes) -> str:
    """The text; bytes that are not UTF-8 as lone surrogates."""
    if isinstance(text, bytes | bytearray):
        return bytes(text).decode("utf-8", "surrogateescape")
    if not isinstance(text, str):
        raise UserError(f"a tokenizer encodes str or bytes, not {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            place = f"position {error.start}, U+{ord(text[error.start]):04X}"
            raise UserError(f"text is not Unicode: it has half of a surrogate pair at {place}") from None
    return text


def _edited(edit: Edit, text: str, places: list[tuple[int, int]], first: bool) -> tuple[str, list[tuple[int, int]]]:
    """The text after an edit, with the places of its characters."""
    if edit.only_first and not first:
        return text, places
    out, found, at = [], [], 0
    for read, written in edit.pieces(text):
        if read:
            span = (places[at][0], places[at + read - 1][1])
        else:  # what is put in front or behind belongs to its neighbour
            span = (places[at] if at < len(places) else places[-1]) if places else (0, 0)
        found += [span] * len(written)
        out.append(written)
        at += read
    return "".join(out), found


def _trimmed(token: bytes, start: int, end: int, prefixed: bool) -> tuple[int, int]:
    """The span without the spaces at the ends of its token; not counting the one that was put in front of the text."""
    before, after = len(token) - len(token.lstrip(b" ")), len(token) - len(token.rstrip(b" "))
    if before == 1 and prefixed:
        before = 0
    start = min(start + before, end)
    return start, max(end - after, start) if end >= after else end


def _word_cuts(model) -> list[Cut]:
    """Splits in front of visible spaces, where no token of the model crosses such a place: the ids stay the same."""
    if isinstance(model, WordPiece) or (isinstance(model, BPE) and (model.byte_level or model.ignore_merges)):
        return []
    if SPACE not in model.vocab:
        return []
    crossing = re.compile(f"[^{SPACE}]{SPACE}")
    if any(crossing.search(token) for token in model.vocab):
        return []
    pattern = re.compile(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
    return [Cut(functools.partial(_all_spans, pattern), pattern.findall)]


def _all_spans(pattern: re.Pattern, text: str) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(text)]


_worker: tuple[Tokenizer, dict] | None = None


def _set_worker(tokenizer: Tokenizer, options: dict) -> None:
    global _worker
    _worker = tokenizer, options


def _encode_in_worker(texts: list[str | bytes]) -> list[array.array]:
    tokenizer, options = _worker
    return [array.array("I", tokenizer.encode(text, **options)) for text in texts]
