"""Cleaning rules: each a named limit on one measure of a document, in presets after Gopher and C4."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vfm.data.prepare import segment
from vfm.errors import UserError, unknown

# Measure limits of a document, in the order in which they are tried; the name of a rule is its name in the data card.
RULES = {
    "min_chars": "characters, at least",
    "max_chars": "characters, at most",
    "max_replacement": "share of characters that are U+FFFD, left by a wrong decoding, at most",
    "min_letters": "share of letters among the characters that are not white space, at least",
    "max_digits": "share of digits among them, at most",
    "max_symbols": "share of those that are no letter, mark or digit among them, at most",
    "max_char_run": "longest run of one character that is not white space, at most",
    "min_script": "share of letters in the scripts of the option `scripts`, at least",
    "bad_words": "no word of the file of the option `bad_words` (1: on)",
    "no_placeholder": "no 'lorem ipsum' (1: on)",
    "no_braces": "no curly bracket (1: on)",
    "min_sentences": "sentences, at least",
    "min_words": "words, at least",
    "max_words": "words, at most",
    "min_word_length": "mean characters of a word, at least (scripts with spaces)",
    "max_word_length": "mean characters of a word, at most (scripts with spaces)",
    "max_hashes": "hash signs per word, at most",
    "max_ellipses": "ellipses per word, at most",
    "min_alphabetic_words": "share of words with a letter, at least",
    "min_stop_words": "different words among the, be, to, of, and, that, have, with, at least (Latin script)",
    "max_bullet_lines": "share of lines that begin with a bullet, at most",
    "max_ellipsis_lines": "share of lines that end with an ellipsis, at most",
    "max_repeated_lines": "share of lines that repeat an earlier line, at most",
    "max_repeated_line_chars": "share of characters in them, at most",
    "max_repeated_paragraphs": "share of paragraphs that repeat an earlier one, at most",
    "max_repeated_paragraph_chars": "share of characters in them, at most",
    **{f"max_top_{n}gram": f"share of characters in the most frequent {n}-gram of words, at most" for n in (2, 3, 4)},
    **{f"max_repeated_{n}gram": f"share of characters in repeated {n}-grams, at most" for n in range(5, 11)},
}
# Rules that cut lines out of a document; they go before the others.
LINE_RULES = {
    "line_punctuation": "keep only lines that end in a full stop or its like, or a closing quote (1: on)",
    "line_words": "keep only lines with at least this many words",
    "line_notices": "cut lines about javascript, cookies and terms of use (1: on)",
}
PRESETS = {
    "none": {},
    "basic": {"min_chars": 1, "max_replacement": 0.05},
    # Rae et al. 2021, Scaling Language Models (Gopher), appendix A.1.1, table A1.
    "gopher": {
        "min_chars": 1,
        "min_words": 50,
        "max_words": 100_000,
        "min_word_length": 3,
        "max_word_length": 10,
        "max_hashes": 0.1,
        "max_ellipses": 0.1,
        "max_bullet_lines": 0.9,
        "max_ellipsis_lines": 0.3,
        "min_alphabetic_words": 0.8,
        "min_stop_words": 2,
        "max_repeated_lines": 0.3,
        "max_repeated_line_chars": 0.2,
        "max_repeated_paragraphs": 0.3,
        "max_repeated_paragraph_chars": 0.2,
        "max_top_2gram": 0.2,
        "max_top_3gram": 0.18,
        "max_top_4gram": 0.16,
        "max_repeated_5gram": 0.15,
        "max_repeated_6gram": 0.14,
        "max_repeated_7gram": 0.13,
        "max_repeated_8gram": 0.12,
        "max_repeated_9gram": 0.11,
        "max_repeated_10gram": 0.1,
    },
    # Raffel et al. 2020, Exploring the Limits of Transfer Learning (T5), section 2.2, without its language detection.
    "c4": {
        "min_chars": 1,
        "line_punctuation": 1,
        "line_words": 5,
        "line_notices": 1,
        "no_placeholder": 1,
        "no_braces": 1,
        "min_sentences": 3,
    },
}

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = tuple("•‣▪●◦·*-–—")
_LINE_END = re.compile(r"[.!?…。！？；]['\"”’»」』）)]*$|[\"”’»」』]$")
_NOTICES = re.compile(r"javascript|terms of use|privacy policy|cookie policy|uses? (?:of )?cookies", re.IGNORECASE)
_ELLIPSES = re.compile(r"\.\.\.|…")


def parse(spec: str) -> dict[str, float]:
    """The rules of "PRESET,...,RULE=VALUE,..."; later ones win, RULE=off takes one out. UserError for unknown names."""
    rules: dict[str, float] = {}
    for part in filter(None, map(str.strip, spec.split(","))):
        name, equals, value = map(str.strip, part.partition("="))
        if not equals:
            if name not in PRESETS:
                raise unknown("preset of cleaning rules", name, PRESETS, where="the option `clean`")
            rules |= PRESETS[name]
            continue
        if name not in RULES and name not in LINE_RULES:
            raise unknown("cleaning rule", name, [*RULES, *LINE_RULES], where="the option `clean`")
        if value == "off":
            rules.pop(name, None)
            continue
        try:
            rules[name] = float(value)
        except ValueError:
            raise UserError(f"cleaning rule {name}={value!r}: expected a number or off, such as {name}=3") from None
    return rules


class Cleaner:
    """text -> (text, rule): the text without the lines that rules cut, and the first rule it breaks, "" if none.

    rules: name -> limit, as from `parse`. scripts: script names for the rule min_script (0.5 unless it is set).
    bad_words: lower-case words or phrases for the rule of that name. chinese: as in `segment.words`.
    """

    def __init__(
        self,
        rules: Mapping[str, float],
        scripts: Sequence[str] = (),
        bad_words: Sequence[str] = (),
        chinese: str = "characters",
    ):
        self.rules = dict(rules)
        self.scripts, self.chinese = frozenset(scripts), chinese
        if self.scripts:
            self.rules.setdefault("min_script", 0.5)
        elif self.rules.get("min_script"):
            raise UserError("the cleaning rule min_script needs the option `scripts`, such as scripts=Latin,Han")
        self.bad_words = None
        if bad_words:
            self.rules.setdefault("bad_words", 1)
            words = "|".join(re.escape(word) for word in sorted(bad_words, key=len, reverse=True))
            self.bad_words = re.compile(rf"(?<!\w)(?:{words})(?!\w)")
            if any(segment.script(word) in segment.UNSPACED for word in bad_words):
                self.bad_words = re.compile(words)
        elif self.rules.get("bad_words"):
            raise UserError("the cleaning rule bad_words needs the option `bad_words`, a file with one word a line")
        on_or_off = ("bad_words", "no_placeholder", "no_braces")
        self.order = [
            name for name in RULES if self.rules.get(name, 0) or (name in self.rules and name not in on_or_off)
        ]

    def __call__(self, text: str) -> tuple[str, str]:
        if any(name in self.rules for name in LINE_RULES):
            text = "\n".join(line for line in text.split("\n") if self._keeps(line)).strip("\n")
        measures = _Measures(text, self)
        for name in self.order:
            value, limit = measures.value(name), self.rules[name]
            if value is None:
                continue
            if value < limit if name.startswith("min_") else value > limit if name.startswith("max_") else value:
                return text, name
        return text, ""

    def _keeps(self, line: str) -> bool:
        rules = self.rules
        if not line.strip():
            return True
        if rules.get("line_punctuation") and not _LINE_END.search(line.rstrip()):
            return False
        if (least := rules.get("line_words")) and len(segment.words(line, self.chinese)) < least:
            return False
        return not (rules.get("line_notices") and _NOTICES.search(line))


@functools.lru_cache(maxsize=1 << 16)
def _class(char: str) -> str:
    return "Z" if char.isspace() else unicodedata.category(char)[0]


class _Measures:
    """What the rules compare, each computed when it is asked for; None where a measure has no meaning."""

    def __init__(self, text: str, cleaner: Cleaner):
        self.text, self.cleaner = text, cleaner

    def value(self, rule: str):
        """The measure of a rule; for a rule that is on or off, whether the document breaks it."""
        name = rule.removeprefix("min_").removeprefix("max_")
        if name.endswith("gram"):  # top_3gram, repeated_7gram
            kind, _, n = name.removesuffix("gram").partition("_")
            return self._ngrams[kind].get(int(n), 0.0)
        return getattr(self, name)

    @property
    def chars(self) -> int:
        return len(self.text)

    @functools.cached_property
    def _classes(self) -> Counter:
        counts = Counter()
        for char, count in Counter(self.text).items():
            counts[_class(char)] += count
        return counts

    def _share(self, classes: str) -> float | None:
        visible = sum(count for kind, count in self._classes.items() if kind not in "ZC")
        return sum(self._classes[kind] for kind in classes) / visible if visible else None

    @property
    def letters(self) -> float | None:
        return self._share("LM")

    @property
    def digits(self) -> float | None:
        return self._share("N")

    @property
    def symbols(self) -> float | None:
        return self._share("PS")

    @property
    def replacement(self) -> float:
        return self.text.count("\ufffd") / max(1, len(self.text))

    @property
    def char_run(self) -> int:
        return max((len(match[0]) for match in re.finditer(r"(\S)\1+", self.text)), default=1)

    @functools.cached_property
    def _scripts(self) -> dict[str, float]:
        return segment.scripts(self.text)

    @property
    def script(self) -> float | None:
        return sum(self._scripts.get(name, 0.0) for name in self.cleaner.scripts) if self._scripts else None

    @property
    def bad_words(self) -> bool:
        return bool(self.cleaner.bad_words.search(self.text.casefold()))

    @property
    def no_placeholder(self) -> bool:
        return "lorem ipsum" in self.text.casefold()

    @property
    def no_braces(self) -> bool:
        return "{" in self.text or "}" in self.text

    @property
    def sentences(self) -> int:
        return len(segment.sentences(self.text))

    @functools.cached_property
    def _spaced(self) -> bool:
        return next(iter(self._scripts), "Common") not in segment.UNSPACED

    @functools.cached_property
    def _words(self) -> list[str]:
        return self.text.split() if self._spaced else segment.words(self.text, self.cleaner.chinese)

    @property
    def words(self) -> int:
        return len(self._words)

    @property
    def word_length(self) -> float | None:
        return sum(map(len, self._words)) / len(self._words) if self._spaced and self._words else None

    @property
    def hashes(self) -> float:
        return self.text.count("#") / max(1, len(self._words))

    @property
    def ellipses(self) -> float:
        return len(_ELLIPSES.findall(self.text)) / max(1, len(self._words))

    @property
    def alphabetic_words(self) -> float | None:
        words = self._words
        return sum(any(map(str.isalpha, word)) for word in words) / len(words) if words else None

    @property
    def stop_words(self) -> int | None:
        if next(iter(self._scripts), "Latin") != "Latin":
            return None
        return len(_STOP_WORDS.intersection(word.lower() for word in self._words))

    @functools.cached_property
    def _lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @property
    def bullet_lines(self) -> float:
        return sum(line.startswith(_BULLETS) for line in self._lines) / max(1, len(self._lines))

    @property
    def ellipsis_lines(self) -> float:
        return sum(line.endswith(("...", "…")) for line in self._lines) / max(1, len(self._lines))

    @functools.cached_property
    def _line_repeats(self) -> tuple[float, float]:
        return _repeats(self._lines)

    @functools.cached_property
    def _paragraph_repeats(self) -> tuple[float, float]:
        return _repeats([part for part in map(str.strip, re.split(r"\n\s*\n", self.text)) if part])

    @property
    def repeated_lines(self) -> float:
        return self._line_repeats[0]

    @property
    def repeated_line_chars(self) -> float:
        return self._line_repeats[1]

    @property
    def repeated_paragraphs(self) -> float:
        return self._paragraph_repeats[0]

    @property
    def repeated_paragraph_chars(self) -> float:
        return self._paragraph_repeats[1]

    @functools.cached_property
    def _ngrams(self) -> dict[str, dict[int, float]]:
        return ngram_shares(self._words)


def _repeats(parts: list[str]) -> tuple[float, float]:
    """Shares of the parts, and of their characters, that repeat an earlier part."""
    seen, parts_again, chars_again = set(), 0, 0
    for part in parts:
        if part in seen:
            parts_again += 1
            chars_again += len(part)
        seen.add(part)
    return parts_again / max(1, len(parts)), chars_again / max(1, sum(map(len, parts)))


def ngram_shares(words: Sequence[str]) -> dict[str, dict[int, float]]:
    """{"top": {n: share}, "repeated": {n: share}} of the characters of `words` in n-grams that occur again.

    top (n = 2 to 4): in all occurrences of the most frequent n-gram, overlapping ones counted each. repeated (n = 5
    to 10): in n-grams that occur twice or more, each character once. An n that is left out has share 0.
    """
    shares: dict[str, dict[int, float]] = {"top": {}, "repeated": {}}
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers) + 1) for word in words), np.uint64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    total = max(1, int(lengths.sum()))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    place, keys = np.arange(len(words)), ids
    for n in range(2, 11):
        # Only where an n-gram occurs again can a longer one. Its key is a polynomial of its words modulo 2 to the 64.
        inside = place + n <= len(words)
        place = place[inside]
        keys = keys[inside] * np.uint64(0x9E3779B97F4A7C15) + ids[place + n - 1]
        _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        again = counts[inverse] > 1
        if not again.any():
            break
        if n <= 4:
            best = place[first[counts == counts.max()]]
            shares["top"][n] = float(counts.max() * (ends[best + n] - ends[best]).max() / total)
        place, keys = place[again], keys[again]
        if n >= 5:
            edges = np.zeros(len(words) + 1, np.int64)
            edges[place] += 1
            edges[place + n] -= 1
            shares["repeated"][n] = float(lengths[np.cumsum(edges[:-1]) > 0].sum() / total)
    return shares
