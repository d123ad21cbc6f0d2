"""Tokenizers: text, or images, to ids and back."""

import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vfm.errors import UserError
from vfm.tokenizers import codes, formats, palette
from vfm.tokenizers.added import AddedToken
from vfm.tokenizers.byte import ByteTokenizer
from vfm.tokenizers.codes import Codes
from vfm.tokenizers.decoders import Stream
from vfm.tokenizers.formats import byte_level_tokenizer, save_tiktoken
from vfm.tokenizers.palette import ImageTokenizer, Palette, train_palette
from vfm.tokenizers.split import Splitter
from vfm.tokenizers.symbols import SymbolTokenizer
from vfm.tokenizers.tokenizer import Tokenizer
from vfm.tokenizers.training import train

__all__ = [
    "TOKENIZERS", "AddedToken", "ByteTokenizer", "Codes", "ImageTokenizer", "Palette", "Stream", "SymbolTokenizer",
    "Tokenizer", "build", "load", "reads", "save", "save_tiktoken", "train_bpe", "train_config", "train_palette",
    "untrained",
]  # fmt: skip

log = logging.getLogger(__name__)
SPECIAL = ("<pad>", "<bos>", "<eos>")


def trained_bpe(
    path: str = "",
    vocab_size: int = 0,
    pattern: str = "gpt2",
    special: tuple[str, ...] = SPECIAL,
    min_frequency: int = 0,
) -> Tokenizer:
    """A BPE tokenizer that was trained before: that of a file or folder (see `load`).

    The other fields are those of `train_bpe`. Special tokens that the tokenizer has not get the next ids; a vocab_size
    other than 0 must be the one found.
    """
    if not path:
        raise UserError(
            "tokenizer 'bpe' has no `path`: train one with `python -m experiments.tokenizer`, or give vocab_size in a "
            "config that trains its own. Without training: tokenizer 'byte'"
        )
    return of_file(path, vocab_size, pattern, special)


def trained_palette(path: str = "", vocab_size: int = 0, special: tuple[str, ...] = palette.SPECIAL) -> Palette:
    """A palette that was trained before: that of a run's folder `tokenizer`. Other fields: see `train_palette`."""
    if not path:
        raise UserError(
            "tokenizer 'palette' has neither `path`, the folder of one that was trained, nor vocab_size, to train one"
        )
    found = palette.load_palette(path)
    if vocab_size not in (0, found.vocab_size) or tuple(special) != found.special:
        raise UserError(
            f"the palette in {path!r} has {found.vocab_size} ids with {found.special}, not vocab_size={vocab_size} "
            f"with {tuple(special)}"
        )
    return found


def trained_codes(path: str = "", run: str = "", vocab_size: int = 0, modality: str = "image", special=()) -> Codes:
    """The codes of an autoencoder, as a run of ours kept them in its folder `tokenizer`: path.

    A config that has no path takes them from the folder `run` of the autoencoder, and needs vocab_size: the special
    tokens and the codes. modality, special: see `codes.codes_of_run`.
    """
    if not path:
        raise UserError("tokenizer 'codes' needs `run`, the folder of an autoencoder that was trained, and vocab_size")
    found = codes.load_codes(path)
    if vocab_size not in (0, found.vocab_size):
        raise UserError(f"the codes in {path!r} are {found.vocab_size} ids, not vocab_size={vocab_size}")
    return found


def load(
    path: str | pathlib.Path, *, pattern: str = "", special: Sequence[str] | Mapping[str, int] = ()
) -> Tokenizer | ImageTokenizer:
    """The tokenizer of a file or folder, of text (see `formats.load`) or of images."""
    folder = pathlib.Path(path).expanduser()
    for kind, read in ((palette.FILE, palette.load_palette), (codes.FILE, codes.load_codes)):
        if (folder / kind).is_file():
            return read(folder)
    return formats.load(path, pattern=pattern, special=special)


