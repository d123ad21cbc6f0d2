"""Unigram language model: the split of a text into tokens that has the highest sum of scores (Viterbi).

Source: Kudo 2018 (arXiv:1804.10959).
"""

import array
import itertools
import math
from collections.abc import Collection, Sequence

from vfm.errors import UserError
from vfm.tokenizers.bpe import Cache

PENALTY = 10.0  # an unknown character scores this much below the lowest token
RESET = 100_000.0  # SentencePiece takes sums of this size back to zero
_ROUNDING = 2.0**-23  # of a sum in 32 bits, relative


class Unigram:
    """Ids of a word.

    pieces: (token, score) by id. unk_id: of runs of characters that no token covers. byte_fallback: these become
    tokens <0x00> … <0xFF> instead, if the vocabulary has them. never: ids of tokens that text does not become.
    always: ids of tokens that are chosen wherever they occur. single: sums are rounded to 32 bits and go on from word
    to word, as in SentencePiece, which decides between splits of nearly equal score; `tokenizers` uses 64 bits.
    """

    type = "Unigram"

    def __init__(
        self,
        pieces: Sequence[tuple[str, float]],
        unk_id: int | None,
        *,
        byte_fallback: bool = False,
        never: Collection[int] = (),
        always: Collection[int] = (),
        single: bool = False,
    ):
        if unk_id is not None and not 0 <= unk_id < len(pieces):
            raise UserError(f"unk_id={unk_id} is not an id of the {len(pieces)} tokens")
        if not pieces:
            raise UserError("the vocabulary of a Unigram model is empty")
        self.pieces, self.unk_id, self.byte_fallback, self.single = list(pieces), unk_id, byte_fallback, single
        self.vocab = {token: i for i, (token, _) in enumerate(pieces)}
        usable = [score for i, (_, score) in enumerate(pieces) if i not in never and i not in always]
        self._unknown = array.array("f" if single else "d", [min(usable, default=0.0) - PENALTY])[0]
        best = max(usable, default=0.0)
        self._most = max(map(abs, [self._unknown, *(score for _, score in pieces)]))
        self._scores: dict[str, tuple[float, int] | None] = {}
        for i, (token, score) in enumerate(pieces):
            if i in never or not token:
                continue
            bonus = len(token.encode("utf-8", "surrogatepass")) * best - 0.1
            self._scores[token] = (bonus if i in always else score, i)
            for end in range(1, len(token)):
                self._scores.setdefault(token[:end], None)  # a longer token begins like this
        self.fallback = [self.vocab.get(f"<0x{byte:02X}>") for byte in range(256)] if byte_fallback else []
        self.cache = Cache(self.encode)
        self._splits = Cache(self._split)

    def encode_words(self, words: Sequence[str]) -> list[int]:
        """Ids of the words of a text, in order."""
        if not self.single:
            return list(itertools.chain.from_iterable(map(self.cache.__getitem__, words)))
        total, found = array.array("f", [0.0]), []
        for word in words:
            ids, scores, margin, weight = self._splits[word]
            # Rounding cannot change the split if its lead is above what rounding can add up to.
            safe = margin > (len(word) + 2) * (weight + abs(total[0])) * _ROUNDING
            if safe and abs(total[0]) + len(word) * self._most < RESET:
                for score in scores:
                    total[0] += score
            else:
                path, total[0], _ = self._best(word, total[0])
                ids = self._resolve(word, path)[0]
            found += ids
        return found

    def _split(self, word: str) -> tuple[tuple[int, ...], list[float], float, float]:
        """Ids, scores, by how much the closest choice was won, and the size of the sums."""
        path, _, margin = self._best(word, 0.0)
        scores = [self._unknown if i < 0 else self._scores[word[start:end]][0] for i, start, end in path]
        weight = sum(map(abs, scores)) + abs(self._unknown)
        return tuple(self._resolve(word, path)[0]), scores, margin, weight

    def encode(self, word: str) -> tuple[int, ...]:
        """Ids of a word, not looked up in the cache."""
        return tuple(self._resolve(word, self._best(word, 0.0)[0])[0])

    def encode_spans(self, words: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each word of a text its ids, and for each id the (start, end) of its characters in the word."""
        total, found = 0.0, []
        for word in words:
            path, after, _ = self._best(word, total)
            found.append(self._resolve(word, path))
            total = after if self.single else 0.0
        return found

    def _best(self, word: str, total: float) -> tuple[list[tuple[int, int, int]], float, float]:
        """The best path as (id or -1, start, end), the sum of scores after it, and the smallest lead of a choice.

        total: the sum of scores up to here.
        """
        size, scores, margin = len(word), self._scores, math.inf
        best = array.array("f" if self.single else "d", [total]) * (size + 2)  # the last one is for rounding
        begins, ids = [-1] * (size + 1), [-1] * (size + 1)
        for start in range(size):
            if self.single and abs(best[start]) > RESET:
                offset = best[start]
                for end in range(start, size + 1):
                    if end == start or begins[end] >= 0:
                        best[end] -= offset
            choices = []
            for end in range(start + 1, size + 1):
                try:
                    found = scores[word[start:end]]
                except KeyError:
                    break
                if found is not None:
                    choices.append((end, *found))
            if not choices or choices[0][0] > start + 1:
                choices.append((start + 1, self._unknown, -1))
            for end, gain, i in choices:
                best[-1] = best[start] + gain
                if begins[end] >= 0:
                    lead = best[-1] - best[end]
                    margin = min(margin, abs(lead))
                    if lead <= 0:
                        continue
                best[end], begins[end], ids[end] = best[-1], start, i
        path, end = [], size
        while end:
            path.append((ids[end], begins[end], end))
            end = begins[end]
        path.reverse()
        return path, best[size], margin

    def _resolve(self, word: str, path: list[tuple[int, int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        ids, spans, run = [], [], False
        for i, start, end in path:
            if i >= 0:
                ids.append(i)
                spans.append((start, end))
            elif self.fallback and None not in self.fallback:
                for byte in word[start:end].encode("utf-8", "surrogateescape"):
                    ids.append(self.fallback[byte])
                    spans.append((start, end))
            elif self.unk_id is None:
                raise UserError(f"the vocabulary has no token for {word[start:end]!r}, and no unk_id")
            elif run:
                spans[-1] = (spans[-1][0], end)
            else:
                ids.append(self.unk_id)
                spans.append((start, end))
            run = i < 0
        return ids, spans
