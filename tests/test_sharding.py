"""The strict sharding table, the mesh, and training that is the same on every mesh."""

import contextlib
import difflib
import functools
import itertools
import logging
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny
from vfm import metrics, sharding, tree
from vfm.errors import UserError
from vfm.experiment import Experiment

GOLDEN = Path(__file__).parent / "golden" / "sharding.txt"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@functools.cache
def experiment(devices=8, arg="", **changes):
    changes = {"mesh.data": -1, **changes} if devices == 1 else {"mesh.data": 1, **changes}
    return Experiment(tiny.config(arg, **changes), jax.devices()[:devices])


def cube():
    return experiment(**tiny.CUBE)


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def axes(mesh, path, *shape, rules=sharding.RULES):
    parent, _, name = path.rpartition("/")
    leaf = tree.unflatten({path: struct(*shape)})
    return tuple(tree.flatten(sharding.parameter_shardings(leaf, mesh, rules))[path].spec)


# --------------------------------------------------------------------------------------------- the table


def test_a_path_that_no_row_matches_is_refused():
    with pytest.raises(UserError, match=r"no row matches parameter backbone/querry/kernel of shape \(16, 8, 2\)"):
        sharding.parameter_names("backbone/querry/kernel", (16, 8, 2))
    mesh = sharding.make_mesh({"fsdp": 8})
    params = {"backbone": {"query": {"kernel": struct(16, 8, 2)}, "typo": {"kernel": struct(16, 16)}}}
    with pytest.raises(UserError, match=r"backbone/typo/kernel of shape \(16, 16\)"):
        sharding.parameter_shardings(params, mesh)


def test_a_row_of_another_rank_is_refused():
    with pytest.raises(UserError, match=r"backbone/up/kernel has shape \(16,\).* 2 dimensions: \('embed', 'mlp'\)"):
        sharding.parameter_names("backbone/up/kernel", (16,))
    # Under a stack of layers the row names the dimensions behind that of the layers.
    assert sharding.parameter_names("backbone/layers/up/kernel", (2, 16, 32)) == ("layers", "embed", "mlp")
    with pytest.raises(UserError, match="3 dimensions"):
        sharding.parameter_names("backbone/layers/up/kernel", (16, 32))


def test_a_name_without_a_rule_is_refused():
    mesh = sharding.make_mesh({"fsdp": 8})
    rules = {name: axis for name, axis in sharding.RULES.items() if name != "mlp"}
    assert axes(mesh, "a/query/kernel", 16, 8, 2, rules=rules) == ("fsdp", None, None)
    with pytest.raises(UserError, match="unknown dimension name 'mlp' in the sharding of a/up/kernel"):
        axes(mesh, "a/up/kernel", 16, 32, rules=rules)
    with sharding.use_mesh(mesh), pytest.raises(UserError, match="unknown dimension name 'lenght'"):
        jax.jit(lambda x: sharding.constrain(x, "batch", "lenght", "width"))(jnp.zeros((8, 4, 4)))


def test_two_dimensions_on_one_axis_are_refused():
    rules = {**sharding.RULES, "vocab": "fsdp"}
    with pytest.raises(
        UserError, match="'fsdp' divides two of its dimensions .'vocab', 'embed'.*config.sharding_rules"
    ):
        sharding.spec(("vocab", "embed"), rules, (16, 16), sharding.make_mesh({"fsdp": 8}), "a table")


def test_the_first_row_that_matches_wins():
    table = ((r".*/special/kernel", ("vocab",)), (r".*/kernel", ("embed",)))
    assert sharding.parameter_names("a/special/kernel", (8,), table) == ("vocab",)
    assert sharding.parameter_names("a/other/kernel", (8,), table) == ("embed",)
    assert sharding.parameter_names("a/special/kernel", (8,), table[::-1]) == ("embed",)
    with pytest.raises(UserError, match="no row matches"):  # the whole path must match
        sharding.parameter_names("a/special/kernel/more", (8,), table)


def test_an_indivisible_dimension_is_replicated_and_told_once(caplog):
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert axes(mesh, "told_once/up/kernel", 6, 32) == (None, "tensor")
    told = [record.getMessage() for record in caplog.records if "told_once" in record.getMessage()]
    assert told == [
        "sharding: told_once/up/kernel: dimension 'embed' of size 6 is replicated: mesh axes fsdp (4) do not divide it"
    ]
    assert axes(mesh, "told_once/up/kernel", 8, 32) == ("fsdp", "tensor")


def test_every_rule_names_axes_of_the_mesh():
    for rules in (sharding.RULES, cube().rules):
        used = [axis for rule in rules.values() for axis in ((rule,) if isinstance(rule, str) else rule or ())]
        assert set(used) <= set(sharding.MESH_AXES)
    # A config may change a rule: with the embeddings replicated nothing but the tensor axis is left.
    config = tiny.config("text", **{"mesh.fsdp": 4, "mesh.tensor": 2})
    with config.unlocked():
        config.sharding_rules = {"embed": None}
    specs = {tuple(s.spec) for s in jax.tree.leaves(Experiment(config).shardings.params)}
    assert {axis for spec in specs for axis in spec} == {None, "tensor"}


