"""Near-duplicates: word shingles, MinHash signatures, locality-sensitive hashing, connected components.

Signatures equal those of the library datasketch bit for bit, and are made for many documents at once.
Sources: Broder 1997, On the resemblance and containment of documents; Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, chapter 3.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from vfm.data.prepare import segment
from vfm.data.prepare.normalise import identity
from vfm.errors import unknown

SCHEMES = ("affine32", "legacy")
_CHUNK = 1 << 14  # hashes at a time: the buffers stay in the processor's cache
_PAIRS = 1 << 14  # pairs of signatures compared at a time


def shingles(text: str, words: int = 5, chars: int = 5) -> set[str]:
    """The set of n-grams of words of `identity(text)`, joined by spaces; n = chars where most characters are unspaced.

    Each character of a script without spaces (Chinese, Japanese, Thai) counts as a word. A text shorter than n words
    is one shingle, and one without any word is itself the shingle.
    """
    text = identity(text)
    tokens = segment.words(text, "characters")
    n = chars if segment.mostly_unspaced(text, tokens) else words
    if len(tokens) <= n:
        return {" ".join(tokens) or text}
    return set(map(" ".join, zip(*(tokens[i:] for i in range(n)))))


def hash_shingles(shingles: Iterable[str]) -> np.ndarray:
    """uint32[n]: the first 4 bytes, little endian, of the SHA-1 of each shingle."""
    sha1 = hashlib.sha1
    return np.frombuffer(b"".join([sha1(shingle.encode()).digest()[:4] for shingle in shingles]), "<u4")


class MinHash:
    """Sets of 32-bit hashes -> signatures uint32[n, num_perm]; equal entries estimate the Jaccard similarity.

    scheme: "affine32", a·h + b modulo 2^32 with odd a, after the finaliser of MurmurHash3; "legacy",
    ((a·h + b) modulo 2^64) modulo 2^61 - 1, cut to 32 bits, where large sets collide. Both as in datasketch 2.0,
    with its a and b for the same seed. The standard error of the estimate is sqrt(J (1 - J) / num_perm).
    """

    def __init__(self, num_perm: int = 128, seed: int = 1, scheme: str = "affine32"):
        if scheme not in SCHEMES:
            raise unknown("MinHash scheme", scheme, SCHEMES)
        self.num_perm, self.scheme = num_perm, scheme
        random = np.random.RandomState(seed)
        if scheme == "legacy":
            prime = (1 << 61) - 1
            draw = lambda low: random.randint(low, prime, dtype=np.uint64)
            self.a, self.b = np.array([(draw(1), draw(0)) for _ in range(num_perm)], np.uint64).T
        else:
            self.a = random.randint(0, 1 << 31, num_perm, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
            self.b = random.randint(0, 1 << 32, num_perm, dtype=np.uint32)

    def signatures(self, sets: Sequence[np.ndarray]) -> np.ndarray:
        """sets: uint32[≥ 1] hashes each -> uint32[len(sets), num_perm]."""
        result = np.empty((len(sets), self.num_perm), np.uint32)
        begin = 0
        while begin < len(sets):
            end, size = begin + 1, len(sets[begin])
            while end < len(sets) and size + len(sets[end]) <= _CHUNK:
                size += len(sets[end])
                end += 1
            starts = np.cumsum([0, *map(len, sets[begin : end - 1])])
            self._fill(result[begin:end], np.concatenate(sets[begin:end]), starts)
            begin = end
        return result

    def _fill(self, result: np.ndarray, hashes: np.ndarray, starts: np.ndarray) -> None:
        if self.scheme == "legacy":
            prime, low, shift = np.uint64((1 << 61) - 1), np.uint64((1 << 32) - 1), np.uint64(61)
            hashes = hashes.astype(np.uint64)
        else:
            hashes = hashes ^ (hashes >> np.uint32(16))
            hashes *= np.uint32(0x85EBCA6B)
            hashes ^= hashes >> np.uint32(13)
            hashes *= np.uint32(0xC2B2AE35)
            hashes ^= hashes >> np.uint32(16)
        buffer = np.empty_like(hashes)
        for n in range(self.num_perm):
            np.multiply(hashes, self.a[n], out=buffer)
            buffer += self.b[n]
            if self.scheme == "legacy":  # modulo a Mersenne prime by shift and add
                buffer = (buffer & prime) + (buffer >> shift)
                buffer = (buffer + (buffer >= prime)) & low
            result[:, n] = np.minimum.reduceat(buffer, starts)


def sketch(texts: Sequence[str], minhash: MinHash, words: int = 5, chars: int = 5) -> np.ndarray:
    """Signatures uint32[len(texts), num_perm] of the shingles of texts."""
    return minhash.signatures([hash_shingles(shingles(text, words, chars)) for text in texts])


def bands_and_rows(num_perm: int, threshold: float, recall: float = 0.99) -> tuple[int, int]:
    """(bands, rows) with the longest bands that still make pairs at the threshold candidates with this probability.

    A pair of similarity J shares a band with probability 1 - (1 - J^rows)^bands. Candidates are compared by their
    whole signatures afterwards, so that only missed pairs cost quality.
    """
    for rows in range(num_perm, 1, -1):
        bands = num_perm // rows
        if 1 - (1 - threshold**rows) ** bands >= recall:
            return bands, rows
    return num_perm, 1


def band_keys(signatures: np.ndarray, bands: int, rows: int, within: np.ndarray | None = None) -> np.ndarray:
    """uint64[bands, n]: a hash of each band of each signature, and of `within` uint64[n], if given."""
    n = len(signatures)
    keys = np.empty((bands, n), np.uint64)
    factor = np.uint64(0x9E3779B97F4A7C15)
    for begin in range(0, n, 1 << 16):
        part = np.asarray(signatures[begin : begin + (1 << 16)])
        for band in range(bands):
            key = np.zeros(len(part), np.uint64) if within is None else within[begin : begin + len(part)].copy()
            for row in range(band * rows, (band + 1) * rows):
                key ^= key >> np.uint64(29)
                key *= factor
                key += part[:, row]
            keys[band, begin : begin + len(part)] = key
    return keys


def similarity(signatures: np.ndarray, i: np.ndarray, j: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """float[n]: the estimated Jaccard similarity of signatures[i] and other[j] (default: signatures[j])."""
    other = signatures if other is None else other
    parts = [
        (signatures[i[begin : begin + _PAIRS]] == other[j[begin : begin + _PAIRS]]).mean(1)
        for begin in range(0, len(i), _PAIRS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def components(
    signatures: np.ndarray,
    keys: np.ndarray,
    threshold: float,
    order: np.ndarray | None = None,
    window: int = 64,
) -> np.ndarray:
    """int64[n]: for each document the first one of its connected component of near-duplicates.

    Two documents are joined when they share a band (`keys`, from `band_keys`) and their estimated similarity is at
    least the threshold. Within a band each document is compared with the next `window` ones in `order` (an int64[n]
    permutation that should depend on contents alone), which keeps time linear; it is exact for groups of up to
    window + 1. It repeats on the first documents until nothing is joined, so that doing it again to these alone
    joins nothing either.
    """
    parent = np.arange(len(signatures))
    active = np.arange(len(signatures)) if order is None else np.asarray(order)
    joined = True
    while joined:
        joined = False
        for band in keys:
            key = band[active]
            sort = np.argsort(key, kind="stable")
            key, documents = key[sort], active[sort]
            place = np.arange(len(documents))
            for distance in range(1, window + 1):
                place = place[place + distance < len(documents)]
                place = place[key[place] == key[place + distance]]
                if not len(place):
                    break
                i, j = documents[place], documents[place + distance]
                apart = _find(parent, i) != _find(parent, j)
                i, j = i[apart], j[apart]
                near = similarity(signatures, i, j) >= threshold
                for a, b in zip(i[near].tolist(), j[near].tolist()):
                    joined |= _join(parent, a, b)
        active = active[parent[active] == active]
    return _find(parent, np.arange(len(signatures)))


def _find(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    roots = parent[nodes]
    while not np.array_equal(above := parent[roots], roots):
        roots = above
    parent[nodes] = roots
    return roots


def _join(parent: np.ndarray, a: int, b: int) -> bool:
    while parent[a] != a:
        a = int(parent[a])
    while parent[b] != b:
        b = int(parent[b])
    parent[max(a, b)] = min(a, b)
    return a != b


def matches(
    signatures: np.ndarray,
    keys: np.ndarray,
    threshold: float,
    among: np.ndarray,
    ask: np.ndarray,
    window: int = 64,
) -> np.ndarray:
    """int64[len(ask)]: for each document of `ask` one of `among` that is a near-duplicate, or -1.

    Both are indices into signatures and keys. Each is compared with at most `window` documents of each band.
    """
    found = np.full(len(ask), -1)
    for band in keys:
        sort = among[np.argsort(band[among], kind="stable")]
        key, wanted = band[sort], band[ask]
        left, right = np.searchsorted(key, wanted, "left"), np.searchsorted(key, wanted, "right")
        open_ = np.flatnonzero((found < 0) & (left < right))
        for step in range(window):
            open_ = open_[left[open_] + step < right[open_]]
            if not len(open_):
                break
            candidates = sort[left[open_] + step]
            near = similarity(signatures, ask[open_], candidates) >= threshold
            found[open_[near]] = candidates[near]
            open_ = open_[~near]
    return found
