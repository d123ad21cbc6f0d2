"""Flow matching: a velocity field that carries noise to data along straight lines, and its integration."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vfm.errors import UserError, unknown

SAMPLERS = ("euler", "heun")
TIMES = ("uniform", "logit_normal")
SCALE = 1000.0  # what a network reads as its time is this at pure noise and 0 at the data, as in diffusion


@dataclasses.dataclass(frozen=True)
class Flow:
    """Conditional optimal-transport paths (Lipman et al. 2023, eq. 20 to 23); sigma_min 0: rectified flow (Liu et al.
    2023). x_t = (1 - (1 - sigma_min) t) noise + t data, t from 0 to 1; the network gives the velocity.

    Fields:
      times: of training: "uniform", or "logit_normal" with time_mean and time_std (Esser et al. 2024, eq. 19, whose
        time is 1 - t: a mean above 0 is towards the noise)
      shift: > 1 moves the times of training and sampling towards the noise, for large items (Esser et al. 2024, eq. 23)
    """

    sigma_min: float = 0.0
    times: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    shift: float = 1.0

    learned = False
    samplers = SAMPLERS

    def __post_init__(self):
        if self.times not in TIMES:
            raise unknown("times", self.times, TIMES, "the flow")
        if not 0 <= self.sigma_min < 1 or not self.shift > 0 or not self.time_std > 0:
            raise UserError("flow: sigma_min must be from 0 to less than 1, shift and time_std more than 0")

    def shifted(self, t):
        """Times in [0, 1] after the shift."""
        noise = 1 - t
        return 1 - self.shift * noise / (1 + (self.shift - 1) * noise)

    def path(self, x1: jax.Array, t: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_t, its velocity) for data x1 float[B, …] and times float[B]."""
        t = jnp.reshape(t, (*t.shape, *(1,) * (x1.ndim - t.ndim)))
        keep = 1 - self.sigma_min
        return (1 - keep * t) * noise + t * x1, x1 - keep * noise

    def losses(self, denoise: Callable, x1: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """{"velocity": float32[B]}, the mean square of the error at one random time per item (eq. 23)."""
        when, how = jax.random.split(rng)
        t = self.draw_times(when, len(x1))
        noise = jax.random.normal(how, x1.shape, x1.dtype)
        return self.errors(denoise(*self.noised(x1, t, noise)), x1, t, noise)

    def split(self, output: jax.Array) -> tuple[jax.Array, None]:
        """The velocity, and no learned variance; see `Gaussian.split`."""
        return output, None

    def draw_times(self, rng: jax.Array, count: int) -> jax.Array:
        """Times of training, float32[count]."""
        if self.times == "uniform":
            return self.shifted(jax.random.uniform(rng, (count,)))
        return self.shifted(1 - jax.nn.sigmoid(self.time_mean + self.time_std * jax.random.normal(rng, (count,))))

    def noised(self, x1: jax.Array, t: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a network reads: x_t, and its time."""
        return self.path(x1, t, noise)[0], SCALE * (1 - t)

    def errors(self, output: jax.Array, x1: jax.Array, t: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """The terms of `losses` of a network's output for `noised`."""
        error = jnp.square(output.astype(jnp.float32) - self.path(x1, t, noise)[1])
        return {"velocity": error.mean(axis=tuple(range(1, error.ndim)))}

    def sample(
        self, denoise: Callable, x: jax.Array, rng: jax.Array | None = None, *, sampler: str = "euler",
        steps: int | None = 50, clip: float | None = None, times: np.ndarray | None = None,
    ) -> jax.Array:  # fmt: skip
        """Data float[B, …] from noise x of that shape, by one `lax.scan` over `steps` intervals.

        sampler: "euler", or "heun" (second order, two network calls an interval; Euler in the last one, at whose end
        the field is not trained). clip: what is returned is kept within ± clip. times: float[S + 1] from 0 to 1
        instead of the even, shifted ones. rng: not read; the integration draws nothing.
        """
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS, "a flow")
        steps = 50 if steps is None else steps
        if type(steps) is not int or steps < 1:
            raise UserError(f"flow: steps={steps!r} must be a whole number from 1 on")
        times = self.shifted(np.linspace(0, 1, steps + 1)) if times is None else np.asarray(times)

        def velocity(x, t):
            return denoise(x, jnp.full(x.shape[:1], SCALE * (1 - t), jnp.float32)).astype(jnp.float32)

        def euler(x, given):
            t, to = given
            return x + (to - t) * velocity(x, t), None

        def heun(x, given):
            t, to = given
            first = velocity(x, t)
            second = velocity(x + (to - t) * first, to)
            return x + (to - t) * (first + second) / 2, None

        pairs = jnp.stack([times[:-1], times[1:]], axis=1).astype(jnp.float32)
        inner = len(pairs) - 1 if sampler == "heun" else 0
        x, _ = jax.lax.scan(heun, x, pairs[:inner])
        x, _ = jax.lax.scan(euler, x, pairs[inner:])
        return x if clip is None else jnp.clip(x, -clip, clip)
