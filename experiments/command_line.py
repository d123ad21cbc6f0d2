"""The command line: `--config=FILE[:ARG] --workdir=DIR [--config.a.b=value ...]` -> config and folder of the run."""

import difflib
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from vfm.errors import UserError

USAGE = """usage: python -m experiments.main --config=configs/NAME.py[:ARG] --workdir=DIR [--config.a.b=value ...]

  --config=FILE[:ARG]   config file, and the variant that its get_config takes
  --config.a.b=value    sets a field of the config; true or false for a boolean, "1,2" or "('x','y')" for a tuple
  --workdir=DIR         folder of the run; the same command again resumes
  --verbosity=N         0: also what the libraries log; 1: also debug messages, and the traceback of bad input
  --help                this text

Bad input ends in one line on stderr and status 2, Ctrl-C in status 130."""


class Options(NamedTuple):
    """What the command line says; config is None when only the usage is asked for. verbosity: as in absl."""

    config: ConfigDict | None
    workdir: str | None
    verbosity: int | None


def parse(argv: Sequence[str]) -> Options:
    """The options of a command line (without the program's name), with a locked config. Raises UserError."""
    # Own flag values instead of absl's global ones: any number of command lines can be parsed in one process.
    first, second = flags.FlagValues(), flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=first)
    flags.DEFINE_boolean("help", False, "", flag_values=first)
    flags.DEFINE_string("workdir", None, "", flag_values=second)
    flags.DEFINE_integer("verbosity", None, "", flag_values=second)
    rest = parse_flags(first, argv, known_only=True)
    if first.help:
        return Options(None, None, None)
    if not first.config:
        raise UserError("--config is missing; give a config file, such as --config=configs/digits.py")
    config = load(first.config)
    fields = _fields(config)
    for argument in rest:
        if field := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            _check_field(field[1], fields)
    config_flags.DEFINE_config_dict("config", config, flag_values=second, sys_argv=["", *rest])
    if left := parse_flags(second, rest, fields=fields):
        raise UserError(f"the argument {left[0]!r} belongs to no flag; write --flag=value")
    _check_tuples(fields, _fields(config))
    if not second.workdir:
        raise UserError("--workdir is missing; give the folder of the run, such as --workdir=runs/digits")
    return Options(config, second.workdir, second.verbosity)


def load(spec: str) -> ConfigDict:
    """The config of "FILE[:ARG]": what `get_config` of the file returns for ARG.

    Raises UserError for whatever goes wrong in the file, naming the file, the line and the cause.
    """
    name, colon, arg = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, [str(file) for file in path.parent.glob("*.py")], n=1)
        raise UserError(
            f"config file {name!r} {'is a folder' if path.is_dir() else 'does not exist'}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    module_spec = importlib.util.spec_from_file_location("vfm_config", path)
    if module_spec is None:
        raise UserError(f"config file {name!r} is not a Python file, NAME.py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["vfm_config"] = module  # dataclasses look for their module there
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"config file {name!r} has no function get_config(arg)")
        config = module.get_config(*([arg] if colon else []))
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == module_spec.origin]
        if isinstance(error, SyntaxError) and error.filename == module_spec.origin:
            lines = [error.lineno]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(
            f"config file {name!r}{where}: {type(error).__name__}: " + str(error).replace("\\n", " ")
        ) from error  # ml_collections shows its lines as a repr
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {name!r}: get_config must return a ConfigDict, not a {type(config).__name__}")
    return config


def _fields(config: Any, prefix: str = "config.") -> dict[str, Any]:
    """{"config.a": section, "config.a.b": value, …}"""
    found = {}
    for name, value in config.items():
        found[f"{prefix}{name}"] = value
        if isinstance(value, ConfigDict):
            found |= _fields(value, f"{prefix}{name}.")
    return found


def _check_field(name: str, fields: dict[str, Any]) -> None:
    """Refuses to set a field that the config does not have, naming the nearest one, and what is no single field."""
    name = f"config.{name}"
    section = name
    while "." in section and not isinstance(fields.get(section), ConfigDict):
        section = section.rpartition(".")[0]
    siblings = sorted(field for field in fields if field.rpartition(".")[0] == section)
    if name not in fields:
        ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
        leaf = lambda field: field.rpartition(".")[2]
        # Alike as a whole, or the right name in the wrong section.
        near = max(fields, key=lambda field: max(ratio(name, field), 0.95 * ratio(leaf(name), leaf(field))))
        raise UserError(
            f"unknown config field {name!r}; did you mean {near!r}? Fields of {section}: "
            f"{', '.join(map(leaf, siblings))}. A field that is not in the config yet is set in the config file"
        )
    if section == name:
        raise UserError(f"{name} is a section, not a field; set its fields, such as --{(siblings or [f'{name}.x'])[0]}")
    if not isinstance(fields[name], bool | int | float | str | tuple):
        raise UserError(
            f"{name} is {fields[name]!r} in the config file, so that a flag does not know its type; set it in the file"
        )


def _check_tuples(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A tuple that a flag has set must hold what it held before: numbers, strings or tuples."""
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, tuple) and before and value != before:
            known = set(map(type, before))
            wrong = [item for item in value if type(item) not in known | ({int} if float in known else set())]
            if wrong:
                kinds = " or ".join(sorted(kind.__name__ for kind in known))
                raise UserError(f"--{name}: {wrong[0]!r} is not {kinds}; expected a tuple such as {before!r}")


def parse_flags(
    values: flags.FlagValues, argv: Sequence[str], fields: dict[str, Any] | None = None, **options
) -> list[str]:
    """Parses flags and returns the arguments that belong to none."""
    values.set_gnu_getopt(True)  # flags may follow other arguments
    try:
        return values(["", *argv], **options)[1:]
    except flags.IllegalFlagValueError as error:
        message = str(error).removeprefix("flag ")
        known = (fields or {}).get(message.partition("=")[0].lstrip("-"))
        expected = "" if known is None else f"; expected {type(known).__name__}, such as {known!r}"
        raise UserError(message + expected) from error
    except flags.Error as error:
        raise UserError(str(error)) from error
