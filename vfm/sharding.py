"""One strict table shards every parameter; names of activation dimensions shard the rest.

`PARAMETER_AXES` maps parameter paths to names of dimensions; `RULES` maps names to mesh axes. A parameter that no row
matches, a row whose rank is not the parameter's, and a name with no rule are errors: nothing is replicated by accident.
A dimension that its mesh axes do not divide is replicated, and that is logged.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vfm import tree
from vfm.errors import UserError, unknown

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")

# Path regex (fullmatch) -> names of the trailing dimensions. A stack under `layers/` has one leading dimension more.
PARAMETER_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r".*/(query|key|value|relative)/kernel", ("embed", "heads", "head_dim")),
    (r".*/(query|key|value)/bias", ("heads", "head_dim")),
    (r".*attention/out/kernel", ("heads", "head_dim", "embed")),
    (r".*/(content|position|type)_bias", ("heads", "head_dim")),
    (r".*/type_embedding", ("tokens", "heads", "head_dim")),
    (r".*/(query_start|joint_gate)", ("norm",)),
    (r".*/experts_(up|gate)", ("expert", "embed", "mlp")),
    (r".*/experts_down", ("expert", "mlp", "embed")),
    (r".*/(router|classes|unpatch)/kernel", ("embed", "channels")),
    (r".*/(classes|unpatch)/bias", ("channels",)),
    (r".*/relative_bias/embedding", ("tokens", "heads")),
    (r".*/edge_bias", ("heads",)),
    (r".*/epsilon", ()),
    (r".*/(up|gate)/kernel", ("embed", "mlp")),
    (r".*/(up|gate)/bias", ("mlp",)),
    (r".*/down/kernel", ("mlp", "embed")),
    (r".*/mixer/kernel", ("space", "mlp")),
    (r".*/(down|out)/bias", ("norm",)),
    (r".*norm[^/]*/(scale|bias)", ("norm",)),
    (r".*/embedding/embedding", ("vocab", "embed")),
    (r".*/codebooks?[^/]*/embedding", ("vocab", "embed")),
    (r".*/head/kernel", ("embed", "vocab")),
    (r".*(/head/|decoders_text/)bias", ("vocab",)),
    (r".*/(control_)?patch/kernel", ("space", "space", "channels", "embed")),
    (r".*/(frames|samples)[^/]*/kernel", ("space", "channels", "embed")),
    (r".*/conv[^/]*/kernel", ("space", "space", "channels", "embed")),
    (r".*/((control_)?projection|modulation|condition|hidden[^/]*)/kernel", ("channels", "embed")),
    (r".*/((control_)?(patch|projection)|modulation|condition|(frames|samples|hidden|conv)[^/]*)/bias", ("norm",)),
    (r".*/(positions|block_positions|token_types|degree_in|degree_out)/embedding", ("tokens", "embed")),
    (
        r"(.*/)?(positions|levels|tag|queries|registers|signals_[^/]*|(class|distillation|graph)_token|null_condition|channel_table)",
        ("tokens", "norm"),
    ),
    (r"logit_(scale|bias)|.*/log_scale", ()),
)

# Name -> mesh axes (None: replicated). The first group is parameters, the second activations.
RULES: Mapping[str, Any] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "layers": None,
    "head_dim": None,
    "norm": None,
    "space": None,
    "channels": None,
    "tokens": None,
    "batch": ("data", "fsdp"),
    "length": "context",
    "width": None,
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with the axes of `MESH_AXES`; at most one size may be -1 (what is left).

    Raises `UserError` for an unknown axis or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    for axis in sizes:
        if axis not in MESH_AXES:
            raise unknown("mesh axis", axis, MESH_AXES, "config.mesh")
    shape = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"config.mesh: sizes must be positive, at most one may be -1: {dict(sizes)}")
    if free and fixed and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    if int(np.prod(list(shape.values()))) != len(devices):
        raise UserError(
            f"config.mesh: {dict(sizes)} does not fit {len(devices)} devices; the product of the sizes must "
            f"be {len(devices)} (one size may be -1)"
        )
    # Stock Linen layers fail on the default, Explicit axes.
    return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=devices, axis_types=(AxisType.Auto,) * len(shape))


def make_rules(changes: Mapping[str, Any]) -> dict[str, Any]:
    """RULES with the changes of `config.sharding_rules`; `UserError` for names and mesh axes that are not known."""
    rules = dict(RULES)
    for name, axes in changes.items():
        if name not in RULES:
            raise unknown("dimension name", name, RULES, "config.sharding_rules")
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis not in MESH_AXES:
                raise unknown("mesh axis", axis, MESH_AXES, f"config.sharding_rules.{name}")
        # The batch is always a tuple of axes, possibly none.
        rules[name] = ((axes,) if isinstance(axes, str) else tuple(axes or ())) if name == "batch" else axes
    return rules


_RULES: list[Mapping[str, Any]] = []


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Mapping[str, Any] = RULES) -> Iterator[Mesh]:
    """Sets the mesh and the rules under which `constrain` works while a function is traced."""
    _RULES.append(rules)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _RULES.pop()


@functools.cache
def _warn_once(message: str) -> None:
    # A model is traced many times.
    logging.warning("%s", message)


def spec(
    names: Sequence[str | None], rules: Mapping[str, Any], shape: Sequence[int], mesh, where: str
) -> PartitionSpec:
    """Names of dimensions -> PartitionSpec; a dimension that its axes do not divide is replicated and logged."""
    axes = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise unknown("dimension name", name, rules, f"the sharding of {where}")
        axis = rules[name] if name is not None else None
        parts = int(np.prod([mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())]))
        if parts > 1 and size % parts:
            _warn_once(
                f"sharding: {where}: dimension {name!r} of size {size} is replicated: mesh axes {axis} ({parts}) "
                "do not divide it"
            )
            axis = None
        axes.append(axis if parts > 1 else None)
    used = [a for axis in axes for a in ((axis,) if isinstance(axis, str) else axis or ())]
    if twice := next((a for a in used if used.count(a) > 1), None):
        raise UserError(
            f"the sharding of {where}: the mesh axis {twice!r} divides two of its dimensions {tuple(names)}; see "
            "config.sharding_rules"
        )
    return PartitionSpec(*axes)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's sharding by the names of its dimensions; outside `use_mesh` `x` stays as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _RULES or mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, _RULES[-1], x.shape, mesh, f"activation {names}"))


def parameter_names(path: str, shape: Sequence[int], table=PARAMETER_AXES) -> tuple[str | None, ...]:
    """Names of a parameter's dimensions by the first row that matches its path; `UserError` if there is none."""
    for regex, names in table:
        if re.fullmatch(regex, path):
            lead = ("layers",) if re.search(r"(^|/)layers/", path) else ()
            if len(lead) + len(names) != len(shape):
                raise UserError(
                    f"sharding: parameter {path} has shape {tuple(shape)}, but row {regex!r} names "
                    f"{len(lead) + len(names)} dimensions: {lead + tuple(names)}"
                )
            return lead + tuple(names)
    raise UserError(
        f"sharding: no row matches parameter {path} of shape {tuple(shape)}; add one to "
        "vfm.sharding.PARAMETER_AXES, or name the layer so that one does"
    )


