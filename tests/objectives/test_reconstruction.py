import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm import model as model_lib
from vfm import objectives, tree
from vfm.data.image import Digits
from vfm.errors import UserError
from vfm.objectives.next_token import rngs
from vfm.objectives.reconstruction import importance_bound, negative_log_likelihood
from vfm.train.state import TrainState
from vfm.train.step import make_train_step

SHAPE, ROWS, HIDDEN = (4, 4, 1), 6, (8,)


def config(bottleneck="gaussian", hidden=HIDDEN, width=3, encoder=None, **decoder):
    both = {"name": "mlp", "item_shape": SHAPE, "hidden": hidden, "num_tokens": 2}
    neck = {"name": bottleneck} if isinstance(bottleneck, str) else bottleneck
    return {
        "centre": "image",
        "backbone": None,
        "encoders": {"image": {**both, "width": width, "bottleneck": neck, **(encoder or {})}},
        "decoders": {"image": {**both, **decoder}},
    }


def batch(rows=ROWS, binary=False, seed=1, real=None):
    items = np.random.default_rng(seed).uniform(size=(rows, 1, *SHAPE)).astype(np.float32)
    return {
        "inputs": {"image": jnp.asarray((items > 0.5).astype(np.float32) if binary else items)},
        "example_mask": jnp.asarray([1.0] * (real or rows) + [0.0] * (rows - (real or rows))),
    }


@functools.cache
def made(key=0, **fields):
    """(model, parameters, other variables); fields: of `config`, with a mapping as a tuple of pairs."""
    fields = {name: dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value
              for name, value in fields.items()}  # fmt: skip
    model = model_lib.build(config(**fields))
    variables = dict(jax.jit(lambda: model_lib.init(model, jax.random.key(key), 1))())
    return model, variables.pop("params"), variables


def evaluate(made_model, given, train=False, seed=0, **fields):
    """(terms, metrics) as {name: sum / count}, and the terms themselves."""
    model, params, variables = made_model
    loss_fn = objectives.build({"name": "reconstruction", **fields}, model)
    variables = {**variables, **getattr(loss_fn, "variables", lambda p: {})(params)}
    run = jax.jit(lambda params, variables, given: loss_fn(params, variables, given, jax.random.key(seed), train=train))
    terms, aux = run(params, variables, given)
    means = lambda pairs: {name: float(pair[-2] / pair[-1]) for name, pair in pairs.items()}
    return means(terms), means(aux.metrics), terms


def test_likelihoods_of_torch():
    torch = pytest.importorskip("torch")
    from torch.distributions import Bernoulli, Normal

    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(2, 5, *SHAPE)).astype(np.float32)
    tx, ty = torch.tensor(x), torch.tensor(y) * 6 - 3
    axes, given = (1, 2, 3), (jnp.asarray(x), jnp.asarray(y) * 6 - 3)
    nll = lambda *args, **rest: jax.jit(lambda: negative_log_likelihood(*args, **rest))()
    wanted = -Normal(ty, 0.3).log_prob(tx).sum(axes).numpy()
    np.testing.assert_allclose(nll("gaussian", *given, log_scale=math.log(0.3)), wanted, rtol=1e-5)
    binary = (tx > 0.5).float()
    wanted = -Bernoulli(logits=ty).log_prob(binary).sum(axes).numpy()
    np.testing.assert_allclose(nll("bernoulli", jnp.asarray(binary.numpy()), given[1]), wanted, rtol=1e-5)
    np.testing.assert_allclose(nll("mse", *given), ((tx - ty) ** 2).mean(axes).numpy(), rtol=1e-5)
    np.testing.assert_allclose(nll("l1", *given), (tx - ty).abs().mean(axes).numpy(), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.002, 0.05, 3.0])
