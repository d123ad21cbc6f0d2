"""Where an ability appears: the place at which a score crosses a level, by a fitted sigmoid, with an interval."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm
from scipy.stats import t as student

from vfm.errors import UserError

STEEPEST, FLATTEST = 40.0, 0.2  # slopes: over the least distance of two places, and over the whole range


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """y = floor + (ceiling - floor) / (1 + exp(-slope · (t - middle))), where t is x, or its logarithm with `log`."""

    middle: float
    slope: float
    floor: float = 0.0
    ceiling: float = 1.0
    log: bool = True

    def __call__(self, x) -> np.ndarray:
        t = np.log(x) if self.log else np.asarray(x, float)
        return self.floor + (self.ceiling - self.floor) * expit(self.slope * (t - self.middle))

    def inverse(self, y: float) -> float:
        """The x at which the curve has the height y."""
        t = self.middle + float(logit((y - self.floor) / (self.ceiling - self.floor))) / self.slope
        return math.exp(t) if self.log else t


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The place of a level: value, and the interval [low, high]; -inf, inf: before or beyond all that was measured.

    state: "found"; "no interval": found, but from one group alone or from places with one score, which tell no spread:
    `low` and `high` are nan; "between": no score lies on the way up, so that the level is somewhere between the last
    place before which all scores are below it and the first from which on all are above, which are `low` and `high`;
    "not reached", "below": the curve crosses beyond the last or before the first place, value is nan, and `low` or
    `high` is that place or the end of the interval that lies within; "not identified": the scores do not rise, or there
    are too few places.
    """

    value: float
    low: float
    high: float
    state: str

    def __str__(self) -> str:
        if self.state == "not reached":
            return f"not reached (> {_short(self.low)})"
        if self.state == "below":
            return f"< {_short(self.high)}"
        if self.state == "not identified":
            return self.state
        if self.state == "no interval":
            return f"{_short(self.value)} (no interval)"
        low = _short(self.low) if math.isfinite(self.low) else "before"
        high = _short(self.high) if math.isfinite(self.high) else "beyond"
        return f"{_short(self.value)} [{low}, {high}]"

    def scaled(self, factor: float) -> "Threshold":
        """The same in another unit, such as FLOPs for steps."""
        return dataclasses.replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)


def _short(x: float) -> str:
    return f"{x:,.0f}" if 100 <= abs(x) < 1e6 else f"{x:.3g}"


def fit_sigmoid(
    x: Sequence[float], y: Sequence[float], *, log: bool = True, floor: float = 0.0, ceiling: float = 1.0
) -> Sigmoid:
    """The sigmoid that is nearest to scores y at places x in least squares.

    log: over the logarithm of x. floor, ceiling: the scores far below and far above. Raises UserError for fewer than
    two places, for x that have no logarithm, and for numbers that are not finite.
    """
    t, y = _checked(x, y, log, floor, ceiling)
    places, where = np.unique(t, return_inverse=True)
    count = np.bincount(where)
    means = np.bincount(where, weights=y) / count
    middle, slope = _fit(places, count, ((means - floor) / (ceiling - floor))[None])
    return Sigmoid(float(middle[0]), float(slope[0]), floor, ceiling, log)


