import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from tests import tiny
from vfm.diffusion import PREDICTIONS, Gaussian, discretised_log_likelihood, gaussian_kl, guide
from vfm.errors import UserError

FIXTURE = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "fixtures" / "functions/diffusion_schedulers"
with_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs the reference outputs of schedulers")
NAMES = {"num_train_timesteps": "timesteps", "beta_start": "beta_start", "beta_end": "beta_end",
         "rescale_betas_zero_snr": "zero_snr", "variance_type": "variance"}  # fmt: skip
RENAMED = {"squaredcos_cap_v2": "cosine", "v_prediction": "v", "sample": "x0"}
CASES = ("ddpm_linear_fixed_small", "ddpm_cosine_fixed_large", "ddpm_learned_range", "ddpm_v_prediction",
         "ddpm_sample_prediction", "ddim_eta0", "ddim_eta07", "ddim_v_zero_snr")  # fmt: skip
X0 = jnp.asarray(np.random.default_rng(0).integers(0, 17, (3, 4, 4, 1)) / 8 - 1, jnp.float32)
NOISE = jax.random.normal(jax.random.key(1), X0.shape)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@functools.cache
def fixture():
    return json.loads((FIXTURE / "io.json").read_text())["params"], np.load(FIXTURE / "io.npz")


def process_of(options):
    """The process, and what the fixture says about the sampler."""
    fields = {ours: options[theirs] for theirs, ours in NAMES.items() if theirs in options}
    for field, name, usual in (("schedule", "beta_schedule", "linear"), ("prediction", "prediction_type", "epsilon")):
        value = options.get(name, usual)
        fields[field] = RENAMED.get(value, value)
    fields = {"beta_start": 1e-4, "beta_end": 0.02, **fields}
    clip = options.get("clip_sample_range", 1.0) if options.get("clip_sample", True) else None
    return Gaussian(**fields), clip


def last(x):
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


@with_fixture
@pytest.mark.parametrize("name", CASES)
def test_schedules_and_noise_are_those_of_the_reference(name):
    params, data = fixture()
    process, _ = process_of(params["schedulers"][name][1])
    np.testing.assert_allclose(process.betas, data[f"out/{name}/betas"], atol=1e-5)
    np.testing.assert_allclose(process.alphas_cumprod, data[f"out/{name}/alphas_cumprod"], atol=2e-6)
    t = jnp.asarray(data[f"out/{name}/add_noise_t"])
    x0, noise = last(data["in/x0"]), last(data["in/noise"])
    np.testing.assert_allclose(process.q_sample(x0, t, noise), last(data[f"out/{name}/noisy"]), atol=1e-5)
    np.testing.assert_allclose(process.velocity(x0, t, noise), last(data[f"out/{name}/velocity"]), atol=1e-5)


@with_fixture
@pytest.mark.parametrize("name", CASES)
def test_sampler_steps_are_those_of_the_reference(name):
    params, data = fixture()
    kind, options = params["schedulers"][name]
    process, clip = process_of(options)
    spacing = options.get("timestep_spacing", "leading")
    timesteps = process.spaced(params["steps"], spacing, options.get("steps_offset", 0))
    np.testing.assert_array_equal(timesteps, data[f"out/{name}/timesteps"])
    previous = None
    if kind == "DDIMScheduler":  # which goes back by a fixed number of steps
        previous = timesteps - process.timesteps // params["steps"]
        previous = np.where(previous < 0, -1 if options.get("set_alpha_to_one", True) else 0, previous)
    steps = process.steps(timesteps, previous)
    x, draws = last(data["in/start"]), iter(data["in/step_noise"])
    for n, t in enumerate(timesteps):
        step = type(steps)(*(numbers[n] for numbers in steps))
        output = last(data[f"out/{name}/model_outputs"][n])
        x0, _ = process.denoised(process.split(output)[0], x, step)
        x0 = x0 if clip is None else jnp.clip(x0, -clip, clip)
        np.testing.assert_allclose(x0, last(data[f"out/{name}/pred_original"][n]), atol=1e-4, rtol=1e-4)
        if kind == "DDPMScheduler":
            noise = last(next(draws)) if t > 0 else jnp.zeros_like(x)
            x = process.ddpm_step(output, x, step, noise, clip)
        else:
            eta = params["eta"].get(name, 0.0)
            noise = last(next(draws)) if eta else jnp.zeros_like(x)
            x = process.ddim_step(output, x, step, noise, eta, clip, consistent=False)
        np.testing.assert_allclose(x, last(data[f"out/{name}/samples"][n]), atol=1e-4, rtol=1e-4)
        x = last(data[f"out/{name}/samples"][n])  # errors do not add up


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_the_data_and_the_noise_back(prediction):
    process = Gaussian(timesteps=20, prediction=prediction)
    t = jnp.array([0, 7, 19])
    x, step = process.q_sample(X0, t, NOISE), process.at(t).like(X0)
    given = {"epsilon": NOISE, "x0": X0, "v": process.velocity(X0, t, NOISE)}[prediction]
    x0, noise = process.denoised(given, x, step)
    # Near pure noise the data are what is left after a subtraction.
    np.testing.assert_allclose(x0 * step.signal, X0 * step.signal, atol=1e-5)
    np.testing.assert_allclose(noise * step.noise, NOISE * step.noise, atol=1e-5)


