"""`python -m experiments.tokenizer train|encode|decode …`: trains a tokenizer, and tries it out."""

import pathlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from experiments import command_line
from vfm import tokenizers
from vfm.errors import UserError, unknown
from vfm.tokenizers import corpus
from vfm.tokenizers.split import Splitter

USAGE = """usage: python -m experiments.tokenizer train --out=DIR [options] FILE ...
       python -m experiments.tokenizer train --out=DIR [options] --config=FILE[:ARG]
       python -m experiments.tokenizer encode --tokenizer=PATH [TEXT ...]
       python -m experiments.tokenizer decode --tokenizer=PATH [ID ...]

train learns byte-level BPE and writes tokenizer.json, vocab.json and merges.txt to DIR. FILE: plain text or .jsonl, or
these with .gz; it may be larger than memory. With --config the texts are those of the config's data source (split
"train"), and its tokenizer section gives the options that are not set here.

  --vocab_size=N        special tokens, 256 bytes, and merges (8192)
  --pattern=NAME        how text is split into words: gpt2, cl100k, o200k, or an expression (gpt2)
  --special=A,B         special tokens, with the ids 0, 1, ... (<pad>,<bos>,<eos>)
  --min_frequency=N     of pairs that are merged (0)
  --field=NAME          of the objects in .jsonl files (text)
  --workers=N           processes that count words (0: this one)
  --tokenizer=PATH      file or folder of any kind that can be read
  --allow_special       encode: names of special tokens in the text mean these tokens

encode and decode take their arguments, or else the lines of standard input. Bad input ends in one line and status 2."""
COMMANDS = ("train", "encode", "decode")


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: that of the process) and returns the exit status: 0, 2 bad input, 130 Ctrl-C."""
    try:
        values, arguments = _parse(sys.argv[1:] if argv is None else argv)
        if values.help or not arguments:
            print(USAGE)
            return 0 if values.help else 2
        command, *rest = arguments
        if command not in COMMANDS:
            raise unknown("command", command, COMMANDS)
        {"train": _train, "encode": _encode, "decode": _decode}[command](values, rest)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    values = flags.FlagValues()
    for name in ("out", "config", "pattern", "tokenizer"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    flags.DEFINE_string("field", "text", "", flag_values=values)
    flags.DEFINE_list("special", None, "", flag_values=values)
    flags.DEFINE_integer("vocab_size", None, "", flag_values=values)
    flags.DEFINE_integer("min_frequency", None, "", flag_values=values)
    flags.DEFINE_integer("workers", 0, "", flag_values=values)
    flags.DEFINE_boolean("allow_special", False, "", flag_values=values)
    flags.DEFINE_boolean("help", False, "", flag_values=values)
    values.set_gnu_getopt(True)  # flags may follow other arguments
    try:
        return values, values(["", *argv])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from error


def _train(values: flags.FlagValues, files: list[str]) -> None:
    if not values.out:
        raise UserError("--out is missing; give the folder to write, such as --out=runs/tokenizer")
    if bool(files) == bool(values.config):
        raise UserError("give text files, or --config=FILE[:ARG], to train on" + (", not both" if files else ""))
    options = {"vocab_size": 8192, "pattern": "gpt2", "special": tokenizers.SPECIAL, "min_frequency": 0}
    config = command_line.load(values.config) if values.config else None
    if config is not None:
        section = config.get("tokenizer", {})
        options |= {name: section[name] for name in options if section.get(name)}
    options |= {name: values[name].value for name in options if values[name].value is not None}
    options["special"] = tuple(options["special"])
    texts = _source(config) if config is not None else corpus.read(files, Splitter(options["pattern"]), values.field)
    tokenizer = tokenizers.train_bpe(texts, workers=values.workers, report=_report, **options)
    tokenizers.save(values.out, tokenizer)
    _report(f"{tokenizer.vocab_size} ids written to {pathlib.Path(values.out)}")


def _source(config) -> Iterator[str]:
    """The texts of a config's data source, split "train"."""
    from vfm.data.sources import texts  # only here: it imports what reads images and sounds as well

    if "source" not in config.get("data", {}):
        raise UserError("the config has no data.source with texts; give text files instead")
    return texts(config.data.source, "train")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _encode(values: flags.FlagValues, texts: list[str]) -> None:
    tokenizer = _load(values)
    for text in texts or map(_line, sys.stdin):
        print(*tokenizer.encode(text, allow_special=values.allow_special))


def _decode(values: flags.FlagValues, ids: list[str]) -> None:
    tokenizer = _load(values)
    for line in [" ".join(ids)] if ids else sys.stdin:
        try:
            print(tokenizer.decode(map(int, line.split())))
        except UserError:
            raise
        except ValueError:
            raise UserError(f"not a list of ids: {line.strip()[:80]!r}") from None


def _load(values: flags.FlagValues) -> tokenizers.Tokenizer:
    if not values.tokenizer:
        raise UserError("--tokenizer is missing; give the file or folder of a tokenizer")
    return tokenizers.load(values.tokenizer, pattern=values.pattern or "")


def _line(text: str) -> str:
    return text.removesuffix("\n")


if __name__ == "__main__":
    sys.exit(cli())