def threshold(
    x: Sequence[float],
    y: Sequence[float],
    level: float = 0.5,
    *,
    log: bool = True,
    floor: float = 0.0,
    ceiling: float = 1.0,
    groups: Sequence[Hashable] | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    rng: np.random.Generator | int = 0,
) -> Threshold:
    """Where scores y at places x cross a level, by `fit_sigmoid`, with a bootstrap interval.

    groups: which scores belong together, such as those of one run at its checkpoints: whole groups are drawn. Without
    them, the scores at each place are drawn among themselves; there is no interval where one of them is alone at its
    place, nor for a single group.
    Drawn means are moved away from the measured ones by sqrt(n / (n - 1)) and by Student's over the normal quantile,
    so that few seeds do not make the interval too narrow; the degrees of freedom are those of the groups, or of the
    scores at all places on the way up. A draw that does not cross the level within the places counts as before or
    beyond them, so that the end of the interval is -inf or inf.
    Raises UserError as `fit_sigmoid`, and for a level that is not between floor and ceiling.
    """
    t, y = _checked(x, y, log, floor, ceiling)
    if not floor < level < ceiling:
        raise UserError(f"level={level} must be between floor={floor} and ceiling={ceiling}")
    y, level = (y - floor) / (ceiling - floor), (level - floor) / (ceiling - floor)
    places, where = np.unique(t, return_inverse=True)
    count = np.bincount(where)
    means = np.bincount(where, weights=y) / count
    back = np.exp if log else np.asarray
    first, last = float(back(places[0])), float(back(places[-1]))
    if (means < level).all() and _rises(means):
        return Threshold(math.nan, last, math.inf, "not reached")
    if (means >= level).all():
        return Threshold(math.nan, -math.inf, first, "below")
    unknown = Threshold(math.nan, math.nan, math.nan, "not identified")
    above = np.flatnonzero(means >= level)
    if len(places) < 3 or not len(above) or means[-1] < level <= means[0]:
        return unknown
    offset = float(logit(level))
    middle, slope = _fit(places, count, means[None])
    if _flat(slope, places)[0]:
        return unknown
    value = float(back(middle + offset / slope)[0])
    drawn = _drawn(where, y, count, means, groups, bootstrap, np.random.default_rng(rng))
    if drawn is None:
        if value < first:
            return Threshold(math.nan, -math.inf, first, "below")
        if value > last:
            return Threshold(math.nan, last, math.inf, "not reached")
        return Threshold(value, math.nan, math.nan, "no interval")
    on_the_way = (means > 0.02) & (means < 0.98)
    if not on_the_way.any():  # draws would be all alike
        if not above[0] or means[-1] < level:
            return unknown
        low, high = back(places[above[0] - 1]), back(places[np.flatnonzero(means < level)[-1] + 1])
        return Threshold(value, float(low), float(high), "between")
    middles, slopes = _fit(places, count, drawn)
    values = middles + offset / slopes
    values = np.where(_flat(slopes, places) | (values > places[-1]), np.inf, values)
    values = np.where(values < places[0], -np.inf, values)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    before, beyond = value < first or high == -math.inf, value > last or low == math.inf
    if (low == -math.inf and (high == math.inf or beyond)) or (high == math.inf and before):
        return unknown
    low, high = (end if math.isinf(end) else float(back(end)) for end in (low, high))
    if before:
        return Threshold(math.nan, -math.inf, max(high, first), "below")
    if beyond:
        return Threshold(math.nan, min(low, last), math.inf, "not reached")
    return Threshold(value, low, high, "found")