def test_posterior_is_that_of_two_gaussians():
    """q(x_{t-1} | x_t, x0) from the product of the two densities, by hand for one number."""
    process = Gaussian(schedule="linear", timesteps=40)
    for t in (1, 5, 39):
        alpha, before = 1 - process.betas[t], process.alphas_cumprod[t - 1]
        precision = alpha / process.betas[t] + 1 / (1 - before)
        step = process.at(jnp.array([t]))
        np.testing.assert_allclose(np.exp(step.log_small), 1 / precision, rtol=1e-5)
        np.testing.assert_allclose(step.of_x, np.sqrt(alpha) / process.betas[t] / precision, rtol=1e-5)
        np.testing.assert_allclose(step.of_x0, np.sqrt(before) / (1 - before) / precision, rtol=1e-5)


def test_terms_of_the_bound_are_integrals():
    mean, log_variance, other_mean, other_log_variance = 0.3, -1.0, -0.4, 0.5
    p = scipy.stats.norm(mean, np.exp(log_variance / 2))
    q = scipy.stats.norm(other_mean, np.exp(other_log_variance / 2))
    expected, _ = scipy.integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -9, 9)
    np.testing.assert_allclose(gaussian_kl(mean, log_variance, other_mean, other_log_variance), expected, rtol=1e-5)


