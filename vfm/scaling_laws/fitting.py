"""Fits of scaling laws with intervals that cover, and what the data do not pin."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from vfm.errors import UserError, unknown
from vfm.scaling_laws.forms import EXPONENT_NAMES, EXPONENTS, FORMS, bounds, least_squares, starts

# An exponent that is not known within this factor is not identified.
WIDEST = 4.0
# An irreducible loss whose interval reaches below this share of the least loss is not told from none.
LEAST_FLOOR = 1e-2


class Estimate(NamedTuple):
    """A number with its interval. reason: why the data do not identify it; "": they do. `str` prints no number then."""

    value: float
    low: float
    high: float
    reason: str = ""

    @property
    def identified(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"not identified ({self.reason})"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


class Prediction(NamedTuple):
    """A value of a law with its interval.

    low, high: interval of the law itself. run_low, run_high: of what a new cell of runs like the fitted ones would
    measure (wider by their scatter). beyond: by what factor the point lies outside the measured range (1: inside; the
    largest of the variables). reason: why the value is not to be trusted; "": nothing is known against it.
    """

    value: float
    low: float
    high: float
    run_low: float
    run_high: float
    beyond: float
    reason: str = ""

    def __str__(self) -> str:
        far = f", {self.beyond:.3g} × beyond the measured range" if self.beyond > 1 else ""
        if self.reason:
            return f"not identified ({self.reason}){far}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{far}"


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law; made by `fit`.

    form: name in FORMS. variables: their names. x: float[R, V] and loss: float[R], the cells that were fitted (mean
    of the log loss over the runs of a cell), runs: int[R] in each. theta: float[P] and draws: float[B, P], the
    parameters of `Form` at the `centre` float[V] of log x. noise: standard deviation of log loss around the law, over
    cells; seed_noise: over the runs of a cell (None without several). r_squared: in log–log. level: of all intervals.
    """

    form: str
    variables: tuple[str, ...]
    x: np.ndarray
    loss: np.ndarray
    runs: np.ndarray
    centre: np.ndarray
    theta: np.ndarray
    draws: np.ndarray
    noise: float
    seed_noise: float | None
    r_squared: float
    level: float
    reasons: Mapping[str, str]

    @property
    def parameters(self) -> dict[str, Estimate]:
        """Name → Estimate, in the terms of the equation: `E`, `A`, `B`, the exponents `alpha`, `beta`, the scales
        `{variable}_c`, the `rate`. Kaplan's alpha and beta are those of N and of D."""
        best, draws = physical(self, self.theta), physical(self, self.draws)
        return {
            name: Estimate(float(best[name]), *interval(draws[name], self.level), self.reasons.get(name, ""))
            for name in best
        }

    @property
    def identified(self) -> bool:
        """Whether the data pin every exponent."""
        return not any(self.reasons.get(name) for name in FORMS[self.form].parameters if name in EXPONENT_NAMES)

    def predict(self, x: Mapping[str, float], *, rng: np.random.Generator | None = None) -> Prediction:
        """The law at one point, {variable: value}."""
        point = _columns(self.variables, {name: [value] for name, value in x.items()})
        value, draws = self.evaluate(x), self.evaluate(x, draws=True)
        rng = np.random.default_rng(0) if rng is None else rng
        scatter = self.noise * rng.standard_t(max(len(self.loss) - len(self.theta), 1), len(draws))
        factors = np.maximum(point[0] / self.x.max(0), self.x.min(0) / point[0])
        beyond = float(max(factors.max(), 1.0))
        lost = next((reason for name, reason in self.reasons.items() if name != "E"), "")
        reason = lost if beyond > 1 else ""
        wide = interval(draws * np.exp(scatter), self.level)
        return Prediction(float(value), *interval(draws, self.level), *wide, beyond, reason)

    def evaluate(self, x: Mapping[str, float | np.ndarray], *, draws: bool = False) -> np.ndarray:
        """The law at points, {variable: value or float[...]} -> float[...]; draws: of each draw, float[B, ...]."""
        columns = np.broadcast_arrays(*[np.asarray(x[name], float) for name in self.variables])
        shape = columns[0].shape
        u = np.log(np.stack([column.reshape(-1) for column in columns], -1)) - self.centre
        y = FORMS[self.form].predict(self.draws if draws else self.theta, u)[0]
        return np.exp(y).reshape((len(self.draws), *shape) if draws else shape)


