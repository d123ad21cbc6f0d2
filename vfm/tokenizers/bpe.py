"""Byte-pair encoding: the ids of one word, by merging the neighbours of lowest rank.

Source: Sennrich et al. 2016 (arXiv:1508.07909); on bytes: Radford et al. 2019 (GPT-2); with byte fallback: Kudo &
Richardson 2018 (SentencePiece).
"""

import functools
import heapq
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

from vfm.errors import UserError

NEVER = 1 << 60  # the rank of neighbours that do not merge
LONG = 200  # symbols from which on the heap is faster than the scan for the lowest rank
_REMEMBERED = 1 << 20  # pairs and words kept in memory
_LONGEST = 64  # characters of the words that are kept


def byte_characters() -> list[str]:
    """The printable character that stands for byte b in `vocab.json` files, for b = 0 … 255 (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


_CHARACTERS = byte_characters()
BYTE_OF = {char: byte for byte, char in enumerate(_CHARACTERS)}


def to_bytes(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary; one with other characters stands for its own UTF-8."""
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


def to_characters(data: bytes) -> str:
    """The token of a byte-level vocabulary for these bytes."""
    return "".join(_CHARACTERS[byte] for byte in data)


class Merges(dict):
    """Rank of each pair of ids that merges: `merges[a, b]`, NEVER for any other; `result[rank]` is the merged id."""

    def __init__(self, pairs: Iterable[tuple[int, int]] = (), result: Sequence[int] = ()):
        super().__init__()
        for rank, pair in enumerate(pairs):
            self[pair] = rank  # of a pair that is listed twice the last one counts, as in `tokenizers`
        self.result = result

    def __missing__(self, pair: tuple[int, int]) -> int:
        rank = self.rank(pair)
        if len(self) < _REMEMBERED:
            self[pair] = rank
        return rank

    def rank(self, pair: tuple[int, int]) -> int:
        """Rank of a pair that was not asked for before."""
        return NEVER

    def __reduce__(self):
        return _restore, (type(self), dict(self), self.__dict__)


class Joins(Merges):
    """Merges of a vocabulary without a list of them: two tokens merge when they make a third one.

    text: id -> bytes or str. order: ids in the order in which their tokens are preferred.
    Source: tiktoken (rank files), SentencePiece (scores).
    """

    def __init__(self, text: Mapping[int, bytes | str], order: Sequence[int]):
        super().__init__(result=order)
        self.text = text
        self.order = {text[i]: rank for rank, i in enumerate(order)}

    def rank(self, pair: tuple[int, int]) -> int:
        a, b = (self.text[i] if i >= 0 else chr(-1 - i) for i in pair)
        return self.order.get(a + b, NEVER)


def _restore(kind: type, pairs: dict, state: dict) -> Merges:
    merges = kind.__new__(kind)
    dict.update(merges, pairs)
    merges.__dict__.update(state)
    return merges


def merge(ids: list[int], merges: Merges) -> list[int]:
    """Merges in place the leftmost pair of lowest rank until none is left, and returns the ids."""
    if len(ids) > LONG:
        return merge_long(ids, merges)[0]
    ranks = [merges[pair] for pair in zip(ids, ids[1:])]
    while ranks:
        rank = min(ranks)
        if rank == NEVER:
            break
        i = ranks.index(rank)
        ids[i] = merges.result[rank]
        del ids[i + 1], ranks[i]
        if i:
            ranks[i - 1] = merges[ids[i - 1], ids[i]]
        if i < len(ranks):
            ranks[i] = merges[ids[i], ids[i + 1]]
    return ids


def merge_long(ids: list[int], merges: Merges) -> tuple[list[int], list[int]]:
    """As `merge`, in n log n steps; also returns at which of the given symbols each id begins."""
    size = len(ids)
    ids, after, before = list(ids), list(range(1, size + 1)), list(range(-1, size - 1))
    ranks = [merges[pair] for pair in zip(ids, ids[1:])] + [NEVER]
    heap = [(rank, i) for i, rank in enumerate(ranks) if rank < NEVER]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        if ranks[i] != rank:
            continue  # one of the two has become part of another symbol
        gone = after[i]
        ids[i], after[i], ranks[gone] = merges.result[rank], after[gone], NEVER
        following, previous = after[i], before[i]
        ranks[i] = NEVER
        if following < size:
            before[following] = i
            ranks[i] = merges[ids[i], ids[following]]
            if ranks[i] < NEVER:
                heapq.heappush(heap, (ranks[i], i))
        if previous >= 0:
            ranks[previous] = merges[ids[previous], ids[i]]
            if ranks[previous] < NEVER:
                heapq.heappush(heap, (ranks[previous], previous))
    starts, i = [], 0
    while i < size:
        starts.append(i)
        i = after[i]
    return [ids[i] for i in starts], starts


