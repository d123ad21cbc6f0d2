import math

import numpy as np
import pytest

from vfm.errors import UserError
from vfm.thresholds import Sigmoid, Threshold, fit_sigmoid, threshold

PLACES = np.array([100, 200, 400, 800, 1600, 3200, 6400])


def test_the_curve_that_made_the_scores_is_found():
    for middle, slope in [(500, 1.5), (250, 4.0), (3000, 0.8)]:
        true = Sigmoid(math.log(middle), slope)
        found = fit_sigmoid(PLACES, true(PLACES))
        assert math.exp(found.middle) == pytest.approx(middle, rel=1e-4)
        assert found.slope == pytest.approx(slope, rel=1e-3)
        assert found.inverse(0.5) == pytest.approx(middle, rel=1e-4)
        assert true(true.inverse(0.2)) == pytest.approx(0.2)
    true = Sigmoid(3.0, 2.0, floor=0.25, ceiling=0.9, log=False)
    x = np.linspace(0, 6, 9)
    found = fit_sigmoid(x, true(x), log=False, floor=0.25, ceiling=0.9)
    assert (found.middle, found.slope) == (pytest.approx(3.0, rel=1e-4), pytest.approx(2.0, rel=1e-3))


@pytest.mark.parametrize("kind", ["runs", "courses"])
def test_the_interval_covers_the_true_place(kind):
    """Seeds differ in the place of the step, and each score is a share of 200 answers. Runs are independent; the scores
    of a course share their seed."""
    rng, covered, width = np.random.default_rng(0), 0, []
    draws, seeds, middle, sigma = 200, 5, math.log(600), 0.35
    for draw in range(draws):
        shift = rng.normal(0, sigma, (seeds, 1 if kind == "courses" else len(PLACES)))
        p = Sigmoid(0.0, 3.0, log=False)(np.log(PLACES)[None] - middle - shift)
        y = rng.binomial(200, p) / 200
        x = np.broadcast_to(PLACES, y.shape).ravel()
        groups = np.repeat(np.arange(seeds), len(PLACES)) if kind == "courses" else None
        found = threshold(x, y.ravel(), groups=groups, bootstrap=200, rng=draw)
        assert found.state == "found"
        covered += found.low <= 600 <= found.high
        width.append(found.high / found.low)
    assert covered >= 0.9 * draws
    assert np.median(width) < 3


def test_other_levels():
    y = Sigmoid(math.log(500), 2.0)(PLACES)
    low, high = (threshold(PLACES, y, level, bootstrap=50).value for level in (0.2, 0.8))
    assert low == pytest.approx(500 * 4 ** (-1 / 2), rel=0.01) and high == pytest.approx(500 * 4 ** (1 / 2), rel=0.01)


def test_not_reached_and_the_like_are_said():
    seeds = lambda y: (np.repeat(PLACES, 3), np.repeat(y, 3))
    never = threshold(*seeds([0, 0, 0, 0.01, 0.02, 0.1, 0.3]))
    assert (never.state, str(never)) == ("not reached", "not reached (> 6,400)") and math.isnan(never.value)
    assert str(threshold(*seeds([0.6, 0.7, 0.8, 0.9, 1, 1, 1]))) == "< 100"
    for y in ([0.9, 0.8, 0.6, 0.4, 0.3, 0.1, 0], [0.6, 0.4, 0.6, 0.4, 0.6, 0.4, 0.45], [0.9, 0.4, 0, 0, 0, 0, 0]):
        assert str(threshold(*seeds(y))) == "not identified", y
    assert threshold([1, 2], [0.0, 1.0]).state == "not identified"
    between = threshold(*seeds([0, 0, 0, 1, 1, 1, 1]))
    assert (between.state, between.low, between.high) == ("between", pytest.approx(400), pytest.approx(800))
    assert 400 < between.value < 800


