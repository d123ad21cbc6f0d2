"""How to spend a compute budget: the three approaches of Hoffmann et al. (2022, section 3) on any grid of runs."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from vfm.errors import UserError
from vfm.scaling_laws.fitting import Estimate, Fit, Prediction, cells, fit, interval, physical, unpinned

# Training FLOPs of a parameter and a token (Kaplan et al. 2020, section 2.1): C = 6 N D.
FLOPS = 6.0
# Runs whose compute is this close are of one budget: steps are whole, and budgets are met nearly.
SAME_BUDGET = 1.1
# A line through fewer points has no residual to judge it by.
LEAST_POINTS = 3


class Point(NamedTuple):
    """The best model of a budget C (FLOPs): its N, its D = C / (6 N), its loss; reason: why there is none."""

    budget: float
    n: Estimate
    d: float
    loss: float
    reason: str = ""


class Allocation(NamedTuple):
    """N_opt ∝ C^a. points: what the line is fitted to, and budgets without an optimum, with the reason.

    size, loss: the power laws of N_opt and of the least loss in C; None where there is no line, for `reason`.
    """

    points: tuple[Point, ...]
    size: Fit | None
    loss: Fit | None
    reason: str = ""

    @property
    def exponent(self) -> Estimate:
        """a of N_opt ∝ C^a; that of D_opt is 1 - a."""
        if self.size is None:
            return Estimate(np.nan, np.nan, np.nan, self.reason)
        alpha = self.size.parameters["alpha"]
        reason = alpha.reason and (unpinned("a", -alpha.high, -alpha.low) or alpha.reason.replace("alpha", "a"))
        return Estimate(-alpha.value, -alpha.high, -alpha.low, reason)


class Optimum(NamedTuple):
    """Compute-optimal training with a budget C, from a joint law: n parameters on d tokens, and the loss of that.

    a, b: n ∝ C^a, d ∝ C^b. beyond: by what factor C lies outside the compute of the runs (1: inside).
    """

    budget: float
    n: Estimate
    d: Estimate
    loss: Prediction
    a: Estimate
    b: Estimate
    beyond: float


def envelope(
    n: Sequence[float],
    compute: Sequence[Sequence[float]],
    loss: Sequence[Sequence[float]],
    *,
    flops: float = FLOPS,
    **settings,
) -> Allocation:
    """Approach 1: which size has the least loss at each amount of compute, along the training curves.

    n: parameters of each run; compute, loss: its curve, FLOPs so far and (validation) loss. Runs of one size are
    averaged, in log loss. settings: `level`, `draws`, `rng` of `fit`.

    The points of the envelope are not independent: all that one size is the best at are one curve. So each size is
    one point of the line, at the geometric middle of the compute where it is the best, and the interval of the
    exponent is Student's t over sizes. A size counts only where it is seen to be overtaken at both ends; the smallest
    and the largest are not.
    """
    sizes, grid, curves = _curves(n, compute, loss)
    filled = np.where(np.isfinite(curves), curves, np.inf)
    best = filled.argmin(0)
    points = []
    for i, size in enumerate(sizes):
        where = np.flatnonzero(best == i)
        if not len(where):
            continue
        first, last = where[0], where[-1]
        if not (0 < first <= last < len(grid) - 1 and 0 < i < len(sizes) - 1):
            continue
        # Each change of the best is an overtaking, not where one curve ends or another begins; and the sizes on both
        # sides were there to be overtaken.
        at = np.arange(first - 1, last + 1)
        at = at[best[at] != best[at + 1]]
        needed = [curves[best[at], at + 1], curves[best[at + 1], at], curves[[i - 1, i + 1], [first, last]]]
        if not np.isfinite(np.concatenate(needed)).all():
            continue
        middle = (grid[first] + grid[last]) / 2
        value = np.interp(middle, grid, curves[i])
        budget = float(np.exp(middle))
        points.append(Point(budget, Estimate(size, size, size), budget / (flops * size), float(np.exp(value))))
    return _allocation(points, "sizes are seen to be the best at some compute and not at less nor at more", settings)


def isoflop(
    n: Sequence[float],
    compute: Sequence[float],
    loss: Sequence[float],
    *,
    flops: float = FLOPS,
    draws: int = 1000,
    level: float = 0.95,
    rng: np.random.Generator | None = None,
) -> Allocation:
    """Approach 2: for each budget a parabola of log loss in log N; then the line of its minima, N_opt ∝ C^a.

    n, compute (FLOPs), loss: of each finished run; runs whose compute is within SAME_BUDGET are of one budget, and
    runs of one budget and size are a cell (seeds).

    Intervals: all budgets are simulated at once from their parabolas, with normal noise of the pooled deviation and a
    drawn scale (Student's t, see `fit`), and parabolas and line are fitted again. Where the minima scatter around
    their line by more than that (F test, 5 %), the interval of the line is Student's t over budgets instead.
    A budget whose parabola has no minimum, or has it outside of the sizes that were run, is left out and says so.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    parts = _budgets(n, compute, loss)
    nu = sum(max(len(size) - 3, 0) for _, size, _ in parts)
    if not nu:
        raise UserError(f"none of {len(parts)} budgets has 4 sizes: a parabola through 3 points has no error")
    solved = []
    for budget, size, y in parts:
        middle = np.log(size).mean()
        u = np.log(size) - middle
        matrix = np.stack([np.ones_like(u), u, u**2], -1)
        solved.append((budget, size, y, middle, matrix, np.linalg.pinv(matrix)) if len(size) >= 3 else (budget, size))
    kept = [part for part in solved if len(part) > 2]
    rss = sum(((y - matrix @ (inverse @ y)) ** 2).sum() for _, _, y, _, matrix, inverse in kept)
    deviation = np.sqrt(rss / nu * nu / rng.chisquare(nu, draws))[:, None]
    points, minima = [], []
    for part in solved:
        if len(part) == 2:
            nan = Estimate(np.nan, np.nan, np.nan, "a parabola needs 3 sizes")
            points.append(Point(part[0], nan, np.nan, np.nan, nan.reason))
            continue
        budget, size, y, middle, matrix, inverse = part
        coefficients = inverse @ y
        simulated = (matrix @ coefficients + deviation * rng.normal(size=(draws, len(y)))) @ inverse.T
        point, found = _minimum(budget, size, middle, coefficients, simulated, level, flops)
        points.append(point)
        if not point.reason:
            minima.append(found)
    allocation = _allocation(points, "budgets have a minimum within their sizes", {"draws": draws, "level": level})
    if allocation.size is None:
        return allocation
    line, minima = allocation.size, np.stack(minima, -1)
    minima = minima[np.isfinite(minima).all(-1)]
    u = np.log(line.x[:, 0]) - line.centre[0]
    order = np.argsort([point.budget for point in points if not point.reason])
    minima = minima[:, order]
    slope = (minima * u).sum(-1) / (u**2).sum()
    theta = np.stack([minima.mean(-1), -slope], -1)
    around = minima - np.log(line.loss)
    around = around - around.mean(-1, keepdims=True) - (around @ u / (u**2).sum())[:, None] * u
    expected = np.median((around**2).sum(-1)) / (len(u) - 2)
    if line.noise**2 > stats.f.ppf(0.95, len(u) - 2, nu) * expected:
        return allocation
    reason = unpinned("alpha", *interval(theta[:, 1], level))
    reasons = {name: reason for name in physical(line, line.theta)} if reason else {}
    return allocation._replace(size=dataclasses.replace(line, draws=theta, reasons=reasons))


def parametric(n: Sequence[float], d: Sequence[float], loss: Sequence[float], **settings) -> Fit:
    """Approach 3: L = E + A / N^alpha + B / D^beta, by a Huber loss (δ = 1e-3) on the residuals of log L with L-BFGS
    from a grid of starts, in log-sum-exp form. settings: those of `fit`."""
    return fit("chinchilla", {"N": n, "D": d}, loss, **{"huber": 1e-3, **settings})


def compute_optimal(law: Fit, budget: float, *, flops: float = FLOPS) -> Optimum:
    """N and D with the least loss of a joint law ("chinchilla" or "kaplan") where `flops` N D = budget: closed form
    (Hoffmann et al. 2022, equation 4).

    The interval of the loss is that of the law at the N and D that are proposed. Raises UserError for another law, and
    a budget that is not positive.
    """
    if law.form not in ("chinchilla", "kaplan"):
        raise UserError(f"compute-optimal N and D need a joint law of N and D, not {law.form!r}")
    if not (np.isfinite(budget) and budget > 0):
        raise UserError(f"a compute budget of {budget} FLOPs: it must be positive and finite")
    product = np.log(budget / flops)
    log_n, a = _split(law, law.theta, product)
    drawn, drawn_a = _split(law, law.draws, product)
    reason = next((law.reasons[name] for name in law.reasons if name != "E"), "")
    estimate = lambda value, values: Estimate(float(value), *interval(values, law.level), reason)
    n, d = _exp(log_n), _exp(product - log_n)
    done = flops * law.x.prod(-1)
    return Optimum(
        budget=float(budget),
        n=estimate(n, _exp(drawn)),
        d=estimate(d, _exp(product - drawn)),
        loss=law.predict({"N": n, "D": d}),
        a=estimate(a, drawn_a),
        b=estimate(1 - a, 1 - drawn_a),
        beyond=float(max(budget / done.max(), done.min() / budget, 1.0)),
    )


def compute_optimal_tokens(law: Fit, n: float) -> Estimate:
    """The tokens D for which n parameters are compute-optimal by a joint law: where the loss gains as much by a percent
    of N as by a percent of D. Raises UserError as `compute_optimal` does."""
    reason = compute_optimal(law, 1.0).n.reason

    def tokens(theta):
        ratio, alpha, beta = _balance(law, theta)
        return _exp((alpha * np.log(n) - ratio) / beta)

    return Estimate(float(tokens(law.theta)), *interval(tokens(law.draws), law.level), reason)


def _exp(x):
    """exp of what may be far off where an exponent is not identified, kept finite."""
    return np.exp(np.clip(x, -300, 300))


def _split(law: Fit, theta, product):
    """(log N, a) that are optimal for log(N D) = product."""
    ratio, alpha, beta = _balance(law, theta)
    return (ratio + beta * product) / (alpha + beta), beta / (alpha + beta)


def _balance(law: Fit, theta):
    """(log(α A / (β B)), α, β) of the two terms A / N^α and B / D^β: at the optimum α A / N^α = β B / D^β."""
    if law.form == "chinchilla":
        _, first, second, alpha, beta = np.moveaxis(theta, -1, 0)
    else:  # what is minimised is the sum within the power: N^-(alpha / beta) against D^-1
        first, second, alpha, beta = np.moveaxis(theta, -1, 0)
        first, second, alpha, beta = first / beta, second / beta, alpha / beta, np.ones_like(beta)
    n, d = law.centre
    return np.log(alpha / beta) + first + alpha * n - second - beta * d, alpha, beta


def _curves(n, compute, loss, points: int = 2000):
    """(sizes, a grid of log compute, log loss float[sizes, points], NaN where a size was not trained so far)."""
    if not len(n) == len(compute) == len(loss):
        raise UserError(f"each run needs n, compute and loss; there are {len(n)}, {len(compute)} and {len(loss)}")
    if not len(n):
        raise UserError("an envelope needs the training curves of several sizes; there are none")
    runs = []
    for size, x, values in zip(n, compute, loss):
        x, values = np.asarray(x, float), np.asarray(values, float)
        if x.shape != values.shape or len(x) < 2:
            raise UserError(f"the curve of a run with n={size:g} has {len(x)} computes and {len(values)} losses")
        checked = np.concatenate([[size], x, values])
        if not (np.isfinite(checked).all() and (checked > 0).all() and (np.diff(x) > 0).all()):
            raise UserError(f"the curve of n={size:g} must be positive and finite, with rising compute")
        runs.append((float(size), np.log(x), np.minimum.accumulate(np.log(values))))
    low, high = (choose(end for _, x, _ in runs for end in x[[0, -1]]) for choose in (min, max))
    grid = np.linspace(low, high, points)
    sizes = sorted({size for size, _, _ in runs})
    curves = [
        np.mean([np.interp(grid, x, y, left=np.nan, right=np.nan) for other, x, y in runs if other == size], axis=0)
        for size in sizes
    ]
    return sizes, grid, np.array(curves)


def _budgets(n, compute, loss):
    """[(budget, sizes float[K], mean log loss float[K])] by rising budget."""
    n, compute, loss = (np.asarray(values, float) for values in (n, compute, loss))
    if not n.shape == compute.shape == loss.shape or n.ndim != 1 or not len(n):
        raise UserError(f"each run needs n, compute and loss; there are {n.size}, {compute.size} and {loss.size}")
    cells(("n", "compute"), np.stack([n, compute], -1), loss)  # refuses what is not positive and finite
    order = np.argsort(compute)
    group = np.concatenate([[0], np.cumsum(np.diff(np.log(compute[order])) > np.log(SAME_BUDGET))])
    found = []
    for i in range(group[-1] + 1):
        rows = order[group == i]
        sizes, y, _, _ = cells(("n",), n[rows][:, None], loss[rows])
        found.append((float(np.exp(np.log(compute[rows]).mean())), sizes[:, 0], y))
    return found


def _minimum(budget, size, middle, coefficients, simulated, level, flops):
    """(the Point of a budget, log N of the minimum of each simulated parabola, NaN where it has none)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        where = lambda c: np.where(c[..., 2] > 0, middle - c[..., 1] / (2 * c[..., 2]), np.nan)
        best, drawn = float(where(coefficients)), where(simulated)
    bent = np.isfinite(drawn)
    if not np.isfinite(best) or bent.mean() < level:
        reason = "the losses have no minimum in N"
    elif not size.min() <= np.exp(best) <= size.max():
        reason = f"the minimum is not within the sizes {size.min():.4g} to {size.max():.4g}"
    else:
        reason = ""
    if not np.isfinite(best):
        return Point(budget, Estimate(np.nan, np.nan, np.nan, reason), np.nan, np.nan, reason), drawn
    n = float(np.exp(best))
    u = best - middle
    value = float(np.exp(coefficients @ [1, u, u**2]))
    low, high = interval(_exp(drawn[bent]), level) if bent.any() else (np.nan, np.nan)
    return Point(budget, Estimate(n, low, high, reason), budget / (flops * n), value, reason), drawn


def _allocation(points: list[Point], what: str, settings) -> Allocation:
    good = [point for point in points if not point.reason]
    if len(good) < LEAST_POINTS:
        reason = f"{len(good)} {what}; a line needs {LEAST_POINTS}"
        return Allocation(tuple(points), None, None, reason)
    budgets = {"C": [point.budget for point in good]}
    size = fit("power", budgets, [point.n.value for point in good], **settings)
    return Allocation(tuple(points), size, fit("power", budgets, [point.loss for point in good], **settings))