def save(path: str | pathlib.Path, tokenizer) -> None:
    """Writes a tokenizer into a folder, where `load` finds it."""
    if isinstance(tokenizer, ImageTokenizer):
        tokenizer.save(path)
    else:
        formats.save(path, tokenizer)


def of_file(
    path: str, vocab_size: int = 0, pattern: str = "", special: Sequence[str] | Mapping[str, int] = ()
) -> Tokenizer | ImageTokenizer:
    """`load`; a vocab_size other than 0 must be the one found."""
    found = load(path, pattern=pattern, special=special)
    if vocab_size not in (0, found.vocab_size):
        raise UserError(f"tokenizer {path!r} has {found.vocab_size} ids, not vocab_size={vocab_size}")
    return found


TOKENIZERS = {
    "bpe": trained_bpe,
    "byte": ByteTokenizer,
    "codes": trained_codes,
    "file": of_file,
    "palette": trained_palette,
    "symbols": SymbolTokenizer,
}
# Those that a run trains on its training split, and the field of the records that they read.
READS = {"bpe": "text", "codes": "image", "palette": "image"}


def build(cfg: Mapping) -> ByteTokenizer | Tokenizer | ImageTokenizer:
    """The tokenizer that `cfg.name` names, with the rest of `cfg` as its fields."""
    from vfm.data.construct import construct  # only here: worker processes need not import all of vfm.data

    return construct("tokenizer", TOKENIZERS, cfg)


def untrained(cfg: Mapping) -> bool:
    """Whether a config asks for a tokenizer that is to be trained first: one of READS with a vocab_size and no path."""
    return cfg.get("name") in READS and not cfg.get("path") and bool(cfg.get("vocab_size"))


def reads(cfg: Mapping) -> str:
    """The field of a source's records from which an `untrained` config's tokenizer is trained: "text" or "image"."""
    return READS[cfg["name"]]


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    pattern: str = "gpt2",
    special: Sequence[str] = SPECIAL,
    min_frequency: int = 0,
    workers: int = 0,
    report: Callable[[str], None] = log.info,
) -> Tokenizer:
    """Trains byte-level BPE; the merges are those of Hugging Face `tokenizers` for the same texts.

    texts: read once, one by one; words do not go from one text to the next. vocab_size: special tokens, 256 bytes, and
    the merges; it is smaller where the texts do not have so many pairs. pattern: how a text is split into words, a name
    of `split.PATTERNS` or an expression. special: ids 0, 1, … in this order. min_frequency: of pairs that are merged.
    workers: processes that count words; the result is the same for any number. report: is told the progress.
    Raises UserError for a vocab_size that is too small and for empty texts.
    See `train_config` for a run that trains its tokenizer first.
    """
    special = tuple(special)
    model = train(
        texts,
        vocab_size=vocab_size,
        splitter=Splitter(pattern),
        special=special,
        min_frequency=min_frequency,
        workers=workers,
        report=report,
    )
    return byte_level_tokenizer(model, pattern, special)


def train_config(cfg: Mapping, examples: Iterable[Any], **options) -> Tokenizer | ImageTokenizer:
    """Trains the tokenizer that an `untrained` config asks for on texts or images, as `reads` says. options: workers
    and report of `train_bpe`.

    A run that trains its tokenizer as its first step, and finds it again when it resumes:
    `if untrained(cfg): save(folder, train_config(cfg, examples))`, then `build(dict(cfg) | {"path": folder})`.
    """
    fields = {name: value for name, value in dict(cfg).items() if name not in ("name", "path")}
    if cfg["name"] == "codes":
        size = fields.pop("vocab_size")
        found = codes.codes_of_run(**fields)
        if found.vocab_size != size:
            raise UserError(f"tokenizer 'codes': {fields['run']!r} gives {found.vocab_size} ids, not vocab_size={size}")
        return found
    if cfg["name"] == "palette":
        return train_palette(examples, **fields)
    return train_bpe(examples, **fields, **options)
