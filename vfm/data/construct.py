"""Builds an object from a table of classes and a config section."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vfm.errors import UserError, unknown


def plain(cfg: Any) -> Any:
    """Nested plain dicts and tuples out of a (locked) ConfigDict or any mapping."""
    if isinstance(cfg, Mapping) or hasattr(cfg, "to_dict"):
        return {key: plain(value) for key, value in cfg.items()}
    return tuple(map(plain, cfg)) if isinstance(cfg, list | tuple) else cfg


def lookup(kind: str, table: Mapping[str, Callable], name: Any, where: str = "") -> Callable:
    """table[name], or for a dotted name, such as "my_module.MyEncoder", what the user's own module has of that name.

    kind: what the table holds, where: the place of the name, for messages. Raises `UserError` for a name that is
    neither, and for a module that cannot be imported; it is looked for in the folder where Python starts and on its
    path.
    """
    if name in table:
        return table[name]
    if not isinstance(name, str) or "." not in name:
        raise unknown(kind, name, table, where)
    place, (module, _, attribute) = where or kind, name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"{place}: {name!r} is no {kind} of the library ({', '.join(sorted(table))}), and there is no module "
                f"{error.name!r} in the folder where you start or in PYTHONPATH"
            ) from error
        raise UserError(f"{place}: {name!r}: importing {module!r} failed: {error}") from error
    except Exception as error:
        raise UserError(f"{place}: {name!r}: importing {module!r} failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(found, attribute, None)):
        own = [key for key, value in vars(found).items() if isinstance(value, type) and value.__module__ == module]
        raise unknown("class", attribute, own, f"{place}, module {module!r}")
    return getattr(found, attribute)


def construct(kind: str, table: Mapping[str, type], cfg: Mapping, **given: Any) -> Any:
    """`table[cfg.name](**rest of cfg, **given)`; an unknown name or field raises UserError.

    The name may be a dotted one, see `lookup`. kind: what the table holds ("source", "dataset", …), for messages.
    given: arguments that no config sets.
    """
    fields = plain(cfg)
    name = fields.pop("name", None)
    if name is None:
        raise UserError(f"{kind} has no `name`. Known: {', '.join(sorted(table))}")
    target = lookup(kind, table, name)
    signature = inspect.signature(target)
    known = [field for field in signature.parameters if field not in given]
    for field in fields:
        if field not in known:
            raise unknown("field", field, known, where=f"{kind} {name!r}")
    for field in given:
        if name not in table and field not in signature.parameters:
            raise UserError(f"{kind} {name!r} must take the argument {field!r}")
    for field in known:
        if field not in fields and signature.parameters[field].default is inspect.Parameter.empty:
            raise UserError(f"{kind} {name!r} needs the field {field!r}")
    return target(**fields, **given)
