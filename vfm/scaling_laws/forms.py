"""The forms of scaling laws, and least squares on the log of the loss for many data sets at once."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Exponents are sought in this range: a law below it is flat on any grid of runs, one above it is no law of learning.
EXPONENTS = (1e-3, 5.0)
# How far below the least loss (in nats of log loss) an irreducible loss is told apart from none.
DEPTH = 12.0


class Form(NamedTuple):
    """A law: log loss as a function of θ and of log-coordinates u = log x - centre, one column for each variable.

    parameters: the names of θ. Exponents stand in EXPONENT_NAMES; the others are logs of losses: `e` of the
      irreducible one, `a` (and `b`) of the term of the first (second) variable at the centre.
    predict(θ[..., P], u[..., R, V]) -> (log loss [..., R], its derivatives [..., R, P])
    """

    name: str
    variables: tuple[str, ...]
    parameters: tuple[str, ...]
    predict: Callable
    equation: str


EXPONENT_NAMES = ("alpha", "beta", "rate")


def _power(theta, u):
    a, alpha = theta[..., None, 0], theta[..., None, 1]
    u = u[..., 0]
    return a - alpha * u, np.stack(np.broadcast_arrays(np.ones_like(u), -u + 0 * a), -1)


def _terms(e, *terms):
    """log Σ exp and the share of each term in the sum."""
    stacked = np.stack(np.broadcast_arrays(e, *terms), -1)
    highest = stacked.max(-1, keepdims=True)
    weights = np.exp(stacked - highest)
    total = weights.sum(-1, keepdims=True)
    return (highest + np.log(total))[..., 0], weights / total


def _floor(theta, u):
    e, a, alpha = (theta[..., None, i] for i in range(3))
    u = u[..., 0]
    y, share = _terms(e, a - alpha * u)
    return y, np.stack([share[..., 0], share[..., 1], -u * share[..., 1]], -1)


def _exponential(theta, u):
    a, rate = theta[..., None, 0], theta[..., None, 1]
    x = np.exp(u[..., 0])
    return a - rate * x, np.stack(np.broadcast_arrays(np.ones_like(x), -x + 0 * a), -1)


def _exponential_floor(theta, u):
    e, a, rate = (theta[..., None, i] for i in range(3))
    x = np.exp(u[..., 0])
    y, share = _terms(e, a - rate * x)
    return y, np.stack([share[..., 0], share[..., 1], -x * share[..., 1]], -1)


def _chinchilla(theta, u):
    e, a, b, alpha, beta = (theta[..., None, i] for i in range(5))
    n, d = u[..., 0], u[..., 1]
    y, share = _terms(e, a - alpha * n, b - beta * d)
    return y, np.stack([share[..., 0], share[..., 1], share[..., 2], -n * share[..., 1], -d * share[..., 2]], -1)


def _product(theta, u):
    a, alpha, beta = (theta[..., None, i] for i in range(3))
    n, d = u[..., 0], u[..., 1]
    return a - alpha * n - beta * d, np.stack(np.broadcast_arrays(np.ones_like(n), -n + 0 * a, -d + 0 * a), -1)


def _kaplan(theta, u):
    a, b, alpha, beta = (theta[..., None, i] for i in range(4))
    n, d = u[..., 0], u[..., 1]
    first, second = (a - alpha * n) / beta, (b - beta * d) / beta
    y, share = _terms(first, second)
    by_beta = y - (share * np.stack(np.broadcast_arrays(first, (b - beta * d) / beta + d), -1)).sum(-1)
    return beta * y, np.stack([share[..., 0], share[..., 1], -n * share[..., 0], by_beta], -1)


FORMS = {
    form.name: form
    for form in (
        Form("power", ("x",), ("a", "alpha"), _power, "L = (x_c / x)^alpha"),
        Form("floor", ("x",), ("e", "a", "alpha"), _floor, "L = E + (x_c / x)^alpha"),
        Form("product", ("x", "z"), ("a", "alpha", "beta"), _product, "y = A x^-alpha z^-beta"),
        Form("exponential", ("x",), ("a", "rate"), _exponential, "L = A exp(-rate x)"),
        Form("exponential_floor", ("x",), ("e", "a", "rate"), _exponential_floor, "L = E + A exp(-rate x)"),
        Form(
            "chinchilla", ("N", "D"), ("e", "a", "b", "alpha", "beta"), _chinchilla, "L = E + A / N^alpha + B / D^beta"
        ),
        Form(
            "kaplan",
            ("N", "D"),
            ("a", "b", "alpha", "beta"),
            _kaplan,
            "L = ((N_c / N)^(alpha / beta) + D_c / D)^beta",
        ),
    )
}


def bounds(form: Form, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest θ, float[..., P] each, for log losses y float[..., R]."""
    shape = y.shape[:-1]
    low, high = [], []
    for name in form.parameters:
        if name in EXPONENT_NAMES and form.name not in ("power", "product"):
            scale = EXPONENTS if name != "rate" else (1e-12, np.inf)
            low.append(np.full(shape, scale[0]))
            high.append(np.full(shape, scale[1]))
        elif name == "e":
            low.append(y.min(-1) - DEPTH)
            high.append(y.max(-1))
        else:
            low.append(np.full(shape, -np.inf))
            high.append(np.full(shape, np.inf))
    return np.stack(low, -1), np.stack(high, -1)


