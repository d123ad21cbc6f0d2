"""The statistics of every corruption, and that what is taken away can be put back."""

import numpy as np
import pytest
from scipy import stats

from vfm.data import corruption

MASK, START, END, EOS = 1000, 1001, 1002, 2
RANDOM_IDS = np.arange(10, 900)


def generator(seed=0):
    return np.random.default_rng(seed)


def text(n, seed=0):
    return generator(seed).integers(10, 900, n)


def probability(counts, expected):
    """The p value of a chi-squared test; classes with fewer than 5 expected are put together."""
    rare = expected < 5
    merge = lambda x: np.append(x[~rare], x[rare].sum()) if rare.any() else x
    return stats.chisquare(merge(counts), merge(expected)).pvalue


def poisson_test(lengths, positive):
    """The p value of `lengths` as draws of Poisson(3), on the condition that they are not 0 if `positive`."""
    p = stats.poisson(3).pmf(np.arange(30))
    p[0] *= not positive
    return probability(np.bincount(lengths, minlength=30)[:30], len(lengths) * p / p.sum())


# ------------------------------------------------------------------------------------ masked tokens


@pytest.mark.parametrize("n", [30, 512])
@pytest.mark.parametrize("unit", corruption.UNITS)
def test_masking_statistics(n, unit):
    rng, shares, rates = generator(1), np.zeros(3), []
    for seed in range(min(1000, 240_000 // n)):
        ids, maskable = text(n, seed), generator(seed).random(n) < 0.9
        starts = generator(seed + 1).random(n) < 0.5
        part = corruption.mask_tokens(
            ids, rng, mask_id=MASK, random_ids=RANDOM_IDS, maskable=maskable, unit=unit, word_starts=starts
        )
        tokens, chosen = part["tokens"], part["loss_mask"] > 0
        np.testing.assert_array_equal(part["targets"], ids)
        np.testing.assert_array_equal(tokens[~chosen], ids[~chosen])
        assert not (chosen & ~maskable).any()
        rates.append((chosen.sum(), maskable.sum()))
        changed = tokens != ids
        shares += (
            (chosen & (tokens == MASK)).sum(),
            (chosen & changed & (tokens != MASK)).sum(),
            (chosen & ~changed).sum(),
        )
    chosen, maskable = np.sum(rates, axis=0)
    # A word that would be cut is left out, which short rows notice.
    assert chosen / maskable == pytest.approx(0.15, abs=0.02 if unit == "word" and n < 100 else 0.005)
    # A random token is now and then the one that was there. A span is replaced as one: fewer draws.
    expected = [0.8, 0.1 * 889 / 890, 0.1 + 0.1 / 890]
    np.testing.assert_allclose(shares / shares.sum(), expected, atol=0.02 if unit == "span" else 0.01)


def test_whole_words_are_masked_as_a_whole_and_spans_are_runs():
    ids, starts = text(300), np.arange(300) % 3 == 0
    common = {"mask_id": MASK, "random_ids": RANDOM_IDS, "maskable": np.ones(300, bool)}
    whole = corruption.mask_tokens(ids, generator(), unit="word", word_starts=starts, **common)
    assert set(whole["loss_mask"].reshape(-1, 3).sum(axis=1)) == {0, 3} and whole["loss_mask"].sum() == 45
    runs = [[], []]
    for seed in range(50):
        for found, unit in zip(runs, ("token", "span")):
            mask = corruption.mask_tokens(ids, generator(seed), unit=unit, **common)["loss_mask"]
            found.append(np.sum(np.diff(mask, prepend=0) > 0))
    assert np.mean(runs[1]) < 0.5 * np.mean(runs[0])


def test_pairs_of_sentences():
    ids, other = np.arange(100), np.arange(1000, 1200)
    starts = np.isin(np.arange(100), [0, 10, 40, 90])
    labels, cuts = [], set()
    for seed in range(2000):
        a, b, label = corruption.sentence_pair(ids, starts, generator(seed), method="nsp", other=lambda rng: other)
        labels.append(label)
        cuts.add(len(a))
        np.testing.assert_array_equal(a, ids[: len(a)])
        np.testing.assert_array_equal(b, ids[len(a) :] if label == 0 else other[: 100 - len(a)])
        a, b, swapped = corruption.sentence_pair(ids, starts, generator(seed), method="sop", other=None)
        np.testing.assert_array_equal(np.concatenate([b, a] if swapped else [a, b]), ids)
    assert cuts == {10, 40, 90}
    assert np.mean(labels) == pytest.approx(0.5, abs=0.03)
    assert len(corruption.sentence_pair(ids[:2], starts[:2], generator(), method="sop", other=None)[0]) == 1


# ------------------------------------------------------------------------------------ spans


def test_segmentation_is_uniform_over_all_ways_to_cut():
    rng, seen = generator(), {}
    for _ in range(6000):
        lengths = tuple(corruption.random_segmentation(6, 3, rng))
        assert sum(lengths) == 6 and min(lengths) >= 1
        seen[lengths] = seen.get(lengths, 0) + 1
    assert len(seen) == 10  # 5 places for 2 cuts
    assert stats.chisquare(list(seen.values())).pvalue > 0.001


def test_spans_are_placed_uniformly_and_apart():
    rng, seen, lengths = generator(), {}, np.array([2, 0, 1])
    for _ in range(8000):
        starts = corruption.place(lengths, 7, rng)
        ends = starts + lengths
        assert starts[0] >= 0 and ends[-1] <= 7 and (starts[1:] > ends[:-1]).all()
        seen[tuple(starts)] = seen.get(tuple(starts), 0) + 1
    assert len(seen) == 10  # 4 tokens are free: 5 gaps for 3 spans
    assert stats.chisquare(list(seen.values())).pvalue > 0.001


def test_lengths_of_span_corruption_are_those_of_t5():
    assert corruption.span_corruption_lengths(568) == (512, 114)  # from the T5 code base, for inputs of 512 tokens
    assert corruption.noise_counts(568, 0.15, 3.0) == (85, 28)
    for n in range(2, 200):
        inputs, targets = corruption.span_corruption(text(n), generator(n), sentinels=range(1000, 1100), eos_id=EOS)
        assert (len(inputs), len(targets)) == corruption.span_corruption_lengths(n)


def put_back(inputs, targets, sentinels):
    """Reads the targets as {sentinel: span} and writes each span in its place."""
    spans, current = {}, None
    for token in targets[:-1].tolist():
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in inputs[:-1].tolist() for t in spans.get(token, [token])]


@pytest.mark.parametrize("rate, mean_span", [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.9, 1.0)])
def test_span_corruption_can_be_undone_and_has_its_rate(rate, mean_span):
    lost = total = spans = 0
    for seed in range(200):
        ids, sentinels = text(int(generator(seed).integers(100, 600)), seed), range(2000, 1000, -1)
        inputs, targets = corruption.span_corruption(
            ids, generator(seed), sentinels=sentinels, eos_id=EOS, rate=rate, mean_span=mean_span
        )
        assert inputs.dtype == targets.dtype == np.int32 and inputs[-1] == targets[-1] == EOS
        assert put_back(inputs, targets, sentinels) == ids.tolist()
        used = [t for t in inputs.tolist() if t in sentinels]
        assert used == list(range(2000, 2000 - len(used), -1)) == [t for t in targets.tolist() if t in sentinels]
        total, spans = total + len(ids), spans + len(used)
        lost += len(targets) - 1 - len(used)
    assert lost / total == pytest.approx(rate, abs=0.005)
    if rate < 0.5:
        assert lost / spans == pytest.approx(mean_span, rel=0.05)