@pytest.mark.parametrize("mean, scale", [(0.1, 0.3), (-0.98, 0.02), (0.7, 0.004), (-3.0, 0.5)])
def test_discretised_likelihood_sums_to_one_and_is_that_of_scipy(mean, scale):
    levels = 17
    x = np.linspace(-1, 1, levels)
    found = np.asarray(discretised_log_likelihood(jnp.asarray(x, jnp.float32), mean, np.log(scale), levels))
    edges = np.concatenate([[-np.inf], (x[:-1] + x[1:]) / 2, [np.inf]])
    n = scipy.stats.norm(mean, scale)
    # The tails from their own side: differences of distribution functions are exact there.
    below, above = np.log(np.diff(n.cdf(edges)) + 1e-300), np.log(-np.diff(n.sf(edges)) + 1e-300)
    expected = np.where(x < mean, below, above)
    likely = expected > -200
    np.testing.assert_allclose(found[likely], expected[likely], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(np.exp(found).sum(), 1, atol=1e-5)


def test_the_bound_is_that_of_numpy_and_smallest_for_the_truth():
    process = Gaussian(schedule="linear", timesteps=30, prediction="x0", levels=17, variance="fixed_large")

    def by_hand(t, x, x0_hat):
        bar, beta = process.alphas_cumprod, process.betas
        before = bar[t - 1] if t else 1.0
        mean = lambda x0: (np.sqrt(before) * beta[t] * x0 + np.sqrt(1 - beta[t]) * (1 - before) * x) / (1 - bar[t])
        if t == 0:
            variance = beta[1] * (1 - bar[0]) / (1 - bar[1])
            return discretised_log_likelihood(X0, mean(x0_hat), 0.5 * np.log(variance), 17).mean() / -np.log(2)
        small, mu, nu = beta[t] * (1 - before) / (1 - bar[t]), mean(X0), mean(x0_hat)
        kl = 0.5 * (np.log(beta[t] / small) - 1 + small / beta[t] + (mu - nu) ** 2 / beta[t])
        return kl.mean() / np.log(2)

    vlb = jax.jit(process.vlb)
    for t in (0, 1, 29):
        at = jnp.full(3, t)
        x = process.q_sample(X0, at, NOISE)
        for x0_hat in (X0, 0.5 * X0):
            found = vlb(x0_hat, X0, x, at)
            np.testing.assert_allclose(found.mean(), by_hand(t, x, x0_hat), rtol=1e-4, atol=1e-6)
        worse, best = vlb(0.5 * X0, X0, x, at), vlb(X0, X0, x, at)
        assert (worse > best).all() and (best >= 0).all()


def test_bits_per_dimension_are_the_sum_of_the_terms_and_of_the_prior():
    process = Gaussian(schedule="linear", timesteps=30, prediction="x0", levels=17, variance="fixed_small")
    oracle = lambda x, t: X0
    total, terms = jax.jit(lambda rng: process.bits_per_dim(oracle, X0, rng))(jax.random.key(0))
    assert terms.shape == (30, 3)
    np.testing.assert_allclose(terms[1:], 0, atol=1e-6)  # one who knows the data pays for the last step alone
    level = process.alphas_cumprod[-1]
    prior = 0.5 * ((1 - level) - 1 - np.log(1 - level) + level * np.square(X0).mean((1, 2, 3))) / np.log(2)
    np.testing.assert_allclose(total, terms.sum(0) + prior, rtol=1e-4)


def gaussian_denoiser(process, mean=0.4, std=0.3):
    """The exact posterior mean of the noise for data N(mean, std²)."""

    def denoise(x, t):
        at = process.at(t).like(x)
        variance = (at.signal * std) ** 2 + at.noise**2
        return at.noise * (x - at.signal * mean) / variance

    return denoise


@pytest.mark.parametrize("sampler, eta, steps", [("ddpm", 0.0, None), ("ddim", 1.0, None), ("ddim", 0.0, None)])
def test_samplers_draw_from_the_data_distribution(sampler, eta, steps):
    process = Gaussian(timesteps=100)
    x = jax.random.normal(jax.random.key(2), (4000, 1, 1, 1))
    draw = lambda x, rng: process.sample(
        gaussian_denoiser(process), x, rng, sampler=sampler, eta=eta, steps=steps, clip=None
    )
    found = np.asarray(jax.jit(draw)(x, jax.random.key(3)))
    assert abs(found.mean() - 0.4) < 0.02 and abs(found.std() - 0.3) < 0.02


def test_ddim_with_eta_one_is_ddpm():
    """Step by step the same mean and variance, so with the same draws the same sample, though data are clipped."""
    process = Gaussian(timesteps=30)
    x, denoise = jax.random.normal(jax.random.key(2), (50, 1, 1, 1)), gaussian_denoiser(process)
    draw = jax.jit(lambda rng, sampler, eta: process.sample(
        denoise, x, rng, steps=None, clip=0.6, sampler=sampler, eta=eta), static_argnums=(1, 2))  # fmt: skip
    ddpm = draw(jax.random.key(3), "ddpm", 0.0)
    np.testing.assert_allclose(draw(jax.random.key(3), "ddim", 1.0), ddpm, atol=1e-4)
    assert np.abs(ddpm - draw(jax.random.key(3), "ddim", 0.0)).max() > 0.05


def test_learned_variance_lies_between_the_bounds_and_its_term_moves_no_mean():
    process = Gaussian(timesteps=10, variance="learned_range")
    step = process.at(jnp.array([5]))
    for value, bound in ((-1.0, step.log_small), (1.0, step.log_large)):
        np.testing.assert_allclose(process.log_variance(jnp.full(1, value), step), bound, rtol=1e-6)
    network = lambda w, x, t: jnp.concatenate([w[0] * x, w[1] * x], axis=-1)

    def gradients(name):
        return jax.jit(jax.grad(lambda w: process.losses(
            lambda x, t: network(w, x, t), X0, jax.random.key(0))[name].sum()))(jnp.ones(2))  # fmt: skip

    noise, vlb = gradients("noise"), gradients("vlb")
    assert noise[0] != 0 and noise[1] == 0 and vlb[0] == 0 and vlb[1] != 0


def test_weights_of_the_regression_are_min_snr():
    step = Gaussian(timesteps=50).at(jnp.arange(50))
    snr = np.square(np.asarray(step.signal / step.noise))
    expected = np.minimum(snr, 5)
    for prediction, factor in (("x0", 1), ("epsilon", snr), ("v", snr + 1)):
        process = Gaussian(timesteps=50, prediction=prediction, loss_weighting="min_snr")
        np.testing.assert_allclose(process._weight(step), expected / factor, rtol=1e-4)


def test_guidance_of_one_is_the_conditional():
    np.testing.assert_allclose(guide(X0, NOISE, 1.0), X0, atol=1e-6)
    np.testing.assert_allclose(guide(X0, NOISE, 3.0), 3 * X0 - 2 * NOISE, atol=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"schedule": "cosinus"}, "unknown schedule 'cosinus'.*did you mean 'cosine'"),
        ({"prediction": "noise"}, "unknown prediction 'noise'.*epsilon, v, x0"),
        ({"timesteps": 1}, "timesteps=1 must be a whole number from 2"),
        ({"schedule": "linear", "timesteps": 10}, "betas from 0.01 to 2 must rise.*take the cosine schedule"),
        ({"zero_snr": True}, "zero_snr.*set prediction to 'v'"),
    ],
)
def test_what_does_not_work_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Gaussian(**fields)


def test_samplers_refuse_what_they_do_not_have():
    process = Gaussian(timesteps=20)
    draw = lambda **how: process.sample(lambda x, t: x, X0, jax.random.key(0), **how)
    for how, words in (({"steps": 21}, "from 1 to timesteps=20"), ({"sampler": "euler"}, "unknown sampler 'euler'"),
                       ({"sampler": "ddpm", "steps": 5, "eta": 0.5}, "eta=0.5")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            draw(**how)