def test_the_levels_of_the_logistic_likelihood_share_all_probability(scale):
    levels = 17
    x = jnp.linspace(0, 1, levels)[:, None]
    y = jnp.full((levels, 1), 0.31)
    nll = jax.jit(lambda: negative_log_likelihood("logistic", x, y, log_scale=math.log(scale), levels=levels))()
    assert bool(jnp.isfinite(nll).all())
    np.testing.assert_allclose(np.exp(-np.asarray(nll, np.float64)).sum(), 1, rtol=1e-4)
    far = lambda y: negative_log_likelihood("logistic", x, y, log_scale=-9.0, levels=levels).sum()
    assert bool(jnp.isfinite(jax.grad(far)(y)).all())


def test_the_terms_are_the_elbo():
    given = batch(binary=True)
    terms, measured, _ = evaluate(made(output="sigmoid"), given, train=True, likelihood="bernoulli")
    model, params, _ = made(output="sigmoid")
    call = lambda: model.apply(
        {"params": params}, **{"inputs": given["inputs"]}, train=True, rngs=rngs(jax.random.key(0))
    )
    out = jax.jit(lambda: call()[1]["image"])()
    p, x = np.asarray(out["reconstructed"], np.float64), np.asarray(given["inputs"]["image"])
    nll = -np.log(np.where(x == 1, p, 1 - p)).sum(axis=(1, 2, 3, 4)).mean()
    mean, logvar = np.asarray(out["encoder"]["mean"]), np.asarray(out["encoder"]["logvar"])
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=(1, 2)).mean()
    np.testing.assert_allclose(terms["reconstruction_image"], nll, rtol=1e-4)
    np.testing.assert_allclose(terms["kl_image"], kl, rtol=1e-4)
    np.testing.assert_allclose(measured["elbo_image"], -nll - kl, rtol=1e-4)
    np.testing.assert_allclose(measured["bits_per_dim_image"], (nll + kl) / 16 / np.log(2), rtol=1e-4)
    np.testing.assert_allclose(measured["mse_image"], ((p - x) ** 2).mean(), rtol=1e-4)


def test_the_bound_rises_with_k_to_the_likelihood():
    """Of a linear decoder with Gaussian noise log p(x) is known: N(x; b, W Wᵀ + σ²)."""
    linear = made(hidden=(), width=2)
    given, sigma = batch(rows=16), 0.5
    kernel = np.asarray(linear[1]["decoders_image"]["projection"]["kernel"], np.float64)
    x = np.asarray(given["inputs"]["image"], np.float64).reshape(16, -1)
    covariance = kernel.T @ kernel + sigma**2 * np.eye(16)
    distance = np.einsum("bi,ij,bj->b", x, np.linalg.inv(covariance), x)
    exact = -0.5 * (distance + np.linalg.slogdet(2 * np.pi * covariance)[1]).mean()
    bounds = [
        evaluate(linear, given, likelihood="gaussian", sigma=sigma, eval_samples=k)[1].get("iwae_image")
        for k in (1, 4, 64, 4096)
    ]
    elbo = evaluate(linear, given, likelihood="gaussian", sigma=sigma, eval_samples=64)[1]["elbo_image"]
    assert bounds[0] is None and elbo < bounds[1] < bounds[2] < bounds[3] < exact + 0.02
    assert exact - bounds[3] < 0.1 * (exact - elbo)
    # In training the same is the loss.
    terms, _, _ = evaluate(linear, given, train=True, likelihood="gaussian", sigma=sigma, samples=64)
    assert set(terms) == {"importance_weighted_image"}
    np.testing.assert_allclose(-terms["importance_weighted_image"], bounds[2], rtol=0.05)
    np.testing.assert_allclose(importance_bound(jnp.log(jnp.asarray([[1.0], [3.0]]))), [math.log(2)], rtol=1e-6)