def infilled(ids, seed, **options):
    """Corrupted ids and the lengths of the spans, found from the distinct tokens that are left."""
    found = corruption.text_infilling(ids, generator(seed), mask_id=MASK, **options)
    assert found.dtype == np.int32
    place = {token: i for i, token in enumerate(ids.tolist())}
    lengths, before = [], -1
    for left, right in zip([None, *found], [*found, None]):
        if left == MASK:
            after = len(ids) if right is None else place[right]
            lengths.append(after - before - 1)
        else:
            assert right in (None, MASK) or left is None or place[right] == place[left] + 1
        if right is not None and right != MASK:
            before = place[right]
    return found, lengths


@pytest.mark.parametrize("n", [40, 512])
def test_infilled_spans_have_poisson_lengths_and_the_rate(n):
    lengths, masked, total, ids = [], 0, 0, np.arange(2000, 2000 + n)
    for seed in range(60_000 // n):
        found, spans = infilled(ids, seed)
        lengths += spans
        masked += n - (found != MASK).sum()
        total += n
    assert masked / total == pytest.approx(0.3, abs=0.01)
    assert len(lengths) > 5000 and min(lengths) == 0
    assert poisson_test(lengths, positive=False) > 0.001
    # Kolmogorov–Smirnov on the same: for discrete values its p is a lower bound.
    jitter = generator().random(len(lengths))
    reference = generator(1).poisson(3, len(lengths)) + generator(2).random(len(lengths))
    assert stats.ks_2samp(np.asarray(lengths) + jitter, reference).pvalue > 0.001


def test_infilling_of_short_texts():
    for n in range(1, 8):
        for seed in range(100):
            found, lengths = infilled(np.arange(2000, 2000 + n), seed, rate=0.9)
            assert len(found) <= n + corruption.infilling_spans(n, 0.9, 3.0)
            assert sum(lengths) <= n


def test_sentences_change_places_as_a_whole():
    ids, starts = np.arange(12), np.isin(np.arange(12), [0, 3, 7, 8])
    orders = set()
    for seed in range(500):
        found = corruption.permute_sentences(ids, starts, generator(seed))
        assert sorted(found) == ids.tolist()
        heads = [t for t in found.tolist() if starts[t]]
        assert found.tolist() == sum(([*range(h, {0: 3, 3: 7, 7: 8, 8: 12}[h])] for h in heads), [])
        orders.add(tuple(heads))
    assert len(orders) == 24


# ------------------------------------------------------------------------------------ GLM


def test_blanks_of_tokens_are_positive_poisson_and_cover_the_rate():
    lengths = []
    for seed in range(100):
        spans = corruption.token_blanks(1000, generator(seed))
        lengths += spans[:, 1].tolist()
        assert spans[:, 1].sum() >= 150 > spans[:-1, 1].sum() - spans[:, 1].max()
        assert len(spans) <= corruption.blank_count(1000, 0.15, 3.0)
    assert poisson_test(lengths, positive=True) > 0.001
    for n in range(1, 30):
        spans = corruption.token_blanks(n, generator(n))
        assert 0.15 * n <= spans[:, 1].sum() <= n and (spans[1:, 0] > spans[:-1].sum(axis=1)).all()


def test_blanks_of_sentences_and_documents():
    starts = np.isin(np.arange(50), [0, 5, 20, 21, 40])
    for seed in range(100):
        spans = corruption.sentence_blanks(starts, generator(seed), 0.15, 10)
        assert all(starts[s] and (s + k == 50 or starts[s + k]) and not starts[s + 1 : s + k].any() for s, k in spans)
        assert spans[:, 1].sum() >= 7.5 and (np.diff(spans[:, 0]) > 0).all()
        assert len(corruption.sentence_blanks(starts, generator(seed), 0.9, 2)) == 2
    lengths = np.array([corruption.document_blank(100, generator(seed))[0] for seed in range(2000)])
    assert (lengths.sum(axis=1) == 100).all() and lengths[:, 1].min() == 50 and lengths[:, 1].max() == 100
    assert stats.kstest(lengths[:, 1] - generator().random(2000), stats.uniform(49, 51).cdf).pvalue > 0.001


def test_blank_infilling_is_that_of_figure_2():
    """x1 … x6 with the blanks x3 and x5 x6: what the paper draws, from 0, for both orders of the blanks."""
    ids, spans = np.arange(1, 7) * 10, np.array([[2, 1], [4, 2]])
    part_a = [10, 20, MASK, 40, MASK]
    first = [START, 30], [30, END], [2, 2], [1, 2]
    second = [START, 50, 60], [50, 60, END], [4, 4, 4], [1, 2, 3]
    expected = {
        "".join(map(str, (a[0][1], b[0][1]))): tuple(x + y for x, y in zip(a, b))
        for a, b in ((first, second), (second, first))
    }
    seen = set()
    for seed in range(20):
        part = corruption.blank_infilling(ids, spans, generator(seed), mask_id=MASK, start_id=START, end_id=END)
        tokens, targets, positions, blocks = expected["3050" if part["tokens"][6] == 30 else "5030"]
        np.testing.assert_array_equal(part["tokens"], part_a + tokens)
        np.testing.assert_array_equal(part["targets"][5:], targets)
        np.testing.assert_array_equal(part["loss_mask"], [0] * 5 + [1] * 5)
        np.testing.assert_array_equal(part["prefix"], [True] * 5 + [False] * 5)
        np.testing.assert_array_equal(part["positions"], [0, 1, 2, 3, 4, *positions])
        np.testing.assert_array_equal(part["block_positions"], [0] * 5 + blocks)
        seen.add(int(part["tokens"][6]))
    assert seen == {30, 50}


def test_blanks_can_be_filled_in_again():
    for seed in range(100):
        ids = text(int(generator(seed).integers(1, 80)), seed)
        spans = corruption.token_blanks(len(ids), generator(seed))
        part = corruption.blank_infilling(ids, spans, generator(seed), mask_id=MASK, start_id=START, end_id=END)
        assert len(part["tokens"]) == len(ids) + 2 * len(spans)
        a = int(part["prefix"].sum())
        filled = {}
        for block in np.split(np.arange(a, len(part["tokens"])), np.flatnonzero(part["tokens"] == START)[1:] - a):
            (mask,) = set(part["positions"][block].tolist())
            assert part["tokens"][mask] == MASK and part["targets"][block[-1]] == END
            np.testing.assert_array_equal(part["tokens"][block[1:]], part["targets"][block[:-1]])
            np.testing.assert_array_equal(part["block_positions"][block], 1 + np.arange(len(block)))
            filled[mask] = part["targets"][block[:-1]].tolist()
        found = [t for i, token in enumerate(part["tokens"][:a].tolist()) for t in filled.get(i, [token])]
        assert found == ids.tolist()


# ------------------------------------------------------------------------------------ prefix LM, XLNet


@pytest.mark.parametrize("ends", [True, False])
def test_every_split_of_a_prefix_is_equally_likely(ends):
    ids, following = np.arange(10, 20), np.arange(11, 20 if ends else 21)
    sizes = []
    for seed in range(3000):
        part = corruption.prefix_lm(ids, following, generator(seed))
        k = int(part["prefix"].sum())
        np.testing.assert_array_equal(part["prefix"], np.arange(10) < k)
        np.testing.assert_array_equal(part["targets"][: len(following)], following)
        # The last of the prefix predicts the first token behind it.
        np.testing.assert_array_equal(part["loss_mask"], (np.arange(10) >= k - 1) & (np.arange(10) < len(following)))
        sizes.append(k)
    assert stats.chisquare(np.bincount(sizes)[1:]).pvalue > 0.001 and max(sizes) == len(following)
    assert corruption.prefix_lm(ids[:1], ids[:0], generator())["loss_mask"].sum() == 0


def test_permutation_orders():
    maskable, first = np.arange(13) % 4 > 0, np.zeros(13)
    counts = []
    for seed in range(3000):
        order = corruption.permutation_order(maskable, generator(seed), predict=1 / 6)
        assert not order[~maskable].any()
        count = int((order > 0).sum())
        assert sorted(order[order > 0]) == list(range(1, count + 1))
        counts.append(count)
        first += order == 1
    assert np.mean(counts) == pytest.approx(9 / 6, abs=0.05)
    assert stats.chisquare(first[maskable]).pvalue > 0.001
    assert sorted(corruption.permutation_order(maskable, generator(), predict=1.0)[maskable]) == list(range(1, 10))


def test_stochastic_rounding_has_the_right_mean():
    rng = generator()
    drawn = [corruption.stochastic_round(2.3, rng) for _ in range(4000)]
    assert set(drawn) == {2, 3} and np.mean(drawn) == pytest.approx(2.3, abs=0.03)
    assert {corruption.stochastic_round(2.0, rng) for _ in range(100)} == {2}
