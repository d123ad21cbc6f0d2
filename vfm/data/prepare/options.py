"""The options of data preparation: one dataclass is the schema of the library and of the command line."""

import dataclasses
from typing import Any

from vfm.data.prepare import clean, normalise, segment
from vfm.errors import UserError, unknown

LABEL_NOISE = ("off", "flag", "remove")


def _option(default: Any, step: str, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"step": step, "help": help})


@dataclasses.dataclass(frozen=True)
class Options:
    """What `prepare` does, step by step; the help of each field says what it means. UserError for bad values."""

    text_field: str = _option("text", "collect", "field of a record that holds its text")
    source_field: str = _option("source", "collect", "field with the source, for the card (else: the name of the file)")
    licence_field: str = _option("licence", "collect", "field with the licence, for the card")
    skip_malformed: bool = _option(False, "collect", "leave malformed lines out and count them, instead of stopping")
    unicode: str = _option("NFC", "normalise", "Unicode form: NFC, NFKC, NFD, NFKD or none")
    whitespace: str = _option("trim", "normalise", "trim (line ends, empty lines), collapse (also runs) or keep")
    controls: bool = _option(True, "normalise", "remove control and zero-width characters, unify line breaks")
    html: bool = _option(False, "normalise", "the text is HTML: take the tags out and decode entities")
    hook: str = _option(
        "", "normalise", "MODULE:FUNCTION, called with each record; returns it, changed or not, or None"
    )
    clean: str = _option("basic", "clean", "presets (none, basic, gopher, c4) and RULE=VALUE or RULE=off, with commas")
    scripts: str = _option("", "clean", "scripts to keep, such as Latin,Han; at least half of the letters (min_script)")
    bad_words: str = _option("", "clean", "file with a word or phrase a line; documents with one of them are removed")
    chinese: str = _option("characters", "clean", "words of Chinese in the rules: characters, or jieba ([prepare])")
    perplexity_sample: str = _option("", "clean", "JSON lines of clean text, to fit a character n-gram model on")
    max_bits_per_char: float = _option(0.0, "clean", "limit of that model; 0: what 99 % of the sample stays below")
    exact_dedup: bool = _option(True, "deduplicate", "remove texts equal but for case, white space and Unicode form")
    near_dedup: float = _option(0.8, "deduplicate", "Jaccard similarity of shingles from which on to remove; 0: off")
    dedup_within: str = _option("", "deduplicate", "fields that must be equal too, such as task,label")
    shingle_words: int = _option(5, "deduplicate", "words of a shingle")
    shingle_chars: int = _option(5, "deduplicate", "characters of a shingle in Chinese, Japanese, Thai, …")
    num_perm: int = _option(128, "deduplicate", "length of a MinHash signature; the error falls with its square root")
    seed: int = _option(1, "deduplicate", "seed of the MinHash permutations")
    label_field: str = _option("", "labels", "field with the class of a record")
    label_noise: str = _option("off", "labels", "doubtful labels: off, flag (field label_suspect) or remove")
    split: str = _option("train=0.9,validation=0.05,test=0.05", "split", "shares of the splits; none: one file `data`")
    group_field: str = _option("", "split", "field with the patient, device, court case, …: none on two sides")
    leak_check: bool = _option(True, "check", "look for duplicates and groups on two sides of the split")
    leak_threshold: float = _option(0.0, "check", "similarity that counts as a leak; 0: that of near_dedup, else 0.8")
    allow_leaks: bool = _option(False, "check", "write the output although leaks were found")
    compress: bool = _option(False, "output", "write .jsonl.gz")
    examples: int = _option(3, "output", "examples of what each rule removed, in the card; 0 for private data")
    workers: int = _option(1, "output", "processes; 0: one for each core")
    overwrite: bool = _option(False, "output", "replace an earlier output of this command")

    def __post_init__(self):
        normalise.check(self.unicode, self.whitespace)
        if self.chinese not in segment.CHINESE:
            raise unknown("segmentation of Chinese", self.chinese, segment.CHINESE, where="the option `chinese`")
        if self.label_noise not in LABEL_NOISE:
            raise unknown(
                "treatment of doubtful labels", self.label_noise, LABEL_NOISE, where="the option `label_noise`"
            )
        if self.label_noise != "off" and not self.label_field:
            raise UserError(f"label_noise={self.label_noise} needs the option `label_field`, such as label_field=label")
        for name in ("near_dedup", "leak_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"the option `{name}` is a similarity from 0 to 1, not {getattr(self, name)}")
        for name, least in {
            "shingle_words": 1,
            "shingle_chars": 1,
            "num_perm": 16,
            "examples": 0,
            "workers": 0,
        }.items():
            if getattr(self, name) < least:
                raise UserError(f"the option `{name}` must be at least {least}, not {getattr(self, name)}")
        if self.max_bits_per_char < 0 or (self.max_bits_per_char and not self.perplexity_sample):
            raise UserError("max_bits_per_char is a positive number of bits, and needs the option `perplexity_sample`")
        clean.parse(self.clean)
        for script in names(self.scripts):
            if script not in segment.known_scripts():
                raise unknown("script", script, segment.known_scripts(), where="the option `scripts`")
        self.fractions()

    def fractions(self) -> dict[str, float]:
        """{split: share} of the option `split`."""
        if self.split in ("", "none"):
            return {"data": 1.0}
        shares: dict[str, float] = {}
        for part in names(self.split):
            name, _, share = map(str.strip, part.partition("="))
            try:
                if not name or any(char in name for char in "/\\.") or not float(share) > 0:
                    raise ValueError
            except ValueError:
                raise UserError(
                    f"the option `split`: {part!r} is not NAME=SHARE, such as split=train=0.9,test=0.1"
                ) from None
            if name in shares:
                raise UserError(f"the option `split`: {name!r} is given twice")
            shares[name] = float(share)
        return shares

    def threshold(self) -> float:
        """The similarity from which on two texts count as near-duplicates in the leak check."""
        return self.leak_threshold or self.near_dedup or 0.8


def names(fields: str) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(filter(None, map(str.strip, fields.split(","))))
