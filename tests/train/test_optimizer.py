import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vfm import tree
from vfm.errors import UserError
from vfm.train.optimizer import OPTIMIZERS, SCHEDULES, _decay, build_optimizer, build_schedule, state_shardings

FIXTURES = Path(__file__).parents[2] / ".." / "shared" / "fixtures" / "functions"
STEPS = 5


def config(**fields):
    return ml_collections.ConfigDict({"name": "adamw", "learning_rate": 0.01, **fields})


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "encoder": {"kernel": draw(6, 4), "bias": draw(4)},
        "head": {"kernel": draw(4, 8), "bias": draw(8), "norm": {"scale": draw(8)}},
        "text": {"embedding": draw(16, 4), "signals": draw(3, 4)},
    }


def run(cfg, params, grads, steps=100):
    """The parameters after each gradient, and the last state."""
    tx, _ = build_optimizer(cfg, jax.eval_shape(lambda: params), steps)
    state, history = tx.init(params), []

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = step(params, state, g)
        history.append(params)
    return history, state


def make_grads(params, n=STEPS):
    rng = np.random.default_rng(1)
    draw = lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32)
    return [jax.tree.map(draw, params) for _ in range(n)]


# Schedules.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "constant"}, {0: 0.0, 5: 0.5, 10: 1.0, 55: 1.0, 100: 1.0, 500: 1.0}),
        ({"name": "linear", "end_value": 0.1}, {0: 0.0, 10: 1.0, 55: 0.55, 100: 0.1, 500: 0.1}),
        ({"name": "cosine", "end_value": 0.1}, {0: 0.0, 10: 1.0, 55: 0.55, 100: 0.1, 500: 0.1}),
        (
            {"name": "wsd", "end_value": 0.1, "decay_fraction": 0.2},
            {0: 0.0, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 500: 0.1},
        ),
        ({"name": "rsqrt", "end_value": 0.3}, {0: 0.0, 10: 1.0, 40: 0.5, 90: 1 / 3, 500: 0.3}),
    ],
)
def test_schedule_corners(fields, expected):
    schedule = build_schedule(config(learning_rate=1.0, schedule={"warmup_steps": 10, **fields}), 100)
    for step, value in expected.items():
        np.testing.assert_allclose(jax.jit(schedule)(step), value, rtol=1e-5, atol=1e-7, err_msg=str(step))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_without_warmup_start_at_the_peak(name):
    schedule = build_schedule(config(schedule={"name": name}), 50)
    np.testing.assert_allclose(schedule(0), 0.01, rtol=1e-6)
    last = {"constant": 0.01, "rsqrt": 0.01 * (10_000 / 10_050) ** 0.5}.get(name, 0.0)
    np.testing.assert_allclose(schedule(50), last, rtol=1e-6, atol=1e-9)


def test_schedules_against_the_reference_library():
    folder = FIXTURES / "lr_schedules"
    if not folder.exists():
        pytest.skip("reference fixtures are not here")
    io = np.load(folder / "io.npz")
    cases = {
        "constant_with_warmup": {"name": "constant"},
        "linear": {"name": "linear"},
        "cosine": {"name": "cosine"},
        "cosine_with_min_lr": {"name": "cosine", "end_value": 0.1},
        "inverse_sqrt": {"name": "rsqrt"},
    }
    for reference, fields in cases.items():
        schedule = build_schedule(config(learning_rate=1.0, schedule={"warmup_steps": 6, **fields}), 40)
        ours = [float(schedule(step)) for step in range(41)]
        np.testing.assert_allclose(ours, io[f"out/{reference}"][:41], rtol=1e-5, atol=1e-5, err_msg=reference)


# Updates.


def numpy_adamw(params, grads, lr, decay, b1=0.9, b2=0.999, eps=1e-8):
    p, m, v, history = np.float64(params), 0.0, 0.0, []
    for t, g in enumerate(np.float64(grads), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
        history.append(p)
    return history


def numpy_lion(params, grads, lr, decay, b1=0.9, b2=0.99):
    p, m, history = np.float64(params), 0.0, []
    for g in np.float64(grads):
        p, m = p - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * p), b2 * m + (1 - b2) * g
        history.append(p)
    return history


@pytest.mark.parametrize(("name", "reference"), [("adamw", numpy_adamw), ("lion", numpy_lion)])
def test_updates_against_numpy_with_groups(name, reference):
    params = make_params()
    grads = make_grads(params)
    rows = (("encoder/.*", 0.1), (".*", 1))
    cfg = config(name=name, weight_decay=0.5, learning_rate_multipliers=rows)
    history, _ = run(cfg, params, grads)
    flat_grads = [tree.flatten(g) for g in grads]
    for path, start in tree.flatten(params).items():
        lr = 0.001 if path.startswith("encoder") else 0.01
        decay = 0.5 if path.endswith(("kernel", "embedding")) else 0.0
        expected = reference(start, [g[path] for g in flat_grads], lr, decay)
        ours = [tree.flatten(p)[path] for p in history]
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6, err_msg=path)


