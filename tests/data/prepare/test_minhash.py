import hashlib
import json
import pathlib
import random
import zlib

import numpy as np
import pytest

from vfm.data.prepare.minhash import (
    MinHash,
    band_keys,
    bands_and_rows,
    components,
    hash_shingles,
    matches,
    shingles,
    similarity,
    sketch,
)
from vfm.errors import UserError

FIXTURE = pathlib.Path(__file__).parents[3].parent / "shared" / "fixtures" / "functions" / "minhash_dedup"


def jaccard(a, b):
    return len(a & b) / len(a | b)


def edited(words, changes, rng):
    words = list(words)
    for place in rng.sample(range(len(words)), changes):
        words[place] = f"x{rng.randrange(10**6)}"
    return words


@pytest.fixture(scope="module")
def corpus():
    """Texts of random words, then copies of them with few or many words changed."""
    rng = random.Random(0)
    base = [[f"w{int(rng.paretovariate(0.7)) % 5000}" for _ in range(rng.randrange(60, 200))] for _ in range(60)]
    copies = [edited(words, int(len(words) * rng.uniform(0, 0.06)), rng) for words in base for _ in range(3)]
    return [" ".join(words) for words in base + copies]


def test_signatures_estimates_and_clusters_of_the_fixture():
    if not FIXTURE.is_dir():
        pytest.skip("no ../shared/fixtures")
    io, arrays = json.loads((FIXTURE / "io.json").read_text()), np.load(FIXTURE / "io.npz")
    params, out = io["params"], io["out"]
    minhash = MinHash(params["num_perm"], params["seed"], scheme="legacy")
    np.testing.assert_array_equal(np.stack([minhash.a, minhash.b]), arrays["out/permutations"])
    sets = [shingles(text, params["ngram"]) for text in params["documents"]]
    signatures = minhash.signatures([hash_shingles(s) for s in sets])
    np.testing.assert_array_equal(signatures, arrays["out/signatures"])
    n = len(sets)
    exact = np.array([[jaccard(a, b) for b in sets] for a in sets])
    np.testing.assert_allclose(exact, arrays["out/jaccard"])
    i, j = (axis.ravel() for axis in np.indices((n, n)))
    np.testing.assert_allclose(similarity(signatures, i, j).reshape(n, n), arrays["out/jaccard_estimate"])
    roots = components(signatures, band_keys(signatures, *out["lsh_bands_rows"]), params["threshold"])
    clusters = {}
    for document, root in enumerate(roots.tolist()):
        clusters.setdefault(root, []).append(document)
    assert list(clusters.values()) == out["clusters"]


@pytest.mark.parametrize("scheme", ["affine32", "legacy"])
def test_signatures_equal_those_of_datasketch(scheme, corpus):
    datasketch = pytest.importorskip("datasketch", minversion="2.0")
    texts = [*corpus[:40], "one two", "", "…", "秦川雄帝宅函谷壮皇居", " ".join(f"w{n}" for n in range(40_000))]
    ours = sketch(texts, MinHash(48, 7, scheme))
    for text, signature in zip(texts, ours):
        theirs = datasketch.MinHash(48, 7, scheme=scheme)
        theirs.update_batch([shingle.encode() for shingle in shingles(text)])
        np.testing.assert_array_equal(signature, theirs.hashvalues)


def test_hashes_are_the_first_bytes_of_sha1():
    expected = [int.from_bytes(hashlib.sha1(text.encode()).digest()[:4], "little") for text in ("a b", "我")]
    assert hash_shingles(["a b", "我"]).tolist() == expected


