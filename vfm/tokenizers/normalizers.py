"""Normalizers: what is done to a text before it is split, by the components of `tokenizer.json`.

Each is an `Edit`. Offsets are kept by `pieces`, which tells what became of each stretch of the text.
"""

import base64
import binascii
import functools
import re
import unicodedata
from collections.abc import Callable

from vfm.errors import UserError, unknown
from vfm.tokenizers import unicode16
from vfm.tokenizers.charsmap import ClusterCharsmap, aligned
from vfm.tokenizers.split import Splitter, partition

SPACE = "\u2581"  # the visible space of SentencePiece

# Compatibility mappings that are newer than the tables of `tokenizers`, which leaves these characters alone.
_NEWER_MAPPINGS = re.compile(
    "([\u32ff\ua7f2-\ua7f4\uab69\U00010781-\U00010785\U00010787-\U000107b0\U000107b2-\U000107ba\U00011938\U0001f16c"
    "\U0001fbf0-\U0001fbf9])"
)
# Upper-case letters of Unicode 15 to 17, which the `lower` of older Python versions does not know.
_NEWER_LOWER = {0x1C89: 0x1C8A, 0xA7CB: 0x264, 0xA7DC: 0x19B} | {c: c + 1 for c in range(0xA7CC, 0xA7DC, 2)}
_NEWER_LOWER |= {c: c + 0x20 for c in range(0x10D50, 0x10D66)} | {c: c + 0x1B for c in range(0x16EA0, 0x16EB9)}
_CHINESE = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)  # fmt: skip


class Edit:
    """A change of a text: `edit(text, first)`, where first tells whether the text begins the input.

    whole: text -> text. pieces: text -> [(characters read, text written), …]; the parts written are the result, and
    the numbers read add up to the length.
    """

    def __init__(
        self, whole: Callable[[str], str], pieces: Callable[[str], list[tuple[int, str]]], only_first: bool = False
    ):
        self.whole, self.pieces, self.only_first = whole, pieces, only_first

    def __call__(self, text: str, first: bool = True) -> str:
        return text if self.only_first and not first else self.whole(text)


class _Table(dict):
    """A table for `str.translate` that asks a function for each character once."""

    def __init__(self, function: Callable[[str], str]):
        super().__init__()
        self.function = function

    def __missing__(self, code: int) -> str:
        value = self[code] = self.function(chr(code))
        return value

    def __reduce__(self):
        return _Table, (self.function,)


def by_character(function: Callable[[str], str]) -> Edit:
    """The edit that writes function(character) for each character."""
    table = _Table(function)
    return Edit(functools.partial(_translate, table), functools.partial(_translate_pieces, table))


def _translate(table: _Table, text: str) -> str:
    return text.translate(table)


def _translate_pieces(table: _Table, text: str) -> list[tuple[int, str]]:
    return [(1, table[ord(char)]) for char in text]


def prepend(prefix: str, unless: str = "", only_first: bool = False) -> Edit:
    """Puts a prefix in front of a text that is not empty and does not begin with `unless`."""
    return Edit(
        functools.partial(_prepend, prefix, unless), functools.partial(_prepend_pieces, prefix, unless), only_first
    )


def _prepend(prefix: str, unless: str, text: str) -> str:
    return prefix + text if text and not (unless and text.startswith(unless)) else text


def _prepend_pieces(prefix: str, unless: str, text: str) -> list[tuple[int, str]]:
    rest = [(1, char) for char in text]
    return [(0, prefix), *rest] if _prepend(prefix, unless, text) is not text else rest


def lower(char: str) -> str:
    """Lower case of one character in Unicode 17, without the rule for a final sigma."""
    return chr(_NEWER_LOWER[ord(char)]) if ord(char) in _NEWER_LOWER else char.lower()


def _strip_mark(char: str) -> str:
    kept = unicode16.category(char)[0] != "M" or char in unicode16.newer_marks()
    return char if kept and char not in "\u1cf2\u1cf3" else ""


def _is_bert_mark(char: str) -> bool:
    # Two characters have been in another category since.
    return char in "\u1734\U0001171e" or (unicode16.category(char) == "Mn" and char not in unicode16.newer())


def _bert(clean: bool, chinese: bool, strip: bool, lowercase: bool, char: str) -> str:
    if clean:
        if char in "\t\n\r" or char in unicode16.WHITE_SPACE and unicode16.category(char) != "Cc":
            return " "
        if char in "\0\ufffd" or unicode16.category(char) in ("Cc", "Cf", "Co") and char not in unicode16.newer():
            return ""
    text = char
    if strip:
        text = "".join(c for c in _normal_form("NFD", char) if not _is_bert_mark(c))
    if lowercase:
        text = "".join(map(lower, text))
    return f" {text} " if chinese and any(low <= ord(char) <= high for low, high in _CHINESE) else text


