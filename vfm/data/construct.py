"""Builds an object from a table of classes and a config section."""

import inspect
from collections.abc import Mapping
from typing import Any

from vfm.errors import UserError, unknown


def plain(cfg: Any) -> Any:
    """Nested plain dicts and tuples out of a (locked) ConfigDict or any mapping."""
    if isinstance(cfg, Mapping) or hasattr(cfg, "to_dict"):
        return {key: plain(value) for key, value in cfg.items()}
    return tuple(map(plain, cfg)) if isinstance(cfg, list | tuple) else cfg


def construct(kind: str, table: Mapping[str, type], cfg: Mapping, **given: Any) -> Any:
    """`table[cfg.name](**rest of cfg, **given)`; an unknown name or field raises UserError.

    kind: what the table holds ("source", "dataset", …), for messages. given: arguments that no config sets.
    """
    fields = plain(cfg)
    name = fields.pop("name", None)
    if name is None:
        raise UserError(f"{kind} has no `name`. Known: {', '.join(sorted(table))}")
    if name not in table:
        raise unknown(kind, name, table)
    signature = inspect.signature(table[name])
    known = [field for field in signature.parameters if field not in given]
    for field in fields:
        if field not in known:
            raise unknown("field", field, known, where=f"{kind} {name!r}")
    for field in known:
        if field not in fields and signature.parameters[field].default is inspect.Parameter.empty:
            raise UserError(f"{kind} {name!r} needs the field {field!r}")
    return table[name](**fields, **given)
