"""Which pairs byte-pair encoding merges, learned from counted words.

Equal to the trainer of Hugging Face `tokenizers`, merge for merge: the most frequent pair first, of equally frequent
ones the pair of smallest ids. The counts of pairs are kept up to date by each merge, and a heap finds the next pair;
its entries are corrected when they come up. All words are one array of symbols, linked to their neighbours, so that
NumPy merges a pair in all of them at once.
Source: Sennrich et al. 2016 (arXiv:1508.07909).
"""

import collections
import heapq
import itertools
import time
from collections.abc import Callable, Iterable

import numpy as np

EVERY = 5.0  # seconds between two reports
GONE, EDGE = -2, -1  # a symbol that has become part of the one before; the end of a word


class Words:
    """Symbols of all words, one after another, with links.

    symbols: int32[n + 1]; before, after: int32[n + 1], places of the neighbours, n at the ends of a word (where the
    symbol is EDGE); owner: int32[n], the word of each symbol. counts: int64[words].
    """

    def __init__(self, words: list[list[int]], counts: list[int]):
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        size = int(lengths.sum())
        flat = np.fromiter(itertools.chain.from_iterable(words), np.int32, size)
        self.counts = np.asarray(counts, np.int64)
        self.owner = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self.symbols = np.append(flat, np.int32(EDGE))
        self.after = np.arange(1, size + 2, dtype=np.int32)
        self.before = np.arange(-1, size, dtype=np.int32)
        ends = np.cumsum(lengths[lengths > 0])
        self.after[ends - 1] = size
        self.before[ends] = size
        self.before[0] = size
        self.before[size] = self.after[size] = size
        self.starts = np.zeros(size + 1, bool)  # where the pair that is being merged begins

    def pairs(self) -> Iterable[tuple[tuple[int, int], int, np.ndarray]]:
        """(pair, how often it occurs, places of its left symbols) of all pairs."""
        left = np.flatnonzero(self.symbols[self.after[:-1]] >= 0).astype(np.int32)
        keys = self.symbols[left].astype(np.int64) << 32 | self.symbols[self.after[left]]
        for key, count, places in self._grouped(keys, left):
            yield (key >> 32, key & 0xFFFFFFFF), count, places

    def _grouped(self, keys: np.ndarray, places: np.ndarray) -> Iterable[tuple[int, int, np.ndarray]]:
        """(key, sum of word counts, places) for each distinct key."""
        if not len(keys):
            return []
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        sums = np.add.reduceat(self.counts[self.owner[places]], begins)
        bounds = begins.tolist()
        parts = [places[start:end] for start, end in zip(bounds, [*bounds[1:], len(places)])]
        return zip(keys[begins].tolist(), sums.tolist(), parts)

    def merge(self, pair: tuple[int, int], new: int, places: np.ndarray, frequency) -> list:
        """Merges a pair where it is found among `places`; returns [(pair, places)] of the pairs that this makes."""
        a, b = pair
        symbols, before, after, starts = self.symbols, self.before, self.after, self.starts
        places = places[symbols[places] == a]
        seconds = after[places]
        found = symbols[seconds] == b
        places, seconds = places[found], seconds[found]
        if a == b and len(places):
            places = np.sort(places)
            seconds = after[places]
            # In a run of equal symbols every other pair is merged, from the left.
            number = np.arange(len(places))
            begins = np.maximum.accumulate(np.where(np.concatenate(([True], places[1:] != seconds[:-1])), number, 0))
            found = (number - begins) % 2 == 0
            places, seconds = places[found], seconds[found]
        starts[places] = True
        left, right = before[places], after[seconds]
        # A neighbour may be a pair that is merged as well.
        joined, follows = starts[right], starts[before[left]] & (symbols[left] >= 0)
        made = []
        lefts = left[(symbols[left] >= 0) & ~follows]
        for x, count, where in self._grouped(symbols[lefts], lefts):
            frequency[x, a] -= count
            frequency[x, new] += count
            made.append(((x, new), where))
        others = (symbols[right] >= 0) & ~joined
        for y, count, where in self._grouped(symbols[right[others]], places[others]):
            frequency[b, y] -= count
            frequency[new, y] += count
            made.append(((new, y), where))
        if joined.any():
            where = places[joined]
            count = int(self.counts[self.owner[where]].sum())
            frequency[b, a] -= count
            frequency[new, new] += count
            made.append(((new, new), where))
        starts[places] = False
        symbols[places], symbols[seconds] = new, GONE
        after[places], before[right] = right, places
        before[-1] = len(symbols) - 1
        return made


def learn(
    words: list[list[int]],
    counts: list[int],
    size: int,
    join: Callable[[int, int], int],
    min_frequency: int = 0,
    report: Callable[[str], None] = print,
) -> list[tuple[int, int]]:
    """Merges, in order, learned from words (lists of ids) and how often each occurs.

    join(a, b): the id of the merged token, a new one unless there is a token of the same text already.
    Ends when an id of size - 1 exists, or when no pair occurs min_frequency times.
    """
    table = Words(words, counts)
    frequency: dict[tuple[int, int], int] = collections.defaultdict(int)
    serial, heap = itertools.count(), []  # equal entries are in no order; places cannot be compared
    for pair, count, places in table.pairs():
        frequency[pair] = count
        heap.append((-count, pair, next(serial), places))
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    last, told = -1, time.monotonic()
    while heap and last < size - 1:
        negative, pair, _, places = heap[0]
        current = frequency[pair]
        if current != -negative:
            heapq.heapreplace(heap, (-current, pair, next(serial), places))
            continue
        if current < max(1, min_frequency):
            break
        heapq.heappop(heap)
        new = join(*pair)
        last = max(last, new)
        merges.append(pair)
        for changed, where in table.merge(pair, new, places, frequency):
            if frequency[changed] > 0:
                heapq.heappush(heap, (-frequency[changed], changed, next(serial), where))
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            report(f"{len(merges)} merges, the last one of a pair that occurs {current} times")
    return merges
