"""Scripts, words and sentences of text in any language, those without spaces between words too."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from vfm.errors import UserError, unknown

# Letters of scripts that put no space between words.
_HAN = (
    "\u2e80-\u2fd5\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufad9\U00020000-\U000323af"
)
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_SOUTH_EAST_ASIAN = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u1000-\u103f\u1050-\u109d\u1780-\u17d3"  # Thai to Khmer
UNSPACED = frozenset({"Han", "Hiragana", "Katakana", "Thai", "Lao", "Myanmar", "Khmer"})
CHINESE = ("characters", "jieba", "auto")

# The first words of Unicode names that say nothing about the script: "FULLWIDTH LATIN CAPITAL LETTER A".
_FORMS = {"FULLWIDTH", "HALFWIDTH", "SMALL", "SUPERSCRIPT", "SUBSCRIPT", "CIRCLED", "PARENTHESIZED"}
_NAMES = {"Cjk": "Han", "Ideographic": "Han", "Katakana-Hiragana": "Katakana", "Vertical": "Han"}
_COMMON = {"Modifier", "Mathematical", "Micro", "Feminine", "Masculine", "Double-Struck", "Script", "Black-Letter"}

_CLOSING = "\"'”’»)\\]}』」）】》"
# After Latin-like marks a sentence ends only before white space, after the others anywhere.
_SENTENCE_END = re.compile(f"(?:[.!?…‽۔؟।॥]+[{_CLOSING}]*(?=\\s)|[。！？；｡]+[…—]*[{_CLOSING}]*|\\n\\s*\\n)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:[^\W\d_]|(?:[^\W\d_]\.)+[^\W\d_]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Inc|Ltd|Co|Corp|No|Nos|Art|Sec"
    r"|Fig|Figs|Eq|Eqs|Ref|Refs|Vol|vs|v|cf|al|etc|approx|pp?)\.$"
)


def script_of(char: str) -> str:
    """The script of one character by its Unicode name, such as "Latin" or "Han"; "Common" for all but letters."""
    if unicodedata.category(char)[0] != "L":
        return "Common"
    name = [word for word in unicodedata.name(char, "UNKNOWN").split() if word not in _FORMS] or ["UNKNOWN"]
    script = name[0].title()
    return "Common" if script in _COMMON else _NAMES.get(script, script)


class _Scripts(dict):
    """script_of, remembered."""

    def __missing__(self, char: str) -> str:
        script = self[char] = script_of(char)
        return script


_SCRIPTS = _Scripts()


@functools.cache
def known_scripts() -> tuple[str, ...]:
    """The names that `script_of` gives to letters."""
    return tuple(sorted({script_of(chr(point)) for point in range(0x1F000)} - {"Common"}))


def scripts(text: str) -> dict[str, float]:
    """Shares of the scripts among the letters of `text`, the largest first; empty if it has no letter."""
    counts: dict[str, int] = {}
    for char, count in Counter(text).items():
        script = _SCRIPTS[char]
        counts[script] = counts.get(script, 0) + count
    counts.pop("Common", None)
    total = sum(counts.values())
    return {script: count / total for script, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def script(text: str) -> str:
    """The script of most letters of `text`; "Common" if it has none."""
    if text.isascii():
        return "Latin" if _ASCII_LETTER.search(text) else "Common"
    return next(iter(scripts(text)), "Common")


_UNSPACED_LETTER = re.compile(f"[{_HAN}{_KANA}{_SOUTH_EAST_ASIAN}]")
_ASCII_LETTER = re.compile("[A-Za-z]")
_ASCII_WORD = re.compile(r"\w+(?:'\w+)*")


@functools.cache
def _pattern(runs: bool) -> re.Pattern:
    """Matches a word, or one character of an unspaced script with its marks, or a run of them if `runs`."""
    spans: list[list[int]] = []
    for point in range(0x300, 0x10000):  # combining marks: letters of Indic scripts to the eye, but not to \w
        if unicodedata.category(chr(point))[0] == "M":
            if spans and spans[-1][1] == point - 1:
                spans[-1][1] = point
            else:
                spans.append([point, point])
    marks = "".join(f"{chr(first)}-{chr(last)}" for first, last in spans) + "\u200c\u200d"
    unspaced = _HAN + _KANA + _SOUTH_EAST_ASIAN
    word = f"[^\\W{unspaced}]+(?:[{marks}]+[^\\W{unspaced}]*)*"
    return re.compile(f"[{unspaced}][{unspaced * runs}{marks}]*|{word}(?:['’]{word})*")


def words(text: str, chinese: str = "auto") -> list[str]:
    """The words of `text` in order, without white space and punctuation.

    Scripts with spaces: runs of letters, digits, underscores and combining marks, with inner apostrophes. Chinese,
    Japanese, Thai, Lao, Burmese, Khmer: one token for each character (with its marks), or, for runs with Han
    characters, the words of a dictionary segmenter. chinese: "characters", "jieba" (rjieba; extra `prepare`), or
    "auto": jieba if it is installed.
    """
    cut = segmenter(chinese)
    if text.isascii():
        return _ASCII_WORD.findall(text)
    if cut is None:
        return _pattern(False).findall(text)
    found = []
    for token in _pattern(True).findall(text):
        names = {_SCRIPTS[char] for char in token}
        if "Han" in names:
            found.extend(cut(token))
        elif names & UNSPACED:
            found.extend(_pattern(False).findall(token))
        else:
            found.append(token)
    return found


def mostly_unspaced(text: str, tokens: Sequence[str]) -> bool:
    """Whether most characters of the tokens, `words(text)`, belong to scripts without spaces."""
    return not text.isascii() and 2 * len(_UNSPACED_LETTER.findall(text)) > sum(map(len, tokens))


@functools.cache
def segmenter(chinese: str):
    """The function run of text -> words that `chinese` names; None for characters. UserError if not installed."""
    if chinese not in CHINESE:
        raise unknown("segmentation of Chinese", chinese, CHINESE)
    if chinese == "characters":
        return None
    try:
        import rjieba
    except ImportError as error:
        if chinese == "auto":
            return None
        raise UserError(
            "words by dictionary (chinese='jieba') need the package rjieba: pip install 'vfm[prepare]'"
        ) from error
    return rjieba.cut


def sentences(text: str) -> list[str]:
    """The sentences of `text`, stripped, in order; nothing but white space between them is lost.

    A sentence ends at . ! ? … and their like before white space, at the full-width 。！？； anywhere, with the closing
    quotes after them, and at an empty line. Single letters and common abbreviations ("Dr.", "v.") end none, nor does
    a full stop before a small letter.
    """
    found, begin = [], 0
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        if match[0][0] == ".":
            rest = text[end : end + 80].lstrip()
            if rest[:1].islower() or (match[0] == "." and _ABBREVIATION.search(text, max(begin, end - 12), end)):
                continue
        if sentence := text[begin:end].strip():
            found.append(sentence)
        begin = end
    if sentence := text[begin:].strip():
        found.append(sentence)
    return found