class Cache(dict):
    """`cache[word]` is `encode(word)`, remembered for words of ordinary length."""

    def __init__(self, encode):
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self.encode(word)
        if len(word) <= _LONGEST:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[word] = ids
        return ids

    def __reduce__(self):
        return Cache, (self.encode,)  # a copy starts empty


class _Characters(frozenset):
    """A set of characters, and all whose UTF-8 begins with one of `prefixes`."""

    prefixes: tuple[bytes, ...] = ()

    def __contains__(self, char: str) -> bool:
        return frozenset.__contains__(self, char) or char.encode("utf-8").startswith(self.prefixes)


class Joints(dict):
    """Where a token may reach from one character to the next: `b in joints[a]` is False if none does in "ab".

    There the two sides of a word merge independently of each other. This makes long words of scripts without spaces,
    which rarely occur twice, into short ones, which do. Between two characters of ASCII it is True in any case.
    """

    def __init__(self, tokens: Iterable[bytes]):
        super().__init__()
        # What is in a token of the character on the left -> of the one on the right.
        self.rights: dict[bytes, set[bytes]] = {}
        for token in tokens:
            if not token.isascii():
                starts = [i for i, byte in enumerate(token) if byte & 0xC0 != 0x80]
                for start, begin, end in zip([0, *starts], starts, [*starts[1:], len(token)]):
                    if begin:
                        self.rights.setdefault(token[start:begin], set()).add(token[begin:end])

    def __missing__(self, char: str) -> frozenset[str]:
        left, whole, prefixes = char.encode("utf-8"), set(map(chr, range(128 if char.isascii() else 0))), []
        for right in itertools.chain.from_iterable(self.rights.get(left[i:], ()) for i in range(len(left))):
            try:
                whole.add(right.decode("utf-8"))
            except UnicodeDecodeError:
                prefixes.append(right)
        found = _Characters(whole) if prefixes else frozenset(whole)
        if prefixes:
            found.prefixes = tuple(prefixes)
        self[char] = found
        return found