def fit(
    form: str,
    x: Mapping[str, Sequence[float]],
    loss: Sequence[float],
    *,
    huber: float | None = None,
    draws: int = 1000,
    level: float = 0.95,
    rng: np.random.Generator | None = None,
) -> Fit:
    """Fits a law to runs by least squares on the log of the loss.

    form: of FORMS: "power", "floor", "exponential", "exponential_floor" of one variable; "chinchilla" (Hoffmann et al.
      2022, equation 10) and "kaplan" (Kaplan et al. 2020, equation 1.5) of N and D; "product" of any two.
    x: {variable: a value for each run}. Runs with the same x are a cell, and differ in seed.
    huber: δ of a Huber loss on the residuals in place of the square (approach 3 of Hoffmann et al.: 1e-3).
    draws: of the bootstrap. level: of all intervals. rng: default: seed 0, so that a report can be made again.

    Cells, not runs, are what is fitted: seeds of a cell share whatever sets the cell off the law, and would make the
    interval too narrow if they counted as independent. Few cells are the rule, and the percentile bootstrap over 6
    points covers far less than it says: a resample repeats points, and its residuals are too small by
    sqrt((R - P) / R). So the bootstrap here is parametric with a drawn scale: log losses at the fitted law plus normal
    noise of standard deviation s sqrt(ν / χ²_ν), ν = R - P, s² = RSS / ν, each refitted. For a form that is linear in
    its parameters (a power law) its percentile interval is exactly Student's t. For the others, of 500 simulated sets
    each, the 95 % interval of the exponent beside an irreducible loss held the truth in 94.6 to 96 % (6 to 20 cells,
    noise of 0.1 to 3 %), and those of the joint law of 42 cells in 94 to 95 of 100. With `huber` the noise is drawn
    from the residuals (scaled up to s) plus a normal kernel (a smoothed bootstrap, De Angelis et al. 1993), which holds
    the truth in 94 to 97 % of 400 sets with normal noise three times δ, without the kernel in 90.5 to 94.3 %, and in 97
    to 98 % of 300 with Student's t of 2 degrees of freedom.

    Not identified, in place of a number, is an exponent whose interval, by the bootstrap or by the profile of the sum
    of squares (Bates & Watts 1988, chapter 6), reaches an end of EXPONENTS or spans more than a factor WIDEST; and
    what is computed from it; and an irreducible loss that is not told from none.

    Raises UserError for values that are not positive and finite, for too few cells, and for a variable without spread.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS, "scaling_laws.fit")
    law = FORMS[form]
    variables = tuple(x)
    if len(variables) != len(law.variables) or (law.variables[0] == "N" and variables != law.variables):
        raise UserError(
            f"the form {form!r} is of {', '.join(law.variables)}, not of {', '.join(variables) or 'nothing'}"
        )
    points, y, runs, seed_noise = cells(variables, _columns(variables, x), loss)
    P, R = len(law.parameters), len(y)
    if R <= P:
        what = f"{R} different {' and '.join(variables)}"
        raise UserError(f"{law.equation} has {P} parameters and needs at least {P + 1} cells; there are {what}")
    for i, name in enumerate(variables):
        if len(np.unique(points[:, i])) < 2:
            raise UserError(f"all runs have the same {name}: its exponent cannot be fitted")
    if np.ptp(y) == 0:
        raise UserError(f"all losses are equal: nothing depends on {' and '.join(variables)}")
    rng = np.random.default_rng(0) if rng is None else rng
    logs = np.log(points)
    centre = logs.mean(0)
    u = logs - centre
    theta = _best(law, u, y, huber)
    residual = y - law.predict(theta, u)[0]
    nu = R - P
    noise = math.sqrt((residual**2).sum() / nu)
    scale = np.sqrt(nu / rng.chisquare(nu, draws))[:, None]
    if huber is None:
        errors = rng.normal(size=(draws, R)) * noise
    else:
        # A fit by absolute values, nearly, goes through some of the cells: too many of its residuals are zero.
        found = rng.choice(residual - residual.mean(), (draws, R)) * math.sqrt(R / nu)
        middle = np.subtract(*np.quantile(residual, (0.75, 0.25))) / 1.34 * math.sqrt(R / nu)
        width = 1.06 * R**-0.2 * min(noise, middle)  # Silverman's rule, by which cells far off count little
        errors = found + width * rng.normal(size=(draws, R))
    simulated = y - residual + scale * errors
    low, high = bounds(law, simulated)
    start = np.broadcast_to(theta, (draws, P))
    drawn, _ = least_squares(law, u, simulated, start, low, high, huber=huber)
    found = Fit(
        form=form,
        variables=variables,
        x=points,
        loss=np.exp(y),
        runs=runs,
        centre=centre,
        theta=theta,
        draws=drawn,
        noise=noise,
        seed_noise=seed_noise,
        r_squared=float(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()),
        level=level,
        reasons={},
    )
    return dataclasses.replace(found, reasons=_reasons(found, u, y))


class Comparison(NamedTuple):
    """delta_aic: AIC of the exponential law minus that of the power law: positive where the power law is better.
    power, exponential: R² of each, of the log loss."""

    delta_aic: float
    power: float
    exponential: float


def compare(x: Mapping[str, Sequence[float]], loss: Sequence[float], *, floor: bool = False) -> Comparison:
    """Power law against exponential by Akaike's criterion, both fitted to the same log losses of the same cells.

    floor: both with an irreducible loss. Both have the same number of parameters, so ΔAIC = R ln(RSS_exp / RSS_power).
    Raises UserError as `fit` does.
    """
    names = ("floor", "exponential_floor") if floor else ("power", "exponential")
    power, exponential = (fit(name, x, loss, draws=2) for name in names)
    least = 1e-24  # of the unexplained share: rounding
    left = [max(1 - law.r_squared, least) for law in (power, exponential)]
    return Comparison(len(power.loss) * math.log(left[1] / left[0]), power.r_squared, exponential.r_squared)


class HoldOut(NamedTuple):
    """predicted: of the largest cell, from the others; measured: its loss; error: predicted / measured - 1."""

    predicted: Prediction
    measured: float
    error: float


def hold_out(form: str, x: Mapping[str, Sequence[float]], loss: Sequence[float], **settings) -> HoldOut:
    """Fits a law without the cell of the largest first variable (then second, …), and predicts that cell."""
    columns = _columns(tuple(x), x)
    points, y, _, _ = cells(tuple(x), columns, loss)
    last = np.lexsort(points.T[::-1])[-1]
    kept = np.arange(len(y)) != last
    rest = fit(form, dict(zip(x, points[kept].T)), np.exp(y[kept]), **settings)
    found = rest.predict(dict(zip(x, points[last])))
    measured = float(np.exp(y[last]))
    return HoldOut(found, measured, found.value / measured - 1)


def cells(variables, columns, loss) -> tuple[np.ndarray, np.ndarray, np.ndarray, float | None]:
    """(x float[R, V], mean log loss float[R], runs int[R], standard deviation of log loss within cells or None)."""
    loss = np.asarray(loss, float)
    if loss.shape != columns.shape[:1]:
        raise UserError(f"{len(columns)} values of {', '.join(variables)} but {loss.size} losses")
    for name, values in (*zip(variables, columns.T), ("loss", loss)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            wrong = values[~(np.isfinite(values) & (values > 0))][0]
            raise UserError(f"{name}={wrong:g} cannot be in a scaling law: values must be positive and finite")
    keys = np.round(np.log(columns), 9)
    _, first, index = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    index = index.reshape(-1)
    runs = np.bincount(index)
    y = np.log(loss)
    mean = np.bincount(index, y) / runs
    free = (runs - 1).sum()
    deviation = math.sqrt(((y - mean[index]) ** 2).sum() / free) if free else None
    return columns[first], mean, runs, deviation


def interval(draws: np.ndarray, level: float) -> tuple[float, float]:
    """The equal-tailed interval of draws, by order statistics whose chance is right on average for few draws too."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return float(low), float(high)