def test_filling_rows_do_not_count():
    some, every = batch(real=4), batch()
    some["inputs"] = {"image": some["inputs"]["image"].at[4:].set(50.0)}
    four = {"inputs": {"image": every["inputs"]["image"][:4]}, "example_mask": jnp.ones(4)}
    one, two = (evaluate(made(bottleneck="none"), given, likelihood="gaussian") for given in (some, four))
    assert one[0] == pytest.approx(two[0], rel=1e-5) and one[1] == pytest.approx(two[1], rel=1e-5)


VQ = (("name", "vq"), ("codebook_size", 8))


def test_terms_of_codes():
    model = made(bottleneck=VQ)
    terms, measured, raw = evaluate(model, batch(), codebook=2.0, commitment=0.5)
    assert set(terms) == {"reconstruction_image", "codebook_image", "commitment_image"}
    assert [raw[f"{name}_image"][0] for name in ("codebook", "commitment")] == [2.0, 0.5]
    assert terms["codebook_image"] == pytest.approx(terms["commitment_image"], rel=1e-6)
    summed, nats, _ = evaluate(model, batch(), likelihood="gaussian")
    assert summed["codebook_image"] == pytest.approx(6 * terms["codebook_image"], rel=1e-5)  # 2 latents of width 3
    assert nats["elbo_image"] == pytest.approx(-summed["reconstruction_image"] - 2 * math.log(8), rel=1e-5)
    assert 1 <= measured["perplexity_image"] <= 8 * measured["code_usage_image"] + 1e-4
    averages = made(bottleneck=(*VQ, ("update", "ema")))
    assert set(evaluate(averages, batch())[0]) == {"reconstruction_image", "commitment_image"}


def test_training_moves_the_codes():
    model, params, variables = made(bottleneck=(*VQ, ("update", "ema")))
    loss_fn = objectives.build({"name": "reconstruction"}, model)
    run = lambda train: jax.jit(
        lambda: loss_fn(params, variables, batch(), jax.random.key(0), train=train)[1].variables
    )()
    before = variables["codebook"]["encoders_image"]["quantizer"]["codebook"]["embedding"]
    codes = lambda found: found["codebook"]["encoders_image"]["quantizer"]["codebook"]["embedding"]
    assert bool((codes(run(True)) != before).all()) and bool((codes(run(False)) == before).all())


def test_the_kl_rises_to_its_weight():
    model, params, variables = made()
    loss_fn = objectives.build({"name": "reconstruction", "beta": 0.5, "warmup": 4}, model)
    variables = {**variables, **loss_fn.variables(params)}
    run = jax.jit(lambda v, train: loss_fn(params, v, batch(), jax.random.key(0), train=train), static_argnums=1)
    weights = []
    for _ in range(6):
        assert float(run(variables, False)[0]["kl_image"][0]) == 0.5
        terms, aux = run(variables, True)
        variables = aux.variables
        weights.append(float(terms["kl_image"][0]))
    assert weights == [0, 0.125, 0.25, 0.375, 0.5, 0.5]


def test_a_learned_scale_learns_the_size_of_the_error():
    model, params, variables = made(bottleneck="none", learned_scale=True)
    loss_fn = objectives.build({"name": "reconstruction", "likelihood": "gaussian"}, model)

    def loss(log_scale):
        decoder = {**params["decoders_image"], "log_scale": log_scale}
        terms, aux = loss_fn({**params, "decoders_image": decoder}, variables, batch(), jax.random.key(0), train=True)
        return terms["reconstruction_image"][1], aux.metrics["mse_image"]

    mse = jax.jit(loss)(jnp.zeros(()))[1]
    at_best = jax.jit(jax.grad(lambda s: loss(s)[0]))(0.5 * jnp.log(mse[0] / mse[1]))
    assert abs(float(at_best)) < 1e-2


