"""Splitting text into words by the regular expressions of tokenizers, exactly as their Unicode engines do, with `re`.

The expressions use \\p{L} and \\s of Unicode 16.0, which Python's `re` does not have. They are translated into sets of
characters of the Basic Multilingual Plane, for which `re` has a bitmap. Rare characters above it would cost a linear
search each, so they are replaced, for splitting only, by a stand-in of the same general category.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator

from vfm.errors import UserError
from vfm.tokenizers import unicode16

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2, "cl100k": CL100K, "o200k": O200K}
"""Split patterns by name. Source: GPT-2 (Radford et al. 2019); cl100k_base and o200k_base of tiktoken."""

# Patterns in which every character belongs to a word and a word that holds a letter or number goes on with no white
# space, so that text can be cut between the two.
_LOCAL = {
    GPT2,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    CL100K,
    CL100K.replace("{1,3}", ""),
    O200K,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
}
BLOCK = 1 << 20
_MAX = 0xFFFF
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
_WORD = ("L", "M", "Nd", "Nl", "Pc")
_WORD_EXTRA = ((0x200C, 0x200D), (0x24B6, 0x24E9))  # and, above U+FFFF, letters in circles and squares:
_LETTER_SYMBOLS = ((0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))


class Splitter:
    """Words of a text by a pattern, in the syntax that `tokenizers` and tiktoken share.

    pattern: the expression, or a name of PATTERNS. where: named in errors. An expression with parts that are not
    supported raises UserError.
    """

    def __init__(self, pattern: str, where: str = "split pattern"):
        self.pattern = PATTERNS.get(pattern, pattern)
        self.local = self.pattern in _LOCAL
        self._re = _compile(self.pattern, where)

    def __getstate__(self):
        return self.pattern

    def __setstate__(self, pattern):
        self.__init__(pattern)

    def findall(self, text: str) -> list[str]:
        """All matches, without empty ones."""
        if not has_astral(text):
            words = self._re.findall(text)
            return words if self.local else list(filter(None, words))
        if not self.local:
            return [text[start:end] for start, end in self.spans(text)]
        ends = list(itertools.accumulate(map(len, self._re.findall(shadow(text)))))
        return [text[start:end] for start, end in zip([0, *ends], ends)]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of all matches, without empty ones."""
        spans = (match.span() for match in self._re.finditer(shadow(text)))
        return [span for span in spans if span[0] < span[1]]

    def blocks(self, text: str, size: int = BLOCK) -> Iterator[str]:
        """Parts of a long text, cut only where words end in any case; the whole text for an unknown pattern."""
        start = 0
        while self.local and len(text) - start > size:
            cut = _cut().search(text, start + size)
            if cut is None:
                break
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:] if start else text


def has_astral(text: str) -> bool:
    """Whether a text has characters above U+FFFF."""
    if text.isascii():
        return False
    return len(text.encode("utf-16-le", "surrogatepass")) > 2 * len(text)


def shadow(text: str) -> str:
    """The text with every character above U+FFFF replaced by one below it of the same general category."""
    return _ASTRAL.sub(_stand_in, text) if has_astral(text) else text


@functools.cache
def _last_of(category: str) -> str:
    """The last character up to U+FFFF of a category."""
    return chr([last for _, last in unicode16.ranges(category) if last <= _MAX][-1])


@functools.lru_cache(maxsize=1 << 16)
def _stand_in_of(char: str) -> str:
    if any(first <= ord(char) <= last for first, last in _LETTER_SYMBOLS):
        return "\u24b6"
    return _last_of(unicode16.category(char))


def _stand_in(match: re.Match) -> str:
    return _stand_in_of(match[0])


@functools.cache
def _cut() -> re.Pattern:
    letters = unicode16.char_class(_bmp(unicode16.ranges("L") + unicode16.ranges("N")))
    return re.compile(rf"[{letters}](?=[ \n])")


