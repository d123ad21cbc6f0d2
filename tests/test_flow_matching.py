import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.errors import UserError
from vfm.flow_matching import SCALE, Flow

FIXTURE = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "fixtures" / "functions/diffusion_schedulers"
X = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
NOISE = jax.random.normal(jax.random.key(1), X.shape)


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs the reference outputs of schedulers")
def test_euler_steps_are_those_of_the_reference():
    """Its sigma is our 1 - t, and its network gives the velocity towards the noise."""
    data, name = np.load(FIXTURE / "io.npz"), "flow_match_euler"
    assert json.loads((FIXTURE / "io.json").read_text())["params"]["schedulers"][name][1]["shift"] == 3.0
    sigmas = data[f"out/{name}/sigmas"]
    toy = lambda x, t: -jnp.tanh(0.7 * x + 0.1 * jnp.cos(jnp.reshape(t, (-1, 1, 1, 1)) / 50))
    for n in range(1, len(sigmas)):
        found = Flow().sample(toy, jnp.asarray(data["in/start"]), times=1 - sigmas[: n + 1])
        np.testing.assert_allclose(found, data[f"out/{name}/samples"][n - 1], atol=1e-4, rtol=1e-4)


def test_path_goes_from_noise_to_data_with_its_velocity():
    flow = Flow(sigma_min=0.1)
    for t, end in ((0.0, NOISE), (1.0, X + 0.1 * NOISE)):
        np.testing.assert_allclose(flow.path(X, jnp.full(3, t), NOISE)[0], end, atol=1e-6)
    place = lambda t: flow.path(X, jnp.full(3, t), NOISE)[0]
    _, derivative = jax.jvp(place, (0.3,), (1.0,))
    np.testing.assert_allclose(flow.path(X, jnp.full(3, 0.3), NOISE)[1], derivative, atol=1e-5)


def exact(x, time, mean=0.4, std=0.3):
    """The velocity for data N(mean, std²): E[data - noise | x_t]."""
    t = 1 - jnp.reshape(time, (-1, 1, 1, 1)) / SCALE
    variance = (t * std) ** 2 + (1 - t) ** 2
    return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)


@pytest.mark.parametrize("sampler, steps", [("euler", 100), ("heun", 25)])
def test_samplers_draw_from_the_data_distribution(sampler, steps):
    noise = jax.random.normal(jax.random.key(2), (2000, 1, 1, 1))
    found = np.asarray(jax.jit(lambda x: Flow().sample(exact, x, sampler=sampler, steps=steps))(noise))
    assert abs(found.mean() - 0.4) < 0.02 and abs(found.std() - 0.3) < 0.02


def test_heun_is_of_second_order():
    """The exact solution of dx/dt = -x; the error of Euler falls with the steps, that of Heun with their square."""
    errors = {}
    for sampler in ("euler", "heun"):
        for steps in (10, 20):
            times = np.append(np.linspace(0, 0.999, steps + 1), 1.0)  # the last, Euler interval is next to nothing
            found = Flow().sample(lambda x, t: -x, X, sampler=sampler, times=times)
            errors[sampler, steps] = np.abs(found - np.exp(-1) * X).max()
    assert errors["euler", 10] / errors["euler", 20] < 2.5
    assert errors["heun", 10] / errors["heun", 20] > 3.5


def test_times_of_training_are_shifted_and_logit_normal():
    seen = {}
    for name, flow in {"even": Flow(), "shifted": Flow(shift=3.0), "middle": Flow(times="logit_normal")}.items():
        flow.losses(functools.partial(_keep, seen, name), jnp.zeros((4000, 1)), jax.random.key(0))
    even, shifted, middle = (np.asarray(seen[name]) / SCALE for name in ("even", "shifted", "middle"))
    assert even.min() >= 0 and even.max() <= 1 and abs(even.mean() - 0.5) < 0.02
    np.testing.assert_allclose(np.sort(shifted), np.sort(3 * even / (1 + 2 * even)), atol=1e-5)
    np.testing.assert_allclose(np.std(np.log(middle / (1 - middle))), 1.0, atol=0.05)
    noisy = Flow(times="logit_normal", time_mean=2.0)
    noisy.losses(functools.partial(_keep, seen, "noisy"), jnp.zeros((4000, 1)), jax.random.key(0))
    noise = np.asarray(seen["noisy"]) / SCALE  # 1: pure noise
    np.testing.assert_allclose(np.mean(np.log(noise / (1 - noise))), 2.0, atol=0.05)


def _keep(seen, name, x, t):
    seen[name] = t
    return x


def test_loss_is_least_for_the_true_velocity():
    draw = lambda denoise: Flow().losses(denoise, 0.4 + 0.3 * jax.random.normal(jax.random.key(5), (2000, 1, 1, 1)),
                                         jax.random.key(0))["velocity"].mean()  # fmt: skip
    best = draw(exact)
    assert best < draw(lambda x, t: exact(x, t) + 0.2) and best < draw(lambda x, t: 1.2 * exact(x, t))


def test_what_does_not_work_is_refused():
    with pytest.raises(UserError, match="unknown times 'normal'"):
        Flow(times="normal")
    with pytest.raises(UserError, match="shift and time_std more than 0"):
        Flow(shift=0.0)
    with pytest.raises(UserError, match="unknown sampler 'ddim'.*euler, heun"):
        Flow().sample(exact, X, sampler="ddim")
