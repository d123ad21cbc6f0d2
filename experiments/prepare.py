"""`python -m experiments.prepare --input=FILES --output=DIR [--option=value ...]`: data preparation."""

import dataclasses
import itertools
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import command_line
from vfm.data.prepare import Leaks, Options, check, prepare
from vfm.data.prepare.card import leak_table
from vfm.data.prepare.clean import LINE_RULES, PRESETS, RULES
from vfm.errors import UserError

USAGE = """usage: python -m experiments.prepare --input=FILES --output=DIR [--option=value ...]
       python -m experiments.prepare --check=train=FILE,test=FILE [--option=value ...]

Cleans, deduplicates and splits JSON lines (one object a line, plain or .gz) into DIR/train.jsonl, … and writes
DIR/data_card.json and DIR/DATA_CARD.md, which say what was done. DIR appears when all is done. With --check it only
looks for duplicates and groups that files have in common.

  --input=FILES         files or patterns, with commas: a.jsonl.gz,'parts/*.jsonl'
  --output=DIR          folder to write
  --check=SPLIT=FILE,…  splits to compare, training data first; a split may be given several times
  --flagfile=FILE       reads options from a file, one --option=value a line
  --help                this text; --help_rules: the cleaning rules
"""
STATUS = """
Status 0: done; 1: splits share texts or groups; 2: bad input, told in one line; 130: Ctrl-C, and nothing is written."""
_TYPES = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_boolean}


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: that of the process) and returns the exit status, as `STATUS` says."""
    progress = Progress()
    try:
        values = parse(sys.argv[1:] if argv is None else argv)
        if values.help or values.help_rules:
            print(usage() if values.help else rules())
        elif values.check:
            return _check(values, progress)
        else:
            _prepare(values, progress)
        return 0
    except Leaks as error:
        print(leak_table(error.report))
        return _leave(1, f"leaks: {error}", progress)
    except UserError as error:
        return _leave(2, f"error: {error}", progress)
    except KeyboardInterrupt:
        return _leave(130, "interrupted; nothing was written, and the same command starts again", progress)


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The flags of a command line (without the program's name): those of USAGE and the fields of `Options`."""
    values = flags.FlagValues()
    for name in ("input", "check"):
        flags.DEFINE_list(name, [], "", flag_values=values)
    flags.DEFINE_string("output", "", "", flag_values=values)
    for name in ("help", "help_rules"):
        flags.DEFINE_boolean(name, False, "", flag_values=values)
    for field in dataclasses.fields(Options):
        _TYPES[field.type](field.name, field.default, "", flag_values=values)
    if left := command_line.parse_flags(values, argv):
        raise UserError(f"the argument {left[0]!r} belongs to no flag; write --flag=value")
    return values


def options(values: flags.FlagValues) -> Options:
    """The options that flags set."""
    return Options(**{field.name: values[field.name].value for field in dataclasses.fields(Options)})


def usage() -> str:
    """The text of --help."""
    parts = [USAGE]
    for step, fields in itertools.groupby(dataclasses.fields(Options), lambda field: field.metadata["step"]):
        parts.append(f"{step}:")
        for field in fields:
            parts.append(_item(f"--{field.name}", f"{field.metadata['help']} [{_shown(field.default)}]"))
    return "\n".join([*parts, STATUS])


def rules() -> str:
    """The text of --help_rules."""
    parts = ["Cleaning rules, such as --clean=gopher,min_words=20,max_repeated_lines=off", ""]
    parts += [_item(name, meaning, 32) for name, meaning in {**LINE_RULES, **RULES}.items()]
    for preset, limits in PRESETS.items():
        parts.append(f"\n{preset}: {', '.join(f'{name}={limit:g}' for name, limit in limits.items()) or 'no rule'}")
    return "\n".join(textwrap.fill(part, 118, subsequent_indent="  ") if "=" in part else part for part in parts)


def _item(name: str, meaning: str, width: int = 24) -> str:
    return textwrap.fill(meaning, 118, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width)


def _shown(default: Any) -> str:
    return (
        str(default).lower()
        if isinstance(default, bool)
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )


def _prepare(values: flags.FlagValues, progress: "Progress") -> None:
    if not values.output:
        raise UserError("--output is missing; give the folder to write, such as --output=data/prepared")
    card = prepare(values.input, values.output, options(values), progress)
    progress.end()
    for step in card["steps"]:
        for rule, entry in step["removed"].items():
            print(f"{step['step']} ({rule}): {entry['records']:,} records")
    splits = ", ".join(f"{name} {split['records']:,}" for name, split in card["splits"].items())
    print(f"{card['total']['records']:,} of {card['records_in']:,} records in {values.output}: {splits}")
    if empty := [name for name, split in card["splits"].items() if not split["records"]]:
        print(f"warning: no record fell into {', '.join(empty)}", file=sys.stderr)


def _check(values: flags.FlagValues, progress: "Progress") -> int:
    pairs = []
    for part in values.check:
        split, equals, path = part.partition("=")
        if not (split and equals and path):
            raise UserError(f"--check: {part!r} is not SPLIT=FILE, such as --check=train=a.jsonl,test=b.jsonl")
        pairs.append((split, path))
    report = check(pairs, options(values), progress)
    progress.end()
    print(leak_table(report))
    return 1 if report["leaks"] else 0


class Progress:
    """What is going on, on stderr: one line that is written over on a terminal, else a line every ten seconds."""

    def __init__(self):
        self.terminal = sys.stderr.isatty()
        self.stage, self.width = "", 0
        self.begin = self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, new = time.monotonic(), stage != self.stage
        if new:
            self.stage, self.begin = stage, now
        if now - self.last < (0.2 if self.terminal else 10) and not (new and self.terminal):
            return
        line, seconds = stage, now - self.begin
        if total > 1:
            line += f" {done / total:.0%}"
        if total > 1 and done and seconds > 1:
            line += (
                f", {done / 1e6 / seconds:.1f} MB/s" * (stage == "read")
                + f", {seconds * (total / done - 1):.0f} s left"
            )
        print(f"\r{line:<{self.width}}" if self.terminal else line, end="\n" * (not self.terminal), file=sys.stderr)
        sys.stderr.flush()
        self.last, self.width = now, len(line)

    def end(self) -> None:
        """Leaves the line."""
        if self.terminal and self.width:
            print(file=sys.stderr)
        self.width = 0


def _leave(status: int, line: str, progress: Progress) -> int:
    progress.end()
    print(line, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(cli())