def test_updates_against_the_reference_libraries():
    folder = FIXTURES / "optimizers"
    if not folder.exists():
        pytest.skip("reference fixtures are not here")
    io, tolerance = np.load(folder / "io.npz"), json.loads((folder / "meta.json").read_text())["tolerance"]
    params = {"w": jnp.asarray(io["in/w"]), "b": jnp.asarray(io["in/b"])}
    grads = [{"w": w, "b": b} for w, b in zip(io["in/gw"], io["in/gb"], strict=True)]
    cases = {
        "adamw": {"name": "adamw", "weight_decay": ((".*", 0.1),)},
        "lion_numpy": {"name": "lion", "weight_decay": ((".*", 0.1),)},
        "adafactor_transformers": {
            "name": "adafactor",
            "multiply_by_parameter_scale": False,
            "min_dim_size_to_factor": 1,
        },
    }
    for reference, fields in cases.items():
        history, _ = run(config(**fields), params, grads)
        for leaf in ("w", "b"):
            ours = np.stack([p[leaf] for p in history])
            np.testing.assert_allclose(ours, io[f"out/{reference}/{leaf}"], **tolerance, err_msg=reference)
    for limit in (1.0, 5.0):
        cfg = config(name="sgd", learning_rate=1.0, clip_norm=limit)
        stepped = run(cfg, params, [grads[0]])[0][0]
        for leaf in ("w", "b"):
            change = params[leaf] - stepped[leaf]
            np.testing.assert_allclose(change, io[f"out/clip_{limit}/g{leaf}"], rtol=1e-4, atol=1e-6)


def test_kernels_of_experts_decay():
    shapes = {
        "mlp": {name: jnp.zeros((2, 3, 3)) for name in ("experts_up", "experts_gate", "experts_down", "router_x")}
    }
    decayed = {path.rpartition("/")[2] for path, value in _decay(0.1, shapes).items() if value}
    assert decayed == {"experts_up", "experts_gate", "experts_down"}


def test_a_clip_norm_of_0_clips_nothing():
    params, grads = {"x": jnp.zeros(2)}, [{"x": 100 * jnp.ones(2)}]
    history, _ = run(config(name="sgd", learning_rate=1.0, clip_norm=0.0), params, grads)
    np.testing.assert_allclose(history[0]["x"], [-100, -100])


def test_sgd_momentum():
    params, grads = {"x": jnp.zeros(2)}, [{"x": jnp.ones(2)}] * 3
    history, _ = run(config(name="sgd", learning_rate=1.0, momentum=0.5), params, grads)
    np.testing.assert_allclose([p["x"][0] for p in history], [-1, -2.5, -4.25])


def test_schedule_is_followed_by_the_updates():
    cfg = config(name="sgd", learning_rate=1.0, schedule={"name": "linear", "warmup_steps": 2})
    history, _ = run(cfg, {"x": jnp.zeros(())}, [{"x": jnp.ones(())}] * 6, steps=6)
    np.testing.assert_allclose(-np.diff([0, *[p["x"] for p in history]]), [0, 0.5, 1, 0.75, 0.5, 0.25])


# Freezing.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_do_not_move_have_no_state_and_do_not_clip(name):
    params = make_params()
    grads = make_grads(params)
    poison = lambda x: x * jnp.nan
    poisoned = [{**g, "encoder": jax.tree.map(poison, g["encoder"])} for g in grads]
    fields = {"name": name, "clip_norm": 0.5, "weight_decay": 0.1, "learning_rate": 0.1}
    if name == "adafactor":
        fields["min_dim_size_to_factor"] = 2
    history, state = run(config(frozen=("encoder/.*",), **fields), params, poisoned)
    assert tree.digest(history[-1], "encoder/.*") == tree.digest(params, "encoder/.*")
    assert tree.digest(history[-1], "head/.*") != tree.digest(params, "head/.*")

    # The others move exactly as if the frozen ones did not exist, and the state is no larger.
    rest = lambda t: {k: v for k, v in t.items() if k != "encoder"}
    alone, alone_state = run(config(**fields), rest(params), [rest(g) for g in grads])
    assert tree.digest(rest(history[-1])) == tree.digest(alone[-1])
    assert tree.nbytes(state) == tree.nbytes(alone_state)