def physical(found: Fit, theta: np.ndarray) -> dict[str, np.ndarray]:
    """The parameters of the equation from θ float[..., P]."""
    values = dict(zip(FORMS[found.form].parameters, np.moveaxis(theta, -1, 0)))
    centre = found.centre
    exponents = {name: value for name, value in values.items() if name in ("alpha", "beta")}
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        names = {"E": np.exp(values["e"])} if "e" in values else {}
        levels = [values[name] for name in ("a", "b") if name in values]
        if found.form in ("exponential", "exponential_floor"):
            return {**names, "A": np.exp(levels[0]), "rate": values["rate"] * np.exp(-centre[0])}
        if found.form == "product":
            moved = levels[0] + sum(value * c for value, c in zip(exponents.values(), centre))
            return {"A": np.exp(moved), **exponents}
        moved = [a + value * c for a, value, c in zip(levels, exponents.values(), centre)]
        if found.form == "chinchilla":
            return {**names, "A": np.exp(moved[0]), "B": np.exp(moved[1]), **exponents}
        scales = [np.exp(np.clip(a / value, -690, 690)) for a, value in zip(moved, exponents.values())]
        return {**names, **{f"{v}_c": scale for v, scale in zip(found.variables, scales)}, **exponents}


def _columns(variables, x) -> np.ndarray:
    columns = [np.asarray(x[name], float).reshape(-1) for name in variables]
    if len({len(column) for column in columns}) != 1:
        sizes = ", ".join(f"{len(column)} {name}" for name, column in zip(variables, columns))
        raise UserError(f"each run needs a value of each variable; there are {sizes}")
    return np.stack(columns, -1)