@functools.cache
def _compile(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(translate(pattern, where))
    except re.error as error:
        raise UserError(f"{where} {pattern!r} is not a regular expression: {error}") from error


def _bmp(spans) -> list[tuple[int, int]]:
    return [(first, min(last, _MAX)) for first, last in spans if first <= _MAX]


def _invert(spans) -> list[tuple[int, int]]:
    found, start = [], 0
    for first, last in sorted(spans):
        if first > start:
            found.append((start, first - 1))
        start = max(start, last + 1)
    return [*found, (start, _MAX)] if start <= _MAX else found


def translate(pattern: str, where: str = "split pattern") -> str:
    """The pattern for Python's `re`, with exact classes, and groups that do not capture.

    Supported: literals, sets, \\p{..} with general categories, \\s \\d \\w and their negations, groups, look-around
    and quantifiers; anything else raises UserError.
    """
    out, i = [], 0

    def refuse(what: str) -> UserError:
        return UserError(f"{where} {pattern!r}: {what} is not supported")

    def escape(i: int) -> tuple[list[tuple[int, int]], int]:
        """The characters that the escape at i stands for, and its end."""
        char = pattern[i + 1 : i + 2]
        if char in ("p", "P"):
            found = re.match(r"\{(\^?)(\w+)\}|()(\w)", pattern[i + 2 :])
            spans = unicode16.ranges(found[2] or found[4]) if found and len(found[2] or found[4]) <= 2 else ()
            if not spans:
                raise refuse(f"the class {pattern[i:].partition('}')[0] + '}'!r}")
            spans = _bmp(spans)
            return (_invert(spans) if (char == "P") != bool(found[1]) else spans), i + 2 + found.end()
        if char.lower() in ("s", "d", "w") and char:
            if char.lower() == "s":
                spans = [(ord(c), ord(c)) for c in unicode16.WHITE_SPACE]
            else:
                names = ("Nd",) if char.lower() == "d" else _WORD
                spans = _bmp([span for name in names for span in unicode16.ranges(name)])
                spans += _WORD_EXTRA if char.lower() == "w" else ()
            return (_invert(spans) if char.isupper() else spans), i + 2
        if char in tuple("nrtfv"):
            code = ord({"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}[char])
            return [(code, code)], i + 2
        if char in ("x", "u") and (found := re.match(r"\{([0-9A-Fa-f]+)\}|[0-9A-Fa-f]+", pattern[i + 2 :])):
            digits = found[1] or found[0][: 2 if char == "x" else 4]
            if (code := int(digits, 16)) > _MAX:
                raise refuse(f"a character above U+FFFF (U+{code:X})")
            return [(code, code)], i + 2 + (found.end() if found[1] else len(digits))
        if char and not char.isalnum():
            return [(ord(char), ord(char))], i + 2
        raise refuse(f"the escape {pattern[i : i + 2]!r}")

    def charset(i: int) -> tuple[str, int]:
        """The set that begins at i, for `re`, and its end."""
        negated = pattern[i + 1 : i + 2] == "^"
        at = i + 1 + negated
        spans: list[tuple[int, int]] = []
        first = True
        while first or pattern[at : at + 1] != "]":
            char = pattern[at : at + 1]
            if not char:
                raise refuse("a set without its ']'")
            if char == "[" or pattern[at : at + 2] == "&&":
                raise refuse("a set inside a set")
            if char == "\\":
                found, at = escape(at)
            else:
                found, at = [(ord(char), ord(char))], at + 1
            single = len(found) == 1 and found[0][0] == found[0][1]
            if single and pattern[at : at + 1] == "-" and pattern[at + 1 : at + 2] not in ("]", ""):
                if pattern[at + 1] == "\\":
                    end, at = escape(at + 1)
                else:
                    end, at = [(ord(pattern[at + 1]),) * 2], at + 2
                if len(end) != 1 or end[0][1] < found[0][0]:
                    raise refuse(f"the range that ends before {pattern[at:]!r}")
                found = [(found[0][0], end[0][1])]
            if found and found[-1][1] > _MAX:
                raise refuse("a character above U+FFFF")
            spans += found
            first = False
        text = unicode16.char_class(sorted(spans))
        return f"[{'^' if negated else ''}{text}]", at + 1

    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            spans, i = escape(i)
            if len(spans) == 1 and spans[0][0] == spans[0][1]:
                out.append(re.escape(chr(spans[0][0])))
            else:
                out.append(f"[{unicode16.char_class(spans)}]")
        elif char == "[":
            text, i = charset(i)
            out.append(text)
        elif char == "(":
            kind = re.match(r"\((?:\?(?::|i:|!|=|<=|<!|>))?", pattern[i:])[0]
            if kind == "(" and pattern[i + 1 : i + 2] == "?":
                raise refuse(f"the group {pattern[i : i + 4]!r}")
            out.append("(?:" if kind == "(" else kind)
            i += len(kind)
        elif char in "^$" or ord(char) > _MAX:
            raise refuse(f"{char!r}")
        else:
            out.append(char)
            i += 1
    return "".join(out)


def isolated(splitter: Splitter, text: str) -> list[str]:
    """Matches and what lies between them, in order; together they are the text."""
    if splitter.local:
        return splitter.findall(text)
    return [text[start:end] for start, end, _ in partition(splitter.spans, text)]


def partition(spans: Callable[[str], list[tuple[int, int]]], text: str) -> list[tuple[int, int, bool]]:
    """(start, end, whether it is a match) of all parts of the text, without empty ones."""
    found, at = [], 0
    for start, end in itertools.chain(spans(text), [(len(text), len(text))]):
        if at < start:
            found.append((at, start, False))
        if start < end:
            found.append((start, end, True))
        at = end
    return found
