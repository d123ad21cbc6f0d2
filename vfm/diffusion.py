"""Gaussian diffusion: what noise does to data, its bound on the likelihood, and the samplers that go back.

Pure functions of arrays and of a network's output; data x float[B, …, C] in [-1, 1]. A network is a function
`denoise(x, t) -> output`, with t int32[B]: float[B, …, C], or [B, …, 2C] where it learns the variance as well.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from vfm.errors import UserError, unknown

SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
WEIGHTINGS = ("none", "min_snr")
SAMPLERS = ("ddpm", "ddim")
SPACINGS = ("trailing", "leading", "linspace")


def make_betas(schedule: str, timesteps: int, start: float | None = None, end: float | None = None) -> np.ndarray:
    """Variances float64[T] of the noise that each step adds.

    "linear": from start to end (Ho et al. 2020), None: 0.1 / T and 20 / T, which for T = 1000 are theirs and for other
    numbers of steps end as noisy (Nichol & Dhariwal 2021); "scaled_linear": square roots are linear (Rombach et al.
    2022), None: 0.85 / T and 12 / T; "cosine": ᾱ is a squared cosine, β at most 0.999 (Nichol & Dhariwal 2021, eq. 17).
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES, "the diffusion process")
    if schedule == "cosine":
        level = lambda t: math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.array([min(1 - level(t + 1) / level(t), 0.999) for t in range(timesteps)])
    first, last = (0.1, 20.0) if schedule == "linear" else (0.85, 12.0)
    start = first / timesteps if start is None else start
    end = last / timesteps if end is None else end
    if not 0 < start <= end < 1:
        raise UserError(
            f"diffusion: betas from {start:g} to {end:g} must rise within (0, 1); with {timesteps} timesteps set "
            "beta_start and beta_end, or take the cosine schedule"
        )
    if schedule == "linear":
        return np.linspace(start, end, timesteps)
    return np.linspace(start**0.5, end**0.5, timesteps) ** 2