# Sharding of the state.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [(), ("encoder/.*",)])
def test_state_shardings_on_eight_devices(name, frozen):
    params = make_params()
    grads = make_grads(params)
    fields = {"clip_norm": 1.0, "weight_decay": 0.1, "frozen": frozen}
    fields.update({"adafactor": {"min_dim_size_to_factor": 4}, "sgd": {"momentum": 0.9}}.get(name, {}))
    cfg = config(name=name, **fields)
    expected, _ = run(cfg, params, grads)

    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = [(".*/kernel", P("fsdp", "tensor")), (".*/embedding", P("tensor", None)), (".*", P())]
    specs = tree.match(params, rules, "test")
    shapes = jax.eval_shape(lambda: params)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    tx, _ = build_optimizer(cfg, shapes, 100)
    state_shape = jax.eval_shape(tx.init, shapes)
    state_sharding = state_shardings(tx, shapes, shardings, mesh, state_shape)
    assert jax.tree.structure(state_sharding) == jax.tree.structure(state_shape)

    # Every leaf that has its parameter's path and shape has its sharding, the others are replicated.
    flat_params, flat_shardings, mirrored = tree.flatten(shapes), tree.flatten(shardings), 0
    for path, leaf in tree.flatten(state_shape).items():
        owner = next((p for p in flat_params if path.endswith("/" + p)), None)
        follows = owner is not None and leaf.shape == flat_params[owner].shape
        mirrored += follows
        expect = flat_shardings[owner] if follows else NamedSharding(mesh, P())
        assert tree.flatten(state_sharding)[path] == expect, path
    # 7 parameters, 2 of them in the encoder. Adafactor keeps whole moments for what is too small to factor.
    slots = {"adamw": 2, "lion": 1, "sgd": 1}.get(name)
    assert mirrored == slots * (5 if frozen else 7) if slots else mirrored > 0

    sharded = jax.device_put(params, shardings)
    state = jax.jit(tx.init, out_shardings=state_sharding)(sharded)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=(shardings, state_sharding))
    for g in grads:
        sharded, state = step(sharded, state, g)
    for path, value in tree.flatten(sharded).items():
        reference = tree.flatten(expected[-1])[path]
        np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-6, err_msg=path)


def test_adafactor_factors_and_replicates_rows_and_columns():
    params = {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}
    tx, _ = build_optimizer(config(name="adafactor", min_dim_size_to_factor=8), params, 10)
    shape = jax.eval_shape(tx.init, params)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = {"kernel": NamedSharding(mesh, P(None, "fsdp")), "bias": NamedSharding(mesh, P("fsdp"))}
    flat = tree.flatten(state_shardings(tx, params, shardings, mesh, shape))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(shape).items()}
    rows = [path for path in shapes if path.endswith("kernel")]
    assert sorted(shapes[path] for path in rows) == [(1,), (8,), (16,)]
    assert all(flat[path].spec == P() for path in rows)
    assert [flat[path].spec for path in shapes if path.endswith("v/bias")] == [P("fsdp")]


# Bad input.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamW"}, "unknown optimizer 'adamW'.*did you mean 'adamw'.*adafactor, adamw, lion, sgd"),
        ({"learning_rate": 0}, "learning_rate=0.* must be a positive number"),
        ({"learning_rat": 0.1}, "did you mean 'learning_rate'"),
        ({"name": "lion", "eps": 1e-8}, "unknown field of lion 'eps' in optimizer.*b1, b2"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"schedule": {"name": "cosin"}}, "did you mean 'cosine'"),
        ({"schedule": {"name": "cosine", "warmup": 3}}, "unknown field of cosine 'warmup'"),
        ({"schedule": {"name": "cosine", "warmup_steps": 100}}, "less than train.steps=100"),
        ({"schedule": {"name": "linear", "end_value": 1.0}}, "end_value=1.0"),
        ({"schedule": {"name": "constant", "end_value": 0.001}}, "constant never reaches"),
        ({"schedule": {"name": "wsd", "decay_fraction": 0.95, "warmup_steps": 10}}, "decay_fraction=0.95"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": (("head/.*", 0.1),)}, "no row matches the parameter 'encoder/bias'"),
        ({"weight_decay": ("head/.*", 0.1)}, "tuple of rows"),
        ({"learning_rate_multipliers": (("haed/.*", 0.1), (".*", 1))}, "'haed/.*' matches no parameter"),
        ({"learning_rate_multipliers": ((".*", "x"),)}, "must be a number"),
        ({"frozen": ("encoder",)}, "optimizer.frozen: the row 'encoder' matches no parameter"),
        ({"frozen": (".*",)}, "freezes every parameter"),
    ],
)
def test_bad_input_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(config(**fields), make_params(), 100)