def _best(law, u, y, huber) -> np.ndarray:
    """The best θ of all starts; with `huber` by L-BFGS from the best of them."""
    theta = starts(law, u, y)
    low, high = bounds(law, y)
    many = lambda v: np.broadcast_to(v, (len(theta), v.shape[-1]))
    theta, cost = least_squares(law, u, many(y), theta, many(low), many(high), steps=100, huber=huber)
    if huber is None:
        return theta[cost.argmin()]

    def objective(point):
        predicted, slopes = law.predict(point, u)
        residual = y - predicted
        size = np.abs(residual)
        value = np.where(size <= huber, 0.5 * size**2, huber * (size - 0.5 * huber)).sum()
        return value / huber, -(slopes * np.clip(residual, -huber, huber)[:, None]).sum(0) / huber

    limits = [(None if np.isinf(a) else a, None if np.isinf(b) else b) for a, b in zip(low, high)]
    settings = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9}
    found = [
        optimize.minimize(objective, theta[i], jac=True, method="L-BFGS-B", bounds=limits, options=settings)
        for i in np.argsort(cost, kind="stable")[:8]
    ]
    return min(found, key=lambda result: result.fun).x


def _reasons(found: Fit, u, y) -> dict[str, str]:
    """Parameter of the equation → why it is not identified."""
    law = FORMS[found.form]
    reasons = {}
    for i, name in enumerate(law.parameters):
        if name in EXPONENT_NAMES:
            drawn = interval(found.draws[:, i], found.level)
            reasons[name] = unpinned(name, *drawn) or unpinned(name, *_profile(found, u, y, i))
    lost = next(filter(None, reasons.values()), "")
    for name in physical(found, found.theta):
        if name == "E":
            low, high = interval(np.exp(found.draws[:, 0]), found.level)
            if low < LEAST_FLOOR * found.loss.min():
                reasons[name] = f"not told from no irreducible loss; at most {high:.4g}"
        elif name not in reasons:
            reasons[name] = lost
    return {name: reason for name, reason in reasons.items() if reason}


def unpinned(name: str, low: float, high: float) -> str:
    """Why an interval does not pin an exponent; "" if it does."""
    if low <= 0 <= high:
        return f"{name} is not told from 0: {low:.3g} to {high:.3g}"
    near, far = sorted((abs(low), abs(high)))
    if name != "rate" and far <= 1.01 * EXPONENTS[0]:
        return f"{name} is at the least that is allowed, {near:.3g}"
    if name != "rate" and (near <= 1.01 * EXPONENTS[0] or far >= 0.99 * EXPONENTS[1]):
        return f"{name} may be anything from {near:.3g} to {far:.3g}"
    return f"{name} may be anything from {near:.3g} to {far:.3g}" if far > WIDEST * near else ""


def _profile(found: Fit, u, y, index: int, points: int = 32) -> tuple[float, float]:
    """The interval of an exponent by the profile of the sum of squares: the values of it whose best fit is not worse
    than s² F. A flat profile reaches the ends of what is allowed."""
    law, best = FORMS[found.form], found.theta[index]
    low, high = bounds(law, y)
    if not np.isfinite([low[index], high[index]]).all():  # a law that is linear in its parameters: Student's t already
        return interval(found.draws[:, index], found.level)
    nu = len(y) - len(found.theta)
    residual = y - law.predict(found.theta, u)[0]
    least = (residual**2).sum()
    allowed = least * (1 + stats.t.ppf((1 + found.level) / 2, nu) ** 2 / nu) + 1e-20
    generic = starts(law, u, y)
    grid = np.concatenate([np.geomspace(best, low[index], points), np.geomspace(best, high[index], points)])
    # From the best fit, and from the best of the grid of starts: a valley may bend, or be one of two.
    tried = np.broadcast_to(generic, (len(grid), *generic.shape)).copy()
    tried[..., index] = grid[:, None]
    misfit = ((y - law.predict(tried, u)[0]) ** 2).sum(-1)
    theta = np.concatenate([np.tile(found.theta, (len(grid), 1)), tried[np.arange(len(grid)), misfit.argmin(-1)]])
    fixed = np.tile(grid, 2)
    theta[:, index] = fixed
    lowest, highest = np.tile(low, (len(fixed), 1)), np.tile(high, (len(fixed), 1))
    lowest[:, index] = highest[:, index] = fixed
    _, cost = least_squares(law, u, np.broadcast_to(y, (len(fixed), len(y))), theta, lowest, highest, steps=200)
    worse = 2 * cost.reshape(2, 2, points).min(0) > allowed
    ends = [part[over.argmax() if over.any() else -1] for part, over in zip(grid.reshape(2, points), worse)]
    return float(ends[0]), float(ends[1])