# ---------------------------------------------------------------------------------------------- the mesh


def test_a_mesh_has_all_axes_and_fills_one():
    assert dict(sharding.make_mesh({"data": -1}).shape) == dict(data=8, fsdp=1, tensor=1, context=1, expert=1, stage=1)
    assert dict(sharding.make_mesh({"fsdp": -1, "tensor": 2}).shape)["fsdp"] == 4
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, jax.devices()[2:6])
    assert sorted(d.id for d in mesh.devices.flat) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 3}, r"\{'data': 3\} does not fit 8 devices; the product of the sizes must be 8"),
        ({"data": -1, "tensor": 3}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "sizes must be positive"),
        ({"data": -2}, "sizes must be positive"),
        ({"tensr": 8}, "unknown mesh axis 'tensr' in config.mesh; did you mean 'tensor'?"),
    ],
)
def test_a_mesh_that_cannot_be(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes)


@pytest.mark.parametrize(
    "changes", [{"train.batch_size": 12}, {"eval.batch_size": 12}, {"train.accumulate": 4}, {"train.accumulate": 3}]
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused(changes):
    field = next(iter(changes)).replace("accumulate", "batch_size")
    with pytest.raises(UserError, match=f"config.{field}=.* must be a multiple of accumulate × mesh data × fsdp"):
        experiment(arg="text", **{**tiny.CUBE, "mesh.data": 4, "mesh.tensor": 1, **changes})


def test_rows_reach_the_devices_that_ask_for_them():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    where = sharding.batch_sharding(mesh)
    assert sharding.local_rows(8, where).tolist() == list(range(8))
    x = np.arange(24.0).reshape(8, 3)
    batch = sharding.to_global({"x": x, "n": np.int32(7)}, np.arange(8), 8, where)
    np.testing.assert_array_equal(batch["x"], x)
    assert tuple(batch["x"].sharding.spec) == (("data", "fsdp"),) and batch["n"].sharding.is_fully_replicated
    assert batch["n"] == 7
    for shard in batch["x"].addressable_shards:
        assert shard.data.shape == (2, 3)
    # Rows in any order: what a process holds is named by `rows`.
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_array_equal(sharding.to_global(x[order], order, 8, where), x)


def test_local_rows_are_those_of_this_process():
    class Other:
        """The view that one process of two has of a batch sharding."""

        def __init__(self, where, devices):
            self.where, self.devices = where, devices

        def addressable_devices_indices_map(self, shape):
            return {d: i for d, i in self.where.devices_indices_map(shape).items() if d in self.devices}

    devices = jax.devices()
    for sizes, rows in (
        ({"data": 8}, [0, 1, 2, 3]),
        ({"data": 2, "tensor": 4}, [0, 1, 2, 3]),
        ({"tensor": 8}, list(range(8))),
    ):
        where = sharding.batch_sharding(sharding.make_mesh(sizes))
        first = sharding.local_rows(8, Other(where, devices[:4])).tolist()
        second = sharding.local_rows(8, Other(where, devices[4:])).tolist()
        assert first == rows
        assert sorted({*first, *second}) == list(range(8))


# ------------------------------------------------------------------------------------------- constraints


def count_constraints(jaxpr) -> int:
    return sum(
        (eqn.primitive.name == "sharding_constraint")
        + sum(count_constraints(sub) for sub in jax.extend.core.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def test_constrain_constrains_inside_a_mesh_only():
    model, batch = cube().model, {"tokens": jnp.zeros((8, 16), jnp.int32)}
    params = cube().abstract_state.params
    apply = lambda params: model.apply({"params": params}, **batch, input_mask=jnp.ones((8, 16), bool), train=False)[0]
    assert count_constraints(jax.make_jaxpr(apply)(params).jaxpr) == 0
    with cube().use_mesh():
        assert count_constraints(jax.make_jaxpr(apply)(params).jaxpr) >= 7  # the sequence, and 6 in a block
    x = jnp.zeros((8, 4, 16))
    assert sharding.constrain(x, "batch", "length", "mlp") is x

    with cube().use_mesh():
        found = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "mlp"))(x)
        assert found.sharding.is_equivalent_to(
            NamedSharding(cube().mesh, PartitionSpec(("data", "fsdp"), None, "tensor")), 3
        )
        with pytest.raises(ValueError):
            jax.jit(lambda x: sharding.constrain(x, "batch", "length"))(x)  # names of another rank
    assert sharding.constrain(x, "batch", "length", "mlp") is x  # the mesh is gone again


# ------------------------------------------------------------------------------ parameters on the devices


def test_golden_dump(tmp_path):
    found = sharding.dump(cube().abstract_state.params, cube().mesh, cube().rules)
    expected = GOLDEN.read_text() if GOLDEN.exists() else ""
    new = tmp_path / GOLDEN.name
    new.write_text(found)
    changes = "\n".join(
        difflib.unified_diff(expected.splitlines(), found.splitlines(), "golden", "found", n=0, lineterm="")
    )
    assert found == expected, f"the sharding of parameters changed; if that is meant: cp {new} {GOLDEN}\n{changes}"
    roots = {line.split("/")[0].split("_")[0] for line in expected.splitlines()}
    assert {"encoders", "input", "backbone", "output", "decoders"} <= roots  # all five blocks


def bytes_per_device(tree_of_arrays) -> float:
    """Bytes on the fullest device, over the bytes of the whole tree."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree_of_arrays):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values()) / tree.nbytes(tree_of_arrays)


def test_initialisation_on_a_mesh_is_that_on_one_device():
    one, eight = initial(experiment(devices=1, arg="text")), initial(experiment(arg="text", **tiny.CUBE))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(eight)} == {8}
    assert bytes_per_device(eight.params) < 0.5
    assert tree.digest(one.params) == tree.digest(eight.params)
    assert jax.random.key_data(one.rng).tolist() == jax.random.key_data(eight.rng).tolist()


# Of the parameters on a mesh of 8, what cannot be divided stays whole: scales, biases, positions, and a dimension or
# two.
MOST = {"data": 1.0, "fsdp": 0.25, "tensor": 0.5, "cube": 0.45}


# ------------------------------------------------------------------------------------------- loss curves


@functools.cache
def initial(e):
    return e.init_state()


@functools.cache
def trained(devices=8, arg="", steps=tiny.STEPS, **changes):
    """(metrics of every step, final state), from the same parameters on any mesh."""
    e = experiment(devices, arg, **changes)
    # Copied, since the step donates it.
    state = jax.tree.map(jnp.copy, jax.device_put(initial(experiment(1, arg)), e.shardings))
    found = []
    with contextlib.closing(e.train_batches(0)) as batches:
        for batch in itertools.islice(batches, steps):
            state, measured = e.train_step(state, batch)
            found.append(metrics.finalize(measured))
    return found, state


def difference(a, b):
    assert len(a) == len(b) and all(x.keys() == y.keys() for x, y in zip(a, b))
    worst = {name: max(abs(x[name] - y[name]) for x, y in zip(a, b)) for name in a[0] if name != "grad_norm"}
    print({name: f"{value:.1e}" for name, value in worst.items()})
    return max(worst.values())


MESHES = {"data": {"mesh.data": 8}, "fsdp": {"mesh.fsdp": 8}, "tensor": {"mesh.tensor": 8}, "cube": tiny.CUBE}


# The cube has all three kinds of shards; each alone is a slow test.
@pytest.mark.parametrize(
    "name", [name if name == "cube" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_loss_curve_is_that_of_one_device(name):
    one, _ = trained(devices=1)
    found, state = trained(**MESHES[name])
    assert difference(one, found) < 1e-4
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]  # it learns: curves at rest would agree as well

    for part in (state.params, state.ema, state.opt_state):
        held = bytes_per_device(part)
        assert held == 1 if name == "data" else held < MOST[name], held
    assert tree.digest(state.params) != tree.digest(state.ema)
    if name == "cube":
        shapes = {path: leaf.addressable_shards[0].data.shape for path, leaf in tree.flatten(state).items()}
        moments = [path for path in shapes if path.endswith("mu/backbone/transformer/layers/mlp/up/kernel")]
        assert shapes["params/backbone/transformer/layers/attention/query/kernel"] == (2, 8, 4, 2)  # of (2, 16, 8, 2)
        assert shapes["ema/backbone/transformer/layers/mlp/up/kernel"] == (2, 8, 16)  # of (2, 16, 32)
        assert [shapes[path] for path in moments] == [(2, 8, 16)]


def test_loss_curve_with_accumulation_is_that_of_the_whole_batch():
    one, _ = trained(devices=1)
    found, _ = trained(**tiny.CUBE, **{"train.accumulate": 2})
    assert difference(one, found) < 1e-4


@pytest.mark.parametrize("policy", [pytest.param("full", marks=pytest.mark.slow), "dots_no_batch"])
def test_rematerialisation_on_a_mesh_changes_nothing(policy):
    one, _ = trained(1, "text", 4)
    found, _ = trained(8, "text", 4, **tiny.CUBE, **{"model.backbone.remat": policy})
    assert difference(one, found) < 1e-4


def test_bfloat16_compute_on_a_mesh():
    one, _ = trained(1, "text", 4)
    changes = {"model.dtype": "bfloat16", "model.backbone.remat": "dots"}
    found, state = trained(8, "text", 4, **tiny.CUBE, **changes)
    assert 1e-5 < difference(one, found) < 0.02  # other numbers, but not far
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
