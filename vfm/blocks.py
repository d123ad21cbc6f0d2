"""The tables of the five kinds of blocks and of discriminators, and a block out of its fields in a config."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict

from vfm.backbones import BACKBONES
from vfm.data.construct import lookup, plain
from vfm.decoders import DECODERS
from vfm.discriminators import DISCRIMINATORS
from vfm.encoders import ENCODERS
from vfm.errors import UserError, unknown
from vfm.input_projectors import INPUT_PROJECTORS
from vfm.output_projectors import OUTPUT_PROJECTORS

TABLES = {
    "encoders": ENCODERS,
    "input_projectors": INPUT_PROJECTORS,
    "backbone": BACKBONES,
    "output_projectors": OUTPUT_PROJECTORS,
    "decoders": DECODERS,
    "discriminators": DISCRIMINATORS,
}
# What a block of each kind must declare; the docstring of its package says what it means.
DTYPES = ("float32", "bfloat16", "float16")
DECLARED = {
    "encoders": ("item_shape", "num_tokens", "width"),
    "input_projectors": ("width", "in_width", "num_tokens"),
    "backbone": ("width", "kind"),
    "output_projectors": ("width", "in_width", "num_tokens"),
    "decoders": ("in_width", "num_tokens", "item_shape"),
    "discriminators": (),
}


def build_block(table: Mapping[str, type], cfg: Mapping[str, Any], where: str, dtype: str = "float32") -> nn.Module:
    """table[cfg.name](**rest of cfg); `UserError` names the known blocks or fields.

    The name may be that of a class in a module of the user's own, see `lookup`.
    """
    fields = {field: _frozen(plain(value)) for field, value in cfg.items()}
    name = fields.pop("name", None)
    block = lookup("block", table, name, where)
    if name not in table:
        _check_own(table, block, where)
    known = [f for f in block.__dataclass_fields__ if f not in ("parent", "name")]
    for field in fields:
        if field not in known:
            raise unknown("field", field, known, where)
    for field in known:
        declared = block.__dataclass_fields__[field]
        if field not in fields and declared.default is declared.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} needs the field {field!r}")
    fields = {**({"dtype": dtype} if "dtype" in known else {}), **fields}
    if fields.get("dtype", dtype) not in DTYPES:
        raise unknown("dtype", fields["dtype"], DTYPES, where)
    for field, value in fields.items():
        declared = block.__dataclass_fields__[field]
        kind = declared.type
        an_id = field.endswith("_id") and type(value) is int and value == 0  # ids begin at 0, sizes and counts at 1
        if value != declared.default and not an_id and not _fits(value, kind):
            what = {int: "a whole number > 0", float: "a number", str: "a string", bool: "true or false"}.get(
                kind, kind
            )
            raise UserError(f"{where}.{field}={value!r} must be {what}")
        if field == "dropout" and not 0 <= value < 1:
            raise UserError(f"{where}.dropout={value} must be a share, from 0 to less than 1")
    return block(**fields)


def _check_own(table: Mapping[str, type], block: Any, where: str) -> None:
    """Refuses what the user's own module gives for a block and is none of this kind."""
    kind, name = next(kind for kind, known in TABLES.items() if known is table), block.__name__
    if not (isinstance(block, type) and issubclass(block, nn.Module)):
        raise UserError(f"{where}: {name} must be a class of flax.linen.Module")
    missing = [f for f in DECLARED[kind] if f not in block.__dataclass_fields__ and not hasattr(block, f)]
    if missing:
        raise UserError(
            f"{where}: {name} declares no {' and no '.join(missing)}; a block of model.{kind} has "
            f"{', '.join(DECLARED[kind])}"
        )
    if "train" not in inspect.signature(block.__call__).parameters:
        raise UserError(f"{where}: {name}.__call__ must take the keyword argument train (true in training)")


def _frozen(value: Any) -> Any:
    """Nested mappings as hashable ones, since modules are static arguments of jit."""
    return FrozenDict(value) if isinstance(value, Mapping) else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of a block's field. Whole numbers are sizes and counts, hence positive."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_fits(value, choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            return False
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is Mapping:
        return isinstance(value, Mapping)
    if kind is int:
        return type(value) is int and value > 0
    if kind is float:
        return type(value) in (int, float)
    return not isinstance(kind, type) or isinstance(value, kind)