def test_one_seed_gives_no_interval():
    y = Sigmoid(math.log(600), 2.0)(PLACES)
    for found in (threshold(PLACES, y), threshold(PLACES, y, groups=["a"] * len(y))):
        assert found.state == "no interval" and str(found) == "600 (no interval)" and math.isnan(found.low)
    jump = (PLACES >= 800).astype(float)
    for found in (threshold(PLACES, jump), threshold(PLACES, jump, groups=[0] * 7)):
        assert found.state == "no interval" and 400 < found.value < 800
    # Nor where a single place has but one score.
    assert threshold([*PLACES, *PLACES[1:]], [*y, *y[1:]]).state == "no interval"
    assert threshold(PLACES, Sigmoid(math.log(60), 2.0)(PLACES) - 0.3).state == "below"


@pytest.mark.parametrize("means", [[0.8, 0.45, 0.9, 0.95, 1, 1, 1], [0.49, 0.6, 0.62, 0.65, 0.7, 0.7, 0.75]])
def test_a_crossing_before_the_first_place_is_below(means):
    y = np.clip(np.array(means) + np.linspace(-0.05, 0.05, 5)[:, None], 0, 1)
    found = threshold(np.tile(PLACES, 5), y.ravel())
    assert found.state == "below" and found.low == -math.inf and 100 <= found.high < 200 and math.isnan(found.value)


def test_scores_that_jump_to_and_fro_are_between_the_outermost():
    found = threshold(np.repeat(PLACES, 3), np.repeat([0, 1, 0, 1, 1, 1, 1], 3))
    assert (found.state, found.low, found.high) == ("between", pytest.approx(100), pytest.approx(800))
    for y in ([0, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 1, 1, 1]):
        assert threshold(np.repeat(PLACES, 3), np.repeat(y, 3)).state == "not identified"


def test_an_interval_without_a_beginning():
    y = np.array([[0.2, 0.4, 0.7, 0.9, 1, 1, 1], [0.7, 0.8, 0.9, 1, 1, 1, 1], [0.3, 0.5, 0.7, 0.9, 1, 1, 1]])
    found = threshold(np.tile(PLACES, 3), y.ravel(), groups=np.repeat(range(3), 7))
    assert found.state == "found" and found.low == -math.inf and "[before, " in str(found)


def test_an_interval_without_an_end():
    """One of four seeds is above the level at the last place alone, and two of them nowhere."""
    y = np.zeros((4, 7))
    y[:, 5], y[:, 6] = [0.5, 0.2, 0.1, 0.9], [0.9, 0.3, 0.2, 1.0]
    found = threshold(np.tile(PLACES, 4), y.ravel(), groups=np.repeat(np.arange(4), 7))
    assert found.state == "found" and found.high == math.inf and str(found).endswith("beyond]")


def test_seeds_that_differ_make_the_interval_wide():
    rng = np.random.default_rng(0)
    width = []
    for sigma in (0.05, 0.5):
        p = Sigmoid(0.0, 3.0, log=False)(np.log(PLACES)[None] - math.log(600) - rng.normal(0, sigma, (5, 7)))
        found = threshold(np.tile(PLACES, 5), p.ravel())
        width.append(math.log(found.high / found.low))
    assert width[1] > 3 * width[0] > 0


def test_units():
    found = Threshold(10.0, 5.0, 20.0, "found").scaled(1e6)
    assert (found.value, found.low, found.high) == (1e7, 5e6, 2e7) and str(found) == "1e+07 [5e+06, 2e+07]"


@pytest.mark.parametrize(
    "x, y, more, message",
    [
        ([1, 2], [0.1], {}, "as many scores"),
        ([3, 3], [0.1, 0.2], {}, "two places"),
        ([0, 1, 2], [0, 0, 1], {}, "above 0"),
        ([1, 2, 3], [0, np.nan, 1], {}, "finite"),
        ([1, 2, 3], [0, 0, 1], {"level": 1.0}, "level=1.0 must be between"),
        ([1, 2, 3], [0, 0, 1], {"floor": 1.0}, "floor=1.0"),
    ],
    ids=["sizes", "places", "logarithm", "nan", "level", "floor"],
)
def test_refusals(x, y, more, message):
    with pytest.raises(UserError, match=message):
        threshold(x, y, **more)