def _normal_form(form: str, text: str) -> str:
    parts = _NEWER_MAPPINGS.split(text)
    return "".join(part if i % 2 else unicodedata.normalize(form, part) for i, part in enumerate(parts))


def _normal_form_pieces(form: str, text: str) -> list[tuple[int, str]]:
    segments: list[str] = []
    for char in text:
        joins = unicodedata.combining(char) or unicode16.category(char)[0] == "M"
        # Hangul vowels and final consonants, halfwidth sound marks.
        if segments and (joins or "\u1160" <= char <= "\u11ff" or char in "\uff9e\uff9f"):
            segments[-1] += char
        else:
            segments.append(char)
    found = []
    for segment in segments:
        out, single = _normal_form(form, segment), [(1, _normal_form(form, char)) for char in segment]
        found += single if "".join(part for _, part in single) == out else aligned(len(segment), out)
    whole = _normal_form(form, text)
    return found if "".join(out for _, out in found) == whole else [(len(text), whole)]


def _replace_pieces(spans, content: str, text: str) -> list[tuple[int, str]]:
    found = []
    for start, end, match in partition(spans, text):
        found += [(end - start - 1, ""), (1, content)] if match else [(1, char) for char in text[start:end]]
    return found


def _replace_all(spans, content: str, text: str) -> str:
    return "".join(out for _, out in _replace_pieces(spans, content, text))


def _find(needle: str, text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(re.escape(needle), text)]


def _replace_string(old: str, new: str, text: str) -> str:
    return text.replace(old, new)


def replace(pattern: dict, content: str, where: str) -> Edit:
    """Replaces {"String": …} or {"Regex": …} by a text."""
    if "String" in pattern:
        old = pattern["String"]
        return Edit(
            functools.partial(_replace_string, old, content),
            functools.partial(_replace_pieces, functools.partial(_find, old), content),
        )
    spans = Splitter(pattern["Regex"], where).spans
    return Edit(functools.partial(_replace_all, spans, content), functools.partial(_replace_pieces, spans, content))


def _strip(left: bool, right: bool, text: str) -> str:
    text = text.lstrip(unicode16.WHITE_SPACE) if left else text
    return text.rstrip(unicode16.WHITE_SPACE) if right else text


def _strip_pieces(left: bool, right: bool, text: str) -> list[tuple[int, str]]:
    begin = len(text) - len(_strip(left, False, text))
    end = len(text) if begin == len(text) else len(_strip(False, right, text))
    return [(1, char if begin <= i < end else "") for i, char in enumerate(text)]


_NMT_GONE = frozenset(map(chr, [*range(1, 9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F]))
_NMT_SPACE = frozenset("\t\n\f\r\u1680\u2028\u2029\u2581\ufeff\ufffd") | frozenset(map(chr, range(0x200B, 0x2010)))


def _nmt(char: str) -> str:
    return "" if char in _NMT_GONE else " " if char in _NMT_SPACE else char


def _edits(spec: dict, where: str) -> list[Edit]:
    kind = spec["type"]
    if kind == "Sequence":
        return build(spec["normalizers"], where)
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return [Edit(functools.partial(_normal_form, kind), functools.partial(_normal_form_pieces, kind))]
    if kind == "Lowercase":
        return [by_character(lower)]
    if kind == "StripAccents":
        return [by_character(_strip_mark)]
    if kind == "Nmt":
        return [by_character(_nmt)]
    if kind == "Strip":
        sides = (spec.get("strip_left", True), spec.get("strip_right", True))
        return [Edit(functools.partial(_strip, *sides), functools.partial(_strip_pieces, *sides))]
    if kind == "Replace":
        return [replace(spec["pattern"], spec["content"], where)]
    if kind == "Prepend":
        return [prepend(spec["prepend"])]
    if kind == "Precompiled":
        try:
            charsmap = ClusterCharsmap(base64.b64decode(spec["precompiled_charsmap"] or ""))
        except binascii.Error as error:
            raise UserError(f"{where} 'Precompiled': its map is not base64: {error}") from error
        return [Edit(charsmap, charsmap.pieces)]
    if kind == "BertNormalizer":
        lowercase = spec.get("lowercase", True)
        strip = spec.get("strip_accents")
        flags = (
            spec.get("clean_text", True),
            spec.get("handle_chinese_chars", True),
            lowercase if strip is None else strip,
            lowercase,
        )
        return [by_character(functools.partial(_bert, *flags))]
    raise unknown(
        "component", kind, ("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Strip",
                            "Replace", "Prepend", "Precompiled", "BertNormalizer"), where
    )  # fmt: skip


def build(specs: list[dict], where: str = "normalizer") -> list[Edit]:
    """The edits of normalizer components, in order; one that is not supported raises UserError."""
    return [edit for spec in specs for edit in _edits(spec, where)]