def test_error_of_the_estimate_is_that_of_the_theory(corpus):
    sets = [shingles(text) for text in corpus]
    rng = random.Random(1)
    pairs = [((n - 60) // 3, n) for n in range(60, len(sets))] + [
        tuple(rng.sample(range(len(sets)), 2)) for _ in range(200)
    ]
    exact = np.array([jaccard(sets[i], sets[j]) for i, j in pairs])
    assert (exact > 0.1).sum() > 150 and len(np.unique(exact)) > 100
    for num_perm in (64, 256):
        signatures = sketch(corpus, MinHash(num_perm))
        error = similarity(signatures, *np.array(pairs).T) - exact
        theory = np.sqrt((exact * (1 - exact)).mean() / num_perm)
        assert abs(error.mean()) < 0.5 * theory  # no bias
        assert 0.7 * theory < np.sqrt((error**2).mean()) < 1.3 * theory


def test_shingles_of_words_and_characters():
    assert shingles("The cat  SAT. on a mat", words=3) == {"the cat sat", "cat sat on", "sat on a", "on a mat"}
    assert shingles("秦川雄帝宅", chars=3) == {"秦 川 雄", "川 雄 帝", "雄 帝 宅"}
    assert shingles("two words") == {"two words"} and shingles("?!") == {"?!"} and shingles("") == {""}
    assert shingles("a b 我们 c d e", words=3, chars=5) >= {"b 我 们"}  # few unspaced letters: words


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands, rows = bands_and_rows(128, threshold)
    assert bands * rows <= 128 and 1 - (1 - threshold**rows) ** bands >= 0.99
    assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.99


def test_components_are_those_of_all_pairs(corpus):
    signatures = sketch(corpus, MinHash(128))
    keys = band_keys(signatures, *bands_and_rows(128, 0.8))
    n = len(corpus)
    i, j = np.triu_indices(n, 1)
    near = similarity(signatures, i, j) >= 0.8
    near &= (keys[:, i] == keys[:, j]).any(0)
    parent = list(range(n))
    for a, b in zip(i[near].tolist(), j[near].tolist()):
        old, new = sorted((parent[a], parent[b]), reverse=True)
        parent = [new if root == old else root for root in parent]
    assert 60 < len(set(parent)) < n - 60
    assert components(signatures, keys, 0.8).tolist() == parent
    order = np.random.default_rng(0).permutation(n)
    assert components(signatures, keys, 0.8, order).tolist() == parent


@pytest.mark.parametrize("window", [1, 8])
def test_a_large_cluster_is_found_whole_in_a_small_window(window):
    rng = random.Random(3)
    words = [f"w{n}" for n in range(300)]
    texts = [" ".join(edited(words, 2, rng)) for _ in range(300)]
    signatures = sketch(texts, MinHash(64))
    keys = band_keys(signatures, *bands_and_rows(64, 0.8))
    roots = components(signatures, keys, 0.8, window=window)
    assert (roots == 0).mean() > 0.97
    # Again on what is kept: nothing is joined.
    kept = np.flatnonzero(roots == np.arange(300))
    assert len(np.unique(components(signatures[kept], keys[:, kept], 0.8, window=window))) == len(kept)


def test_texts_that_must_not_be_compared_share_no_band(corpus):
    signatures = sketch(corpus[:2] * 2, MinHash(64))
    within = np.array([1, 1, 2, 2], np.uint64)
    assert components(signatures, band_keys(signatures, 10, 6), 0.8).tolist() == [0, 1, 0, 1]
    assert components(signatures, band_keys(signatures, 10, 6, within), 0.8).tolist() == [0, 1, 2, 3]


def test_matches_find_a_partner_on_the_other_side(corpus):
    signatures = sketch(corpus, MinHash(128))
    keys = band_keys(signatures, *bands_and_rows(128, 0.8))
    among, ask = np.arange(60), np.arange(60, len(corpus))
    found = matches(signatures, keys, 0.8, among, ask)
    estimates = similarity(signatures, *(axis.ravel() for axis in np.meshgrid(ask, among, indexing="ij")))
    best = estimates.reshape(len(ask), len(among)).max(1)
    assert ((found >= 0) == (best >= 0.8)).mean() > 0.98 and 20 < (found >= 0).sum() < 170
    assert set(found[found >= 0].tolist()) <= set(among.tolist())
    assert (similarity(signatures, ask[found >= 0], found[found >= 0]) >= 0.8).all()
    assert (matches(signatures, keys, 0.8, among[:0], ask) == -1).all()


def test_work_is_linear_in_a_family_of_similar_texts(monkeypatch):
    """Texts that share bands without being near-duplicates must not be compared all with all."""
    rng = random.Random(4)
    words = [f"w{n}" for n in range(60)]
    texts = [" ".join(edited(words, 3, rng)) for _ in range(1200)]
    signatures = sketch(texts, MinHash(64))
    keys = band_keys(signatures, 32, 2)
    compared = []
    monkeypatch.setattr(
        "vfm.data.prepare.minhash.similarity", lambda s, i, j: compared.append(len(i)) or similarity(s, i, j)
    )
    counts = []
    for n in (600, 1200):
        compared.clear()
        components(signatures[:n], keys[:, :n], 0.9, window=4)
        counts.append(sum(compared))
    assert counts[0] > 1000 and counts[1] < 2.5 * counts[0]


def test_remainder_by_the_mersenne_prime_at_its_multiples():
    minhash, prime = MinHash(16, scheme="legacy"), (1 << 61) - 1
    minhash.a[:] = 1
    minhash.b[:8] = [k * prime - 5 for k in range(1, 9)]
    minhash.b[8:] = [k * prime - 6 for k in range(1, 9)]
    signature = minhash.signatures([np.array([5], np.uint32)])[0]
    assert signature.tolist() == [0] * 8 + [(prime - 1) & 0xFFFFFFFF] * 8


def test_again_on_what_is_kept_in_any_order_joins_nothing():
    """Also where the window is too small to compare all: many families whose texts share bands."""
    rng = random.Random(5)
    root = [f"w{n}" for n in range(60)]
    families = [edited(root, 4, rng) for _ in range(30)]
    texts = [" ".join(edited(families[n % 30], 1, rng)) for n in range(600)]
    signatures = sketch(texts, MinHash(64))
    keys = band_keys(signatures, 2, 2)
    content = np.array([zlib.crc32(text.encode()) for text in texts])
    by_content = lambda documents: np.argsort(content[documents])
    kept = np.unique(components(signatures, keys, 0.75, by_content(np.arange(600)), window=1))
    assert 30 <= len(kept) < 500
    for seed in range(3):
        again = np.random.default_rng(seed).permutation(kept)
        roots = components(signatures[again], keys[:, again], 0.75, by_content(again), window=1)
        assert len(np.unique(roots)) == len(kept)


def test_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="did you mean 'legacy'"):
        MinHash(scheme="legasy")