def starts(form: Form, u: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where to start from for log losses y float[R]: float[S, P], a grid of exponents and of irreducible losses."""
    exponents = [name for name in form.parameters if name in EXPONENT_NAMES]
    grid = np.geomspace(0.02, 2.0, 7 if len(exponents) > 1 else 12)
    shares = (0.02, 0.4, 0.8, 0.97) if "e" in form.parameters else (0.0,)
    terms = len(form.variables)
    found = []
    for *values, share in itertools.product(*[grid] * len(exponents), shares):
        left = np.log(np.exp(y) - share * np.exp(y.min())) - np.log(terms)
        columns = [np.exp(u[:, i]) if name == "rate" else u[:, i] for i, name in enumerate(exponents)]
        shift = [value * column for value, column in zip(values, columns)]
        levels = [(y + sum(shift)).mean()] if form.name == "product" else [(left + s).mean() for s in shift]
        floor = [np.log(share) + y.min()] if "e" in form.parameters else []
        found.append([*floor, *levels, *values])
    return np.array(found)


def least_squares(form: Form, u, y, theta, low, high, *, steps: int = 60, huber: float | None = None):
    """Minimises Σ (log loss - form)² by Levenberg–Marquardt steps within bounds, for B problems at once.

    u: float[R, V]; y: float[B, R]; theta, low, high: float[B, P]. huber: δ of a Huber loss instead of the square, by
    weights min(1, δ / |residual|) that are set anew before each step. -> (θ float[B, P], the sum of ½ r², or of the
    Huber losses, float[B]).
    """
    final = np.clip(theta, low, high)
    final_cost = np.empty(len(final))
    active = np.arange(len(final))  # problems that still move; a few slow ones must not hold up the others
    theta, y = final.copy(), np.ascontiguousarray(y)
    damping = np.full(len(theta), 1e-4)
    diagonal = np.arange(theta.shape[1])

    def cost(residual):
        if huber is None:
            return 0.5 * (residual**2).sum(-1)
        size = np.abs(residual)
        return np.where(size <= huber, 0.5 * size**2, huber * (size - 0.5 * huber)).sum(-1)

    predicted, slopes = form.predict(theta, u)
    residual = y - predicted
    best = cost(residual)
    for _ in range(steps):
        weighted = slopes
        if huber is not None:
            weighted = slopes * np.minimum(1, huber / np.maximum(np.abs(residual), 1e-300))[..., None]
        transposed = weighted.swapaxes(-1, -2)
        gradient = (transposed @ residual[..., None])[..., 0]
        curvature = transposed @ slopes
        stuck = ((theta <= low) & (gradient < 0)) | ((theta >= high) & (gradient > 0))
        if stuck.any():
            free = ~stuck
            curvature = curvature * (free[:, :, None] & free[:, None, :])
        size = curvature[:, diagonal, diagonal]
        curvature[:, diagonal, diagonal] += np.where(stuck, 1.0, size * damping[:, None] + 1e-14 * (1 + size))
        step = np.linalg.solve(curvature, np.where(stuck, 0.0, gradient)[..., None])[..., 0]
        proposed = np.clip(theta + step, low, high)
        with np.errstate(over="ignore", invalid="ignore"):
            predicted, changed = form.predict(proposed, u)
            moved = y - predicted
            value = cost(moved)
        better = value <= best
        settled = (better & (best - value <= 1e-10 * best)) | (damping >= 1e10)
        theta = np.where(better[:, None], proposed, theta)
        residual = np.where(better[:, None], moved, residual)
        slopes = np.where(better[:, None, None], changed, slopes)
        best = np.where(better, value, best)
        damping = np.clip(np.where(better, damping / 8, damping * 8), 1e-12, 1e12)
        final[active], final_cost[active] = theta, best
        if settled.any():
            keep = ~settled
            if not keep.any():
                break
            active, theta, best, damping = active[keep], theta[keep], best[keep], damping[keep]
            residual, slopes, y, low, high = residual[keep], slopes[keep], y[keep], low[keep], high[keep]
    return final, final_cost