def _checked(x, y, log, floor, ceiling) -> tuple[np.ndarray, np.ndarray]:
    """(x or its logarithm, y) as arrays."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) < 2:
        raise UserError(f"a sigmoid needs as many scores as places, and two places or more; found {x.shape}, {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or (log and (x <= 0).any()):
        raise UserError("a sigmoid needs finite numbers, and places above 0 where their logarithm is taken")
    if not floor < ceiling:
        raise UserError(f"floor={floor} must be less than ceiling={ceiling}")
    return (np.log(x) if log else x), y


def _rises(means: np.ndarray) -> bool:
    """Whether scores below a level may still be on their way up: none falls far below one before it."""
    return bool((np.maximum.accumulate(means) - means).max() < 0.25)


def _limits(places: np.ndarray) -> tuple[float, float]:
    return FLATTEST / (places[-1] - places[0]), STEEPEST / np.diff(places).min()


def _flat(slopes: np.ndarray, places: np.ndarray) -> np.ndarray:
    return slopes <= 1.01 * _limits(places)[0]


def _fit(places: np.ndarray, count: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(middle, slope) float[B] that are nearest to mean scores float[B, P] from 0 to 1, by weight `count`.

    The best of a grid, then Levenberg–Marquardt's method, on all rows at once.
    """
    flat, steep = _limits(places)
    span = places[-1] - places[0]
    grid_m = np.linspace(places[0] - span, places[-1] + span, 121)
    grid_s = np.geomspace(flat, steep, 25)
    m, s = (part.ravel() for part in np.meshgrid(grid_m, grid_s, indexing="ij"))
    curves = expit(s[:, None] * (places[None] - m[:, None]))
    cost = (count * curves**2).sum(axis=1)[None] - 2 * (means * count) @ curves.T
    best = cost.argmin(axis=1)
    middle, slope = m[best], np.log(s[best])
    damping = np.full(len(means), 1e-3)

    def residuals(middle, slope):
        f = expit(np.exp(slope)[:, None] * (places[None] - middle[:, None]))
        return f, f - means

    f, r = residuals(middle, slope)
    error = (count * r**2).sum(axis=1)
    for _ in range(60):
        d = f * (1 - f) * np.exp(slope)[:, None]
        by_m, by_s = -d, d * (places[None] - middle[:, None])
        a, b, c = ((count * u * v).sum(axis=1) for u, v in ((by_m, by_m), (by_m, by_s), (by_s, by_s)))
        g, h = (count * by_m * r).sum(axis=1), (count * by_s * r).sum(axis=1)
        a, c = a * (1 + damping) + 1e-12, c * (1 + damping) + 1e-12
        determinant = a * c - b * b
        new_m = np.clip(middle - (c * g - b * h) / determinant, grid_m[0], grid_m[-1])
        new_s = np.clip(slope - (a * h - b * g) / determinant, math.log(flat), math.log(steep))
        new_f, new_r = residuals(new_m, new_s)
        new_error = (count * new_r**2).sum(axis=1)
        better = new_error <= error
        damping = np.where(better, damping / 3, np.minimum(damping * 4, 1e8))
        middle, slope, error = (
            np.where(better, new, old) for new, old in ((new_m, middle), (new_s, slope), (new_error, error))
        )
        f, r = (np.where(better[:, None], new, old) for new, old in ((new_f, f), (new_r, r)))
    return middle, np.exp(slope)


def _drawn(where, y, count, means, groups, bootstrap, rng) -> np.ndarray | None:
    """float[bootstrap, P]: mean scores of draws with replacement; None where nothing tells how much they vary."""
    P = len(count)
    if groups is None:
        if (count < 2).any():
            return None
        drawn = np.empty((bootstrap, P))
        on_the_way = (means > 0.02) & (means < 0.98)
        wider = _wider((count - 1)[on_the_way].sum())
        for place in range(P):
            scores = y[where == place]
            picked = scores[rng.integers(len(scores), size=(bootstrap, len(scores)))].mean(axis=1)
            inflated = wider * math.sqrt(len(scores) / (len(scores) - 1))
            drawn[:, place] = means[place] + (picked - means[place]) * inflated
        return drawn
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    if len(names) < 2:
        return None
    unit = np.array([names[name] for name in groups])
    number, total = np.zeros((len(names), P)), np.zeros((len(names), P))
    np.add.at(number, (unit, where), 1)
    np.add.at(total, (unit, where), y)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=bootstrap)
    n = times @ number
    # A place that no drawn unit has keeps its measured mean.
    drawn = np.where(n > 0, times @ total / np.maximum(n, 1), means)
    return means + (drawn - means) * math.sqrt(len(names) / (len(names) - 1)) * _wider(len(names) - 1)


def _wider(freedom: int) -> float:
    """How much wider than a normal's is Student's 95 % interval."""
    return float(student.ppf(0.975, max(freedom, 1)) / norm.ppf(0.975))