def parameter_shardings(params, mesh: Mesh, rules: Mapping[str, Any] = RULES):
    """NamedShardings for a tree of arrays or ShapeDtypeStructs."""

    def one(path, leaf):
        return NamedSharding(mesh, spec(parameter_names(path, leaf.shape), rules, leaf.shape, mesh, path))

    return jax.tree.map(one, tree.paths(params), params)


def batch_sharding(mesh: Mesh, rules: Mapping[str, Any] = RULES) -> NamedSharding:
    """Sharding of the leading, batch dimension."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))


def check_batch(field: str, batch_size: int, accumulate: int, mesh: Mesh, rules: Mapping[str, Any] = RULES) -> None:
    """Refuses a batch that the mesh or the accumulation does not divide."""
    parts = int(np.prod([mesh.shape[a] for a in rules["batch"]]))
    if accumulate < 1 or batch_size % (accumulate * parts):
        raise UserError(
            f"config.{field}={batch_size} must be a multiple of accumulate × mesh "
            f"{' × '.join(rules['batch'])} = {accumulate} × {parts}"
        )


def local_rows(batch_size: int, sharding: NamedSharding) -> np.ndarray:
    """Which rows of the global batch this process must load: those that its devices hold, sorted."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in slices]))


def to_global(batch, rows: np.ndarray, batch_size: int, sharding: NamedSharding):
    """Arrays of this process's rows -> global arrays of `batch_size` rows; scalars are replicated."""
    place = {int(row): i for i, row in enumerate(rows)}
    replicated = NamedSharding(sharding.mesh, PartitionSpec())

    def one(x):
        x = np.asarray(x)
        if x.ndim == 0:
            return jax.make_array_from_callback((), replicated, lambda _: x)
        take = lambda index: x[[place[r] for r in range(*index[0].indices(batch_size))]][(slice(None), *index[1:])]
        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, take)

    return jax.tree.map(one, batch)


def dump(params, mesh: Mesh, rules: Mapping[str, Any] = RULES) -> str:
    """One line per parameter: path, shape, PartitionSpec. A golden test keeps it: a change is seen in review."""
    shardings = tree.flatten(parameter_shardings(params, mesh, rules))
    return "".join(
        f"{path} {tuple(leaf.shape)} {tuple(shardings[path].spec)}\n"
        for path, leaf in sorted(tree.flatten(params).items())
    )