def without_signal_at_the_end(betas: np.ndarray) -> np.ndarray:
    """Betas with √ᾱ shifted and scaled so that the last step is pure noise (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    level = root**2
    return 1 - level / np.concatenate([[1.0], level[:-1]])


def guide(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """uncond + scale · (cond - uncond): classifier-free guidance (Ho & Salimans 2022); scale 1 is the conditional."""
    return unconditional + scale * (conditional - unconditional)


class Step(NamedTuple):
    """Numbers of one reverse step from t to s < t (or of an array of steps): float32[] or float32[S].

    signal, noise: √ᾱ_t, √(1 - ᾱ_t); signal_to, noise_to: those of s; of_x0, of_x: the factors of the posterior mean
    (Ho et al. 2020, eq. 7); log_small, log_large: logarithms of its variance β̃ and of β, the bounds of a learned one;
    last: 1 where s is the data, so that no noise is added.
    """

    signal: jax.Array
    noise: jax.Array
    signal_to: jax.Array
    noise_to: jax.Array
    of_x0: jax.Array
    of_x: jax.Array
    log_small: jax.Array
    log_large: jax.Array
    last: jax.Array

    def like(self, x: jax.Array) -> "Step":
        """With dimensions of size 1, so that they multiply x."""
        return Step(*(jnp.reshape(a, (*a.shape, *(1,) * (x.ndim - a.ndim))) if a.ndim else a for a in self))


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A diffusion process with discrete steps (Ho et al. 2020), and how the output of a network is read.

    Fields:
      schedule, timesteps, beta_start, beta_end: see `make_betas`. zero_snr: see `without_signal_at_the_end`
      prediction: the network gives "epsilon" (the noise), "x0" (the data), or "v" (Salimans & Ho 2022)
      variance: of the reverse steps: "fixed_small" (that of the posterior), "fixed_large" (β), or "learned_range"
        (the network interpolates between their logarithms; Nichol & Dhariwal 2021, eq. 15)
      loss_weighting: of the regression: "none", or "min_snr" with snr_gamma (Hang et al. 2023)
      vlb_weight: λ of the hybrid loss that trains a learned variance (Nichol & Dhariwal 2021, eq. 16)
      levels: values that a datum can have between -1 and 1, for the likelihood
    """

    schedule: str = "cosine"
    timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_snr: bool = False
    prediction: str = "epsilon"
    variance: str = "fixed_small"
    loss_weighting: str = "none"
    snr_gamma: float = 5.0
    vlb_weight: float = 1e-3
    levels: int = 256

    learned = property(lambda self: self.variance == "learned_range")
    samplers = SAMPLERS

    def __post_init__(self):
        for kind, known in (("prediction", PREDICTIONS), ("variance", VARIANCES), ("loss_weighting", WEIGHTINGS)):
            if getattr(self, kind) not in known:
                raise unknown(kind, getattr(self, kind), known, "the diffusion process")
        for name, least in (("timesteps", 2), ("levels", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"diffusion: {name}={value!r} must be a whole number from {least} on")
        if self.zero_snr and self.prediction == "epsilon":
            raise UserError("diffusion: with zero_snr the last step holds no signal; set prediction to 'v' or 'x0'")
        make_betas(self.schedule, self.timesteps, self.beta_start, self.beta_end)

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """float64[T]."""
        betas = make_betas(self.schedule, self.timesteps, self.beta_start, self.beta_end)
        return without_signal_at_the_end(betas) if self.zero_snr else betas

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ float64[T], the share of the data's variance that is left after each step."""
        return np.cumprod(1 - self.betas)

    def steps(self, timesteps: np.ndarray | None = None, previous: np.ndarray | None = None) -> Step:
        """The numbers of the reverse steps from timesteps int[S] to previous int[S] (-1: the data).

        None: from every step to the one before it, in rising order. previous None: each step goes to the next one.
        """
        if timesteps is None:
            timesteps = np.arange(self.timesteps)
            previous = timesteps - 1
        elif previous is None:
            previous = np.append(timesteps[1:], -1)
        start, to = self.alphas_cumprod[timesteps], np.where(previous < 0, 1.0, self.alphas_cumprod[previous])
        beta, last = 1 - start / to, previous < 0
        # Next to the data the posterior has no variance; the likelihood there takes that of the step before.
        second = self.alphas_cumprod[:2]
        floor = self.betas[1] * (1 - second[0]) / (1 - second[1])
        small = np.where(last, floor, beta * (1 - to) / (1 - start))
        numbers = Step(
            signal=np.sqrt(start),
            noise=np.sqrt(1 - start),
            signal_to=np.sqrt(to),
            noise_to=np.sqrt(1 - to),
            of_x0=np.sqrt(to) * beta / (1 - start),
            of_x=np.sqrt(start / to) * (1 - to) / (1 - start),
            log_small=np.log(small),
            log_large=np.log(np.where(last, floor, beta) if self.variance == "fixed_large" else beta),
            last=last,
        )
        return Step(*(jnp.asarray(a, jnp.float32) for a in numbers))

    def at(self, t: jax.Array) -> Step:
        """The numbers of the steps from t int32[B] to t - 1."""
        return Step(*(a[t] for a in self.steps()))

    def spaced(self, count: int | None, spacing: str = "trailing", offset: int = 0) -> np.ndarray:
        """int[S], `count` timesteps from noise to data (None: all): "trailing" starts at the noisiest, "leading" ends
        at the least noisy (plus offset), "linspace" does both (Lin et al. 2024, table 2)."""
        T = self.timesteps
        count = T if count is None else count
        if spacing not in SPACINGS:
            raise unknown("spacing", spacing, SPACINGS, "the sampler")
        if type(count) is not int or not 1 <= count <= T:
            raise UserError(f"diffusion: steps={count!r} must be a whole number from 1 to timesteps={T}")
        if spacing == "leading":
            return np.arange(count)[::-1] * (T // count) + offset
        if spacing == "linspace":
            return np.linspace(0, T - 1, count).round().astype(int)[::-1]
        return np.round(T - np.arange(count) * (T / count)).astype(int) - 1

    # The forward process and what can be predicted of it.

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t = √ᾱ_t x0 + √(1 - ᾱ_t) noise; t: int32[B]."""
        at = self.at(t).like(x0)
        return at.signal * x0 + at.noise * noise

    def velocity(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """v = √ᾱ_t noise - √(1 - ᾱ_t) x0 (Salimans & Ho 2022)."""
        at = self.at(t).like(x0)
        return at.signal * noise - at.noise * x0

    def split(self, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The prediction float[B, …, C], and the channels of the learned variance, if any."""
        return tuple(jnp.split(output, 2, axis=-1)) if self.learned else (output, None)

    def denoised(self, prediction: jax.Array, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """(x0, noise) that a prediction at x means."""
        if self.prediction == "epsilon":
            return (x - step.noise * prediction) / step.signal, prediction
        if self.prediction == "x0":
            return prediction, (x - step.signal * prediction) / step.noise
        return step.signal * x - step.noise * prediction, step.signal * prediction + step.noise * x

    def log_variance(self, learned: jax.Array | None, step: Step) -> jax.Array:
        """Logarithm of the variance of the reverse step."""
        if learned is None:
            return step.log_small if self.variance == "fixed_small" else step.log_large
        share = (learned + 1) / 2
        return share * step.log_large + (1 - share) * step.log_small

    def reverse(self, output: jax.Array, x: jax.Array, step: Step, clip: float | None = None):
        """(mean, log variance) of p(x_s | x_t); clip: the data are kept within ± clip."""
        prediction, learned = self.split(output)
        x0, _ = self.denoised(prediction, x, step)
        x0 = x0 if clip is None else jnp.clip(x0, -clip, clip)
        return step.of_x0 * x0 + step.of_x * x, self.log_variance(learned, step)

    # Training.

    def losses(self, denoise: Callable, x0: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """Terms of the loss of one random step per item, {name: float32[B]}.

        noise: weighted mean square of the prediction's error; vlb, of a learned variance: λ T times the term of the
        bound (bits per dimension), in which the mean gets no gradient.
        """
        when, how = jax.random.split(rng)
        t = self.draw_times(when, len(x0))
        noise = jax.random.normal(how, x0.shape, x0.dtype)
        return self.errors(denoise(*self.noised(x0, t, noise)), x0, t, noise)

    def draw_times(self, rng: jax.Array, count: int) -> jax.Array:
        """Times of training, int32[count]."""
        return jax.random.randint(rng, (count,), 0, self.timesteps)

    def noised(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a network reads: x_t, and the time."""
        return self.q_sample(x0, t, noise), t

    def errors(self, output: jax.Array, x0: jax.Array, t: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """The terms of `losses` of a network's output for `noised`."""
        x, step = self.q_sample(x0, t, noise), self.at(t)
        prediction, learned = self.split(output.astype(jnp.float32))
        target = {"epsilon": noise, "x0": x0}.get(self.prediction)
        target = self.velocity(x0, t, noise) if target is None else target
        found = {"noise": _mean(jnp.square(prediction - target)) * self._weight(step)}
        if learned is not None:
            frozen = jnp.concatenate([jax.lax.stop_gradient(prediction), learned], axis=-1)
            found["vlb"] = self.vlb_weight * self.timesteps * self.vlb(frozen, x0, x, t)
        return found

    def _weight(self, step: Step) -> jax.Array:
        if self.loss_weighting == "none":
            return jnp.ones_like(step.signal)
        snr = jnp.square(step.signal / step.noise)
        weight = jnp.minimum(snr, self.snr_gamma)  # of the error of x0
        return weight / {"epsilon": jnp.maximum(snr, 1e-12), "x0": 1.0, "v": snr + 1}[self.prediction]

    # The bound on the likelihood.

    def vlb(self, output: jax.Array, x0: jax.Array, x: jax.Array, t: jax.Array, clip: float | None = None):
        """Terms float32[B] of the bound in bits per dimension: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and at
        t = 0 -log p(x0 | x_1) of data with `levels` values (Ho et al. 2020, eq. 5 and 13)."""
        step = self.at(t).like(x0)
        mean, log_variance = self.reverse(output, x, step, clip)
        true = step.of_x0 * x0 + step.of_x * x
        divergence = gaussian_kl(true, step.log_small, mean, log_variance)
        likelihood = discretised_log_likelihood(x0, mean, 0.5 * log_variance, self.levels)
        return jnp.where(t == 0, -_mean(likelihood), _mean(divergence)) / math.log(2)

    def prior(self, x0: jax.Array) -> jax.Array:
        """KL(q(x_T | x0) || N(0, 1)) float32[B], bits per dimension: the part of the bound that no network changes."""
        level = self.alphas_cumprod[-1]
        variance = jnp.full(x0.shape, math.log(1 - level), x0.dtype)
        return _mean(gaussian_kl(math.sqrt(level) * x0, variance, 0.0, 0.0)) / math.log(2)

    def bits_per_dim(self, denoise: Callable, x0: jax.Array, rng: jax.Array, clip: float | None = 1.0):
        """(bound on -log2 p(x0) per dimension float32[B], its terms float32[T, B]); T network calls, one draw each.

        Data must have `levels` values, evenly spaced from -1 to 1. Without the prior, which is in the bound alone.
        """

        def term(_, given):
            t, key = given
            t = jnp.full(x0.shape[:1], t)
            x = self.q_sample(x0, t, jax.random.normal(key, x0.shape, x0.dtype))
            return None, self.vlb(denoise(x, t).astype(jnp.float32), x0, x, t, clip)

        every = jnp.arange(self.timesteps), jax.random.split(rng, self.timesteps)
        _, terms = jax.lax.scan(term, None, every)
        return terms.sum(axis=0) + self.prior(x0), terms

    # Samplers.

    def ddpm_step(self, output: jax.Array, x: jax.Array, step: Step, noise: jax.Array, clip: float | None = None):
        """A draw of p(x_s | x_t) (Ho et al. 2020, algorithm 2); its mean where s is the data."""
        mean, log_variance = self.reverse(output, x, step, clip)
        return mean + (1 - step.last) * jnp.exp(0.5 * log_variance) * noise

    def ddim_step(
        self, output: jax.Array, x: jax.Array, step: Step, noise: jax.Array, eta: float = 0.0,
        clip: float | None = None, consistent: bool = True,
    ):  # fmt: skip
        """Song et al. 2021, eq. 12; eta 0: deterministic, 1: the variance of DDPM's posterior.

        consistent: noise that fits the clipped data; else the noise as it was predicted.
        """
        x0, found = self.denoised(self.split(output)[0], x, step)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
            found = (x - step.signal * x0) / step.noise if consistent else found
        ratio = step.signal / step.signal_to
        sigma = eta * step.noise_to / step.noise * jnp.sqrt(jnp.maximum(1 - ratio**2, 0))
        direction = jnp.sqrt(jnp.maximum(step.noise_to**2 - sigma**2, 0))
        return step.signal_to * x0 + direction * found + sigma * noise

    def sample(
        self, denoise: Callable, x: jax.Array, rng: jax.Array, *, sampler: str = "ddim", steps: int | None = 50,
        eta: float = 0.0, clip: float | None = 1.0, spacing: str = "trailing",
    ) -> jax.Array:  # fmt: skip
        """Data float[B, …, C] from noise x of that shape, by one `lax.scan` over `steps` steps (None: all).

        sampler: "ddpm" (ancestral) or "ddim" with eta. clip: see `reverse`.
        """
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS, "a diffusion process")
        if eta < 0 or (sampler == "ddpm" and eta):
            raise UserError(f"diffusion: eta={eta} must be 0 or more, and is for the sampler 'ddim' alone")
        timesteps = self.spaced(steps, spacing)

        def one(x, given):
            t, step, key = given
            output = denoise(x, jnp.full(x.shape[:1], t)).astype(jnp.float32)
            noise = jax.random.normal(key, x.shape, x.dtype)
            if sampler == "ddpm":
                return self.ddpm_step(output, x, step, noise, clip), None
            return self.ddim_step(output, x, step, noise, eta, clip), None

        every = jnp.asarray(timesteps, jnp.int32), self.steps(timesteps), jax.random.split(rng, len(timesteps))
        return jax.lax.scan(one, x, every)[0]


def _mean(x: jax.Array) -> jax.Array:
    """float[B, …] -> float[B]."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def gaussian_kl(mean, log_variance, other_mean, other_log_variance) -> jax.Array:
    """KL(N(mean, variance) || N(other mean, other variance)) in nats, element by element."""
    difference = log_variance - other_log_variance
    return 0.5 * (jnp.exp(difference) - 1 - difference + (mean - other_mean) ** 2 * jnp.exp(-other_log_variance))


def discretised_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array, levels: int) -> jax.Array:
    """log of a Gaussian's mass in the bin of x, one of `levels` values from -1 to 1, in nats (Ho et al. 2020, eq. 13).

    The first bin reaches to -∞, the last to ∞. Differences of distribution functions are taken where both are small.
    """
    half, inverse = 1 / (levels - 1), jnp.exp(-log_scale)
    upper, lower = (x - mean + half) * inverse, (x - mean - half) * inverse
    mirrored = upper + lower > 0
    high, low = jnp.where(mirrored, -lower, upper), jnp.where(mirrored, -upper, lower)
    whole = log_ndtr(high)
    inside = whole + jnp.log(-jnp.expm1(-jnp.maximum(whole - log_ndtr(low), 1e-7)))
    return jnp.where(x < -1 + half, log_ndtr(upper), jnp.where(x > 1 - half, log_ndtr(-lower), inside))