class BPE:
    """Ids of a word.

    vocab: token -> id, as in `vocab.json`: with byte_level, bytes are written as the characters of
    `byte_characters`. merges: pairs of tokens, the ones to be merged first in front; or `Joins`.
    byte_fallback: a character without a token becomes tokens <0x00> … <0xFF>, if the vocabulary has them.
    unk_token: else this one (fuse_unk: one for all neighbours), else it is left out. ignore_merges: a word that is a
    token is that token, whatever the merges say, but for the ids `never`. prefix, suffix: of tokens that do not begin,
    or that end, a word.
    Raises UserError for merges of tokens that are not in the vocabulary.
    """

    type = "BPE"

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]] | Merges,
        *,
        byte_level: bool = True,
        byte_fallback: bool = False,
        unk_token: str | None = None,
        fuse_unk: bool = False,
        ignore_merges: bool = False,
        prefix: str = "",
        suffix: str = "",
        never: Collection[int] = (),
    ):
        self.vocab, self.byte_level, self.byte_fallback = dict(vocab), byte_level, byte_fallback
        self.unk_token, self.fuse_unk, self.ignore_merges = unk_token, fuse_unk, ignore_merges
        self.prefix, self.suffix = prefix, suffix
        if unk_token is not None and unk_token not in self.vocab:
            raise UserError(f"unk_token {unk_token!r} is not in the vocabulary")
        self._merges = merges
        self.merges = merges if isinstance(merges, Merges) else self._pairs(merges)
        self.fallback = [self.vocab.get(f"<0x{byte:02X}>") for byte in range(256)] if byte_fallback else []
        whole = {token: i for token, i in vocab.items() if i not in never} if ignore_merges else {}
        self._whole = {to_bytes(token): i for token, i in whole.items()} if byte_level else whole
        self._bytes = [self.vocab.get(char) for char in byte_characters()] if byte_level else []
        self._plain = byte_level and None not in self._bytes and not prefix and not suffix
        self.cache, self._cache_of_parts = Cache(self.encode), Cache(self._encode_part)

    def _pairs(self, merges: Sequence[tuple[str, str]]) -> Merges:
        pairs, result = [], []
        for number, (left, right) in enumerate(merges, start=1):
            joined = left + right.removeprefix(self.prefix)
            try:
                pairs.append((self.vocab[left], self.vocab[right]))
                result.append(self.vocab[joined])
            except KeyError as error:
                raise UserError(f"merge {number} ({left!r}, {right!r}): the vocabulary has no {error}") from None
        return Merges(pairs, result)

    def listed_merges(self) -> list[tuple[str, str]]:
        """The merges as pairs of tokens, in order; for a vocabulary without a list, all that its tokens allow."""
        if not isinstance(self._merges, Joins):
            return list(self._merges)
        joins, write = self._merges, to_characters if self.byte_level else str
        known, found = {text: i for i, text in joins.text.items()}, []
        for rank, i in enumerate(joins.result):
            text = joins.text[i]
            parts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            parts = [(known[a], known[b], a, b) for a, b in parts if a in known and b in known]
            found += [(rank, *part) for part in sorted(parts)]
        return [(write(a), write(b)) for *_, a, b in found]

    def encode(self, word: str) -> tuple[int, ...]:
        """Ids of a word, not looked up in the cache (`cache[word]` is)."""
        if self._plain:
            try:
                data = word.encode("utf-8")
                parts = self._parts(word) if len(data) > 2 * len(word) > 4 else []
            except UnicodeEncodeError:  # bytes that are not UTF-8
                data, parts = word.encode("utf-8", "surrogateescape"), []
            if data in self._whole:
                return (self._whole[data],)
            if parts:
                return tuple(itertools.chain.from_iterable(map(self._cache_of_parts.__getitem__, parts)))
            return tuple(merge([self._bytes[byte] for byte in data], self.merges))
        return tuple(self._spans(word)[0])

    def _encode_part(self, part: str) -> tuple[int, ...]:
        return tuple(merge([self._bytes[byte] for byte in part.encode("utf-8")], self.merges))

    def _parts(self, word: str) -> list[str]:
        """The parts of a word between which no token reaches; none if it has no such places."""
        joints = self._joints
        cuts = [i for i, (a, b) in enumerate(zip(word, word[1:]), start=1) if b not in joints[a]]
        return [word[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)])] if cuts else []

    @functools.cached_property
    def _joints(self) -> Joints:
        return Joints(to_bytes(token) for token in self.vocab)

    def encode_spans(self, words: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each word its ids, and for each id the (start, end) of the characters that it covers at least in part."""
        return [self._spans(word) for word in words]

    def _spans(self, word: str) -> tuple[list[int], list[tuple[int, int]]]:
        whole = self._whole.get(word.encode("utf-8", "surrogateescape") if self.byte_level else word)
        if whole is not None:
            return [whole], [(0, len(word))]
        symbols = self._symbols(word)
        ids, starts = merge_long([symbol[0] for symbol in symbols], self.merges)
        spans = [(symbols[a][1], symbols[b - 1][2]) for a, b in zip(starts, [*starts[1:], len(symbols)])]
        return self._resolve(ids, spans)

    def _symbols(self, word: str) -> list[tuple[int, int, int]]:
        """(id, start, end) of the symbols that are merged: bytes or characters; unknown ones as -1 - code point."""
        symbols = []
        for i, char in enumerate(word):
            parts = [char]
            if self.byte_level:
                parts = list(to_characters(char.encode("utf-8", "surrogateescape")))
            for n, part in enumerate(parts):
                token = (self.prefix if i or n else "") + part
                token += self.suffix if i == len(word) - 1 and n == len(parts) - 1 else ""
                symbols.append((self.vocab.get(token, -1 - ord(part)), i, i + 1))
        if not isinstance(self._merges, Joins):
            ids, spans = self._resolve([s[0] for s in symbols], [s[1:] for s in symbols])
            symbols = [(i, *span) for i, span in zip(ids, spans)]
        return symbols

    def _resolve(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Replaces the unknown symbols by their bytes or by unk_token."""
        if not ids or min(ids) >= 0:
            return ids, spans
        found, fused = [], False
        unk = None if self.unk_token is None else self.vocab[self.unk_token]
        for i, span in zip(ids, spans):
            if i >= 0:
                found.append((i, span))
                fused = False
                continue
            data = chr(-1 - i).encode("utf-8", "surrogateescape")
            fallback = [self.fallback[byte] for byte in data] if self.fallback else [None]
            if None not in fallback:
                found += [(token, span) for token in fallback]
            elif unk is not None:
                if fused and self.fuse_unk:
                    found[-1] = (unk, (found[-1][1][0], span[1]))
                else:
                    found.append((unk, span))
                fused = True
        return [i for i, _ in found], [span for _, span in found]
