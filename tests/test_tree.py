import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import tree
from vfm.errors import UserError


@pytest.fixture
def params():
    return {
        "backbone": {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}},
        "head": {"kernel": jnp.arange(6.0).reshape(3, 2)},
    }


PATHS = ["backbone/layer/bias", "backbone/layer/kernel", "head/kernel"]


def test_paths_and_round_trip(params):
    assert list(tree.flatten(params)) == PATHS
    assert list(tree.flatten(flax.core.freeze(params))) == PATHS
    assert tree.paths(params)["backbone"]["layer"]["kernel"] == "backbone/layer/kernel"
    shapes = jax.eval_shape(lambda: params)
    assert tree.flatten(shapes)["head/kernel"].shape == (3, 2)
    back = tree.unflatten(tree.flatten(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    with pytest.raises(UserError, match="'a' is a leaf"):
        tree.unflatten({"a/b": 1, "a": 2})


def test_sizes(params):
    assert tree.count(params) == 6 + 3 + 6
    assert tree.nbytes(params) == 6 * 4 + 3 * 2 + 6 * 4
    assert tree.count(jax.eval_shape(lambda: params)) == 15


def test_digest_sees_only_what_it_selects(params):
    changed = jax.tree.map(lambda x: x, params)
    changed["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(1e-30)
    assert tree.digest(params, "backbone/.*") == tree.digest(changed, "backbone/.*")
    assert tree.digest(params) != tree.digest(changed)
    renamed = {"backbone": params["backbone"], "tail": params["head"]}
    reshaped = {**params, "head": {"kernel": params["head"]["kernel"].reshape(2, 3)}}
    assert len({tree.digest(t) for t in (params, renamed, reshaped)}) == 3
    # The regex must match the whole path, and something.
    with pytest.raises(UserError, match="matches no parameter"):
        tree.digest(params, "backbone")


def test_digest_does_not_depend_on_sharding_or_container(params):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    plain = {"x": np.arange(8.0, dtype=np.float32).reshape(2, 4)}
    sharded = {"x": jax.device_put(plain["x"], sharding)}
    assert tree.digest(sharded) == tree.digest(plain) == tree.digest(flax.core.freeze(plain))
    assert tree.digest({"k": jax.random.key(0)}) != tree.digest({"k": jax.random.key(1)})


def test_match_first_row_wins_and_values_may_be_tuples(params):
    values = tree.match(params, [(".*/bias", ("b",)), ("backbone/.*", ("x", "y")), (".*", ())], "sharding")
    assert values["backbone"]["layer"] == {"bias": ("b",), "kernel": ("x", "y")}
    assert values["head"]["kernel"] == ()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("backbone/.*", 1)], r"decay: no row matches the parameter 'head/kernel'.*'backbone/\.\*'"),
        ([("backbone", 1), (".*", 0)], "'backbone' matches no parameter"),
        ([(".*", 1), ("haed/.*", 0)], "'haed/.*' matches no parameter"),
        ([("(", 1)], "not a regular expression"),
        ([("a", 1, 2)], "not a pair"),
    ],
)
def test_match_refuses(params, rules, message):
    with pytest.raises(UserError, match=message):
        tree.match(params, rules, "decay")


def test_match_accepts_an_idle_catch_all_and_shadowed_rows(params):
    rules = [(".*/kernel", 1), (".*/bias", 2), (".*", 3)]
    assert jax.tree.leaves(tree.match(params, rules, "x")) == [2, 1, 1]
    idle = [("conv/.*", 0), (".*", 3)]
    assert jax.tree.leaves(tree.match(params, idle, "x", allow_unused=True)) == [3, 3, 3]