@pytest.mark.parametrize(
    "model, fields, message",
    [
        ({}, {"likelihood": "poisson"}, "unknown likelihood 'poisson'"),
        ({}, {"likelihood": "bernoulli"}, r"needs logits; set model.decoders.image \(MLPDecoder\).output='sigmoid'"),
        ({"learned_scale": True}, {}, "likelihood='mse' has no scale"),
        ({}, {"samples": 5}, "needs a likelihood in nats"),
        ({}, {"samples": 5, "likelihood": "gaussian", "beta": 2.0}, "beta=1"),
        ({}, {"sigma": 0.0}, "sigma=0.0 must be more than 0"),
    ],
    ids=["likelihood", "logits", "scale", "nats", "beta", "sigma"],
)
def test_refuses(model, fields, message):
    with pytest.raises(UserError, match=message):
        objectives.build({"name": "reconstruction", **fields}, model_lib.build(config(**model)))


def test_refuses_items_out_of_range_and_models_without_halves():
    loss_fn = objectives.build(
        {"name": "reconstruction", "likelihood": "bernoulli"}, model_lib.build(config(output="sigmoid"))
    )
    row = {"inputs": {"image": np.full((1, *SHAPE), -1.0, np.float32)}}
    with pytest.raises(UserError, match=r"image of row 0 has numbers from -1 to -1, but must be within \[0, 1\]"):
        loss_fn.check_row(row, "row 0")
    with pytest.raises(UserError, match="needs a modality with an encoder and a decoder"):
        objectives.build({"name": "reconstruction"}, model_lib.build({**config(), "decoders": {}}))


@pytest.mark.parametrize("rows, moves", [((), True), (("decoders_image/.*",), True), (("encoders_image/.*",), False)])
def test_the_codebook_of_a_frozen_encoder_stays(rows, moves):
    model, params, variables = made(bottleneck=(*VQ, ("update", "ema")))
    loss_fn = objectives.build({"name": "reconstruction"}, model)
    learns = jax.tree.map(lambda path: not any(re.fullmatch(row, path) for row in rows), tree.paths(params))
    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx, lambda step: 0.1, trained=learns)
    state = TrainState(jnp.int32(0), params, tx.init(params), variables, {}, jax.random.key(0))
    after = jax.jit(step)(state, batch())[0].variables["codebook"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after, variables["codebook"])
    assert all(jax.tree.leaves(same)) != moves


@pytest.mark.slow
def test_restarts_keep_a_codebook_in_use_that_would_collapse():
    """Handwritten digits, 128 codes that start within ±1/128: without help few are ever used."""
    images = jnp.asarray(Digits("train").images)[:400, None]

    def usage(**fields):
        neck = {"name": "vq", "codebook_size": 128, **fields}
        both = {"name": "mlp", "item_shape": (8, 8, 1), "hidden": (64,), "num_tokens": 8}
        halves = {"encoders": {"image": {**both, "width": 8, "bottleneck": neck}}, "decoders": {"image": both}}
        model = model_lib.build({"centre": "image", "backbone": None, **halves})
        variables = dict(jax.jit(lambda: model_lib.init(model, jax.random.key(0), 1))())
        params, tx = variables.pop("params"), optax.adam(1e-3)
        step = make_train_step(objectives.build({"name": "reconstruction"}, model), tx, lambda step: 1e-3)

        def body(state, key):
            rows = jax.random.randint(key, (64,), 0, len(images))
            return step(state, {"inputs": {"image": images[rows]}, "example_mask": jnp.ones(64)})[0], ()

        state = TrainState(jnp.int32(0), params, tx.init(params), variables, {}, jax.random.key(0))
        state = jax.jit(lambda state: jax.lax.scan(body, state, jax.random.split(jax.random.key(1), 150))[0])(state)
        weights = {"params": state.params, **state.variables}
        run = jax.jit(
            lambda: model.apply(weights, inputs={"image": images}, train=False)[1]["image"]["encoder"]["usage"]
        )
        return float(run())

    assert usage(codebook_init="uniform") < 0.2
    assert usage(codebook_init="uniform", restart=10) > 0.9
    assert usage(codebook_init="data", restart=10) > 0.9
