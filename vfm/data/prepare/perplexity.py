"""A character n-gram language model, to tell text that is unlike a clean sample."""

from collections.abc import Iterable

import numpy as np

from vfm.errors import UserError

_START = 0x110000  # beyond all characters
_CHARACTERS = 0x110001  # what may follow: any code point or the end
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 20  # characters whose n-grams are counted at a time


class CharNgram:
    """p(character | the `order` - 1 before it), each order smoothed by the next lower one.

    p_k(c | h) = (n(h c) + strength · p_{k-1}(c | h')) / (n(h) + strength), h' = h without its first character, down
    to the uniform distribution over all code points: the hierarchical Dirichlet language model of MacKay and Peto
    1995, with a fixed strength. Memory grows with the number of different n-grams of the sample.
    """

    def __init__(self, order: int = 5, strength: float = 8.0):
        self.order, self.strength = order, strength
        self.total = 0  # characters and ends of text
        # For each length, the hashes of the n-grams, sorted, and how often each occurred.
        self.grams = [(np.zeros(1, np.uint64), np.zeros(1, np.int64)) for _ in range(order)]

    def fit(self, texts: Iterable[str]) -> "CharNgram":
        """Counts the n-grams of texts, in addition to those counted before."""
        new, size = [], 0
        for text in texts:
            new.append(self._hashes(text))
            size += len(text) + 1
            if size >= _CHUNK:
                self._count(new, size)
                new, size = [], 0
        if new:
            self._count(new, size)
        return self

    def _count(self, new: list[np.ndarray], size: int) -> None:
        self.total += size
        for n, (key, count) in enumerate(self.grams):
            more, times = np.unique(np.concatenate([grams[n] for grams in new]), return_counts=True)
            key, inverse = np.unique(np.concatenate([key, more]), return_inverse=True)
            count = np.bincount(inverse, np.concatenate([count, times])).astype(np.int64)
            self.grams[n] = key, count

    def _hashes(self, text: str) -> np.ndarray:
        """uint64[order, 1 + len(text)]: the n-grams that end at the start of text and at each of its characters."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        codes = np.concatenate([[_START] * self.order, codes]).astype(np.uint64)
        codes = (codes + np.uint64(1)) * _FACTOR
        codes ^= codes >> np.uint64(31)
        hashes = np.empty((self.order, len(codes) - self.order + 1), np.uint64)
        key = np.zeros(hashes.shape[1], np.uint64)
        for n in range(self.order):
            key = hashes[n] = key * _FACTOR + codes[self.order - 1 - n : len(codes) - n]
        return hashes

    def bits(self, text: str) -> np.ndarray:
        """float[len(text)]: -log2 of the probability of each character."""
        probability = np.full(len(text), 1 / _CHARACTERS)
        before = self.total
        for hashes, (key, count) in zip(self._hashes(text), self.grams):
            place = np.minimum(np.searchsorted(key, hashes), len(key) - 1)
            times = np.where(key[place] == hashes, count[place], 0)
            probability = (times[1:] + self.strength * probability) / (before + self.strength)
            before = times[:-1]
        return -np.log2(probability)

    def bits_per_char(self, text: str) -> float:
        """Mean bits of a character, the logarithm of the perplexity; 0 for an empty text."""
        return float(self.bits(text).mean()) if text else 0.0


def fit(texts: Iterable[str], quantile: float = 0.99, max_chars: int = 10_000_000, **model) -> tuple[CharNgram, float]:
    """A model of a clean sample, and the bits per character that this share of such texts stays below.

    Every tenth text is kept out of a first model to measure the quantile; the model returned has seen them all. At
    most max_chars characters are read. model: arguments of `CharNgram`.
    """
    sample: list[str] = []
    for text in texts:
        if text:
            sample.append(text)
            max_chars -= len(text)
        if max_chars <= 0:
            break
    if len(sample) < 100:
        raise UserError(f"the clean sample of the perplexity filter has {len(sample)} texts; it needs 100 or more")
    first = CharNgram(**model).fit(text for n, text in enumerate(sample) if n % 10)
    limit = float(np.quantile([first.bits_per_char(text) for text in sample[::10]], quantile))
    return CharNgram(**model).fit(sample), limit
