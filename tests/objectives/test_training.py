"""The training step on the objectives: accumulation, averaging, and learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm import metrics, objectives, tree
from vfm import model as model_lib
from vfm.train import step
from vfm.train.state import TrainState

V, D, W, T = 11, 16, 12, 12
WORDS = {
    "centre": "text",
    "encoders": {
        "text": {"name": "text", "vocab_size": V, "width": D},
        "vector": {"name": "vector", "num_features": 3, "num_tokens": 2, "width": W, "mlp_dim": 8},
    },
    "input_projectors": {"vector": {"name": "linear", "width": D}},
    "backbone": {"name": "decoder_only", "width": D, "depth": 1, "mlp_dim": 16, "max_len": T},
    "output_projectors": {"vector": {"name": "linear", "width": W}},
    "decoders": {"text": {"name": "text", "vocab_size": V}},
}
IMAGE = {"name": "vit", "image_size": (4, 4), "patch_size": 2, "width": W, "depth": 1, "mlp_dim": 8}
DECODER = {"name": "autoencoder", "grid": (2, 2), "upsample": (2,), "conv_width": 8}
PICTURES = {
    **WORDS,
    "encoders": {"text": WORDS["encoders"]["text"], "image": IMAGE},
    "input_projectors": {"image": {"name": "linear", "width": D}},
    "output_projectors": {"image": {"name": "linear", "width": W}},
    "decoders": {"text": {"name": "text", "vocab_size": V}, "image": DECODER},
}
ONLY_TEXT = {**{kind: {"text": WORDS[kind]["text"]} for kind in ("encoders", "decoders")},
             "centre": "text", "backbone": WORDS["backbone"]}  # fmt: skip


def state_of(model, tx, ema=False):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))["params"]
    draw = lambda path, leaf: jnp.asarray(rng.normal(path.endswith("scale"), 0.2, leaf.shape), jnp.float32)
    return fresh(jax.tree.map(draw, tree.paths(shapes), shapes), tx, ema)


def fresh(params, tx, ema=False):
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), variables={},
                      ema=params if ema else {}, rng=jax.random.key(1))  # fmt: skip


def batch_of(rows, name, shape, read, generated):
    """Text, and an item per row that is read or generated (row numbers)."""
    rng = np.random.default_rng(0)
    row = np.arange(rows)[:, None]
    return {
        "tokens": rng.integers(0, V, (rows, T)).astype(np.int32),
        "targets": rng.integers(0, V, (rows, T)).astype(np.int32),
        # Uneven: row r has r + 1 positions that count.
        "loss_mask": (np.arange(T)[None] > T - 2 - row).astype(np.float32),
        "input_mask": np.ones((rows, T), bool),
        "inputs": {name: rng.uniform(size=(rows, 1, *shape)).astype(np.float32)},
        "starts": {name: np.where(np.isin(row, read), 0, -1)},
        "signal_starts": {name: np.where(np.isin(row, generated), 6, -1)},
        "example_mask": np.ones((rows,), np.float32),
        "skipped": np.asarray([0, 2, 1] + [0] * (rows - 3), np.int32),
    }


def test_accumulation_and_average_equal_the_whole_batch():
    """Also where the masks are uneven, and where a micro-batch has nothing of one term (rows 1 and 5).

    Other numbers of micro-batches: below, with a loss that compiles sooner.
    """
    model = model_lib.build(WORDS)
    loss_fn = objectives.build({"name": "any_to_any", "conversion": 3.0}, model)
    tx = optax.sgd(0.1)  # a step in proportion to the gradient hides nothing
    batch, decay = batch_of(8, "vector", (3,), read=[0, 1, 3], generated=[0, 2, 3, 6]), 0.75
    found = {}
    for accumulate in (1, 4):
        run = jax.jit(step.make_train_step(loss_fn, tx, lambda step: 0.5 * (step + 1), accumulate=accumulate,
                                           ema_decay=decay))  # fmt: skip
        state, history = state_of(model, tx, ema=True), []
        for i in range(2):
            state, measured = run(state, batch)
            history.append((state, metrics.finalize(measured)))
            assert int(state.step) == i + 1
        found[accumulate] = history
    start = state_of(model, tx).params
    for i in range(2):
        expected, numbers = found[1][i]
        assert numbers["learning_rate"] == 0.5 * (i + 1) and numbers["skipped_records"] == 3
        assert numbers["loss"] == pytest.approx(numbers["text"] + 3 * numbers["conversion_vector"], rel=1e-5)
        state, others = found[4][i]
        assert others == pytest.approx(numbers, rel=1e-5)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params)):
            np.testing.assert_allclose(a, b, atol=1e-6)
    one, two = (found[1][i][0] for i in (0, 1))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one.params, start)
    assert max(jax.tree.leaves(moved)) > 1e-2
    averaged = lambda old, new: jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)
    for state, expected in ((one, averaged(start, one.params)), (two, averaged(one.ema, two.params))):
        for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, atol=1e-6)


def linear(params, variables, batch, rng, *, train):
    """Two terms of another mask each, a metric, a draw, and a count of the calls."""
    error = batch["x"] @ params["w"] - batch["y"]
    terms = {"a": (1.0, *metrics.mean(error**2, batch["m"])), "b": (0.3, *metrics.mean(jnp.abs(error), 1 - batch["m"]))}
    drawn = {"draw": (jax.random.uniform(rng) if train else jnp.zeros(()), jnp.ones(())), "train": (train * 1.0, 1.0)}
    return terms, objectives.Aux(drawn, {"calls": variables["calls"] + 1})


def regression(rows=16):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = jnp.asarray((np.arange(rows) % 4 == 1) | (np.arange(rows) == 2), jnp.float32)
    state = fresh({"w": draw(5)}, optax.sgd(0.1)).replace(variables={"calls": jnp.zeros(())})
    return state, {"x": draw(rows, 5), "y": draw(rows), "m": mask}


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8, 16])
def test_a_step_is_that_of_the_formula_with_any_number_of_micro_batches(accumulate):
    state, batch = regression()
    run = jax.jit(step.make_train_step(linear, optax.sgd(0.1), lambda step: 0.1, accumulate=accumulate))
    after, measured = run(state, batch)
    x, y, m, w = (np.asarray(a, np.float64) for a in (batch["x"], batch["y"], batch["m"], state.params["w"]))
    error = x @ w - y
    gradient = 2 * x.T @ (error * m) / m.sum() + 0.3 * x.T @ (np.sign(error) * (1 - m)) / (1 - m).sum()
    np.testing.assert_allclose(after.params["w"], w - 0.1 * gradient, atol=1e-6)
    numbers = metrics.finalize(measured)
    assert numbers["a"] == pytest.approx((error**2 * m).sum() / m.sum(), rel=1e-5)
    assert numbers["loss"] == pytest.approx(numbers["a"] + 0.3 * numbers["b"], rel=1e-5)
    assert numbers["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert float(after.variables["calls"]) == accumulate  # what has no gradient goes from one to the next


def test_randomness_differs_from_step_to_step_and_between_micro_batches():
    state, batch = regression()
    run = lambda **options: jax.jit(step.make_train_step(linear, optax.sgd(0.1), lambda step: 0.1, **options))
    whole, halves = run(), run(accumulate=2)
    draws = []
    for _ in range(3):
        draws.append(metrics.finalize(whole(state, batch)[1])["draw"])
        state, measured = halves(state, batch)
        draws.append(metrics.finalize(measured)["draw"])  # the mean of two draws
    assert len(set(draws)) == 6
    assert metrics.finalize(halves(state, batch)[1])["draw"] == metrics.finalize(halves(state, batch)[1])["draw"]


def test_evaluation_has_no_randomness_and_reports_the_whole_loss():
    state, batch = regression()
    measured, weights = jax.jit(step.make_eval_step(linear))(state.params, state.variables, batch)
    numbers = metrics.finalize(measured)
    assert numbers["train"] == numbers["draw"] == 0
    total = step.total_loss(metrics.fetch(measured), {name: float(weight) for name, weight in weights.items()})
    assert total == pytest.approx(numbers["a"] + 0.3 * numbers["b"], rel=1e-5)
    # A term that was nowhere measured adds nothing.
    assert step.total_loss({"a": (6.0, 3.0), "b": (0.0, 0.0)}, {"a": 2.0, "b": 5.0}) == 4


def test_evaluation_draws_other_noise_for_every_batch_and_the_same_every_time():
    def noisy(params, variables, batch, rng, *, train):
        return {"noise": (1.0, jax.random.normal(rng), jnp.ones(()))}, objectives.Aux({}, variables)

    evaluate = jax.jit(step.make_eval_step(noisy))
    draws = [float(evaluate({}, {}, {}, number)[0]["noise"][0]) for number in (0, 1, 2, 0, 1, 2)]
    assert draws[:3] == draws[3:] and len(set(draws)) == 3


@pytest.mark.parametrize("name", ["any_to_any", "next_token"])
def test_one_batch_can_be_learnt_by_heart(name):
    """The other objectives: tests/objectives/test_pretraining.py."""
    model = model_lib.build(PICTURES if name != "next_token" else ONLY_TEXT)
    loss_fn = objectives.build({"name": name}, model)
    steps = 150
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-2, 10, steps))
    batch = batch_of(4, "image", (4, 4, 1), read=[0, 1], generated=[2, 3])
    batch = batch if name != "next_token" else {key: x for key, x in batch.items() if not isinstance(x, dict)}
    run = step.make_train_step(loss_fn, tx, lambda step: 0.0)

    @jax.jit
    def train(state):
        return jax.lax.scan(lambda state, _: run(state, batch), state, length=steps)

    state, measured = train(state_of(model, tx))
    history = {name: np.asarray(total / count) for name, (total, count) in measured.items()}
    terms = set(history) - {"loss", "grad_norm", "learning_rate", "skipped_records", "token_accuracy"}
    assert terms >= {"text"}
    for term in sorted(terms):
        assert history[term][-1] < 0.1 * history[term][:3].max(), (term, history[term][::10])
    assert history["token_accuracy"][-1] == 1
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))
