"""Classes of characters and splits, over every code point."""

import random
import re
import unicodedata

import pytest

from vfm.errors import UserError
from vfm.tokenizers import split, unicode16
from vfm.tokenizers.split import Splitter, isolated

CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
# The first and last character of every run of one category: where a wrong class would show.
EDGES = sorted(
    {chr(code) for span in zip(unicode16._runs()[0], (n - 1 for n in unicode16._runs()[0][1:])) for code in span}
    & set(CHARACTERS)
)
EXTENTS = [pytest.param(EDGES, id="edges"), pytest.param(CHARACTERS, id="all", marks=pytest.mark.slow)]


def test_categories_as_in_unicodedata():
    # Python's tables may be of another version: what one of them does not assign is not compared.
    differ = {
        char
        for char in CHARACTERS
        if unicode16.category(char) != unicodedata.category(char)
        and "Cn" not in (unicode16.category(char), unicodedata.category(char))
    }
    assert differ <= {"\U0001171e"}  # changed from Mn to Mc in Unicode 15
    assert sum(last - first + 1 for first, last in unicode16.ranges("")) == 0x110000
    spaces = {char for char in CHARACTERS if char.isspace()}
    assert set(unicode16.WHITE_SPACE) == spaces - set("\x1c\x1d\x1e\x1f")


@pytest.mark.parametrize("characters", EXTENTS)
@pytest.mark.parametrize("name", ["L", "N", "P", "M", "S", "Lu", "Nd"])
def test_classes_as_in_tokenizers(name, characters):
    hf = pytest.importorskip("tokenizers")
    theirs = hf.pre_tokenizers.Split(hf.Regex(rf"\p{{{name}}}"), "removed", invert=True)
    found = {char for word, _ in theirs.pre_tokenize_str("".join(characters)) for char in word}
    ours = {chr(code) for first, last in unicode16.ranges(name) for code in range(first, last + 1)}
    assert found == ours & set(characters)


@pytest.mark.parametrize("characters", EXTENTS)
@pytest.mark.parametrize("name", split.PATTERNS)
def test_splits_as_in_tokenizers(name, characters):
    hf = pytest.importorskip("tokenizers")
    rng, splitter = random.Random(0), Splitter(name)
    theirs = hf.pre_tokenizers.Split(hf.Regex(split.PATTERNS[name]), "isolated")
    before, after = ("", "x", " ", "'", "  ", "\n", "1", ".", "S"), ("", "y", " ", "s", "\n\n", "2", "!", "\t")
    for start in range(0, len(characters), 3000):
        part = characters[start : start + 3000]
        text = "".join(rng.choice(before) + char + rng.choice(after) for char in part)
        assert isolated(splitter, text) == [word for word, _ in theirs.pre_tokenize_str(text)]


def test_named_patterns_split_as_without_the_shortcut():
    text = "It's 12345 — naïve𝕳 𠀀x  \n\n \t y!?\r\n🎈🎈 'S end  "
    for name, pattern in split.PATTERNS.items():
        other = Splitter(f"(?:{pattern})")
        assert Splitter(name).local and not other.local
        assert isolated(Splitter(name), text) == isolated(other, text)
        assert "".join(isolated(other, text)) == text


def test_blocks_are_cut_where_words_end():
    rng = random.Random(0)
    text = "".join(
        rng.choice(("ab", "é", "12", " ", "  ", "\n", "'s", ".", "..\n", "你好", "𠀀", "\t")) for _ in range(20_000)
    )
    for name in split.PATTERNS:
        splitter = Splitter(name)
        blocks = list(splitter.blocks(text, size=100))
        assert len(blocks) > 100 and "".join(blocks) == text
        assert [word for block in blocks for word in splitter.findall(block)] == splitter.findall(text)
    assert list(Splitter(r"\p{L}+|.").blocks(text, size=100)) == [text]


@pytest.mark.parametrize(
    "pattern, words",
    [
        (r"\p{Han}+", ("\\p{Han}", "not supported")),
        (r"\p{Xx}", ("\\p{Xx}", "not supported")),
        (r"[a[b]]", ("set inside a set",)),
        (r"[a-z", ("set without",)),
        (r"(?P<name>x)", ("group",)),
        (r"^x", ("'^'",)),
        (r"x$", ("'$'",)),
        (r"\bx", ("escape",)),
        ("[\U00020000-\U0002a6df]", ("U+FFFF",)),
        (r"\u{1F600}", ("U+FFFF",)),
        ("(x", ("not a regular expression",)),
        ("x**", ("not a regular expression",)),
    ],
)
def test_unsupported_patterns_are_told_in_one_line(pattern, words):
    with pytest.raises(UserError) as error:
        Splitter(pattern)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_translated_syntax():
    for pattern, text in (
        (r"[^\S\n]+", "a \t\nb"),
        (r"\x41\u0042[\]\-]\.", "AB].AB-."),
        (r"(a|b){2}", "abba"),
        (r"\D\d", "a1 22"),
    ):
        assert re.findall(split.translate(pattern), text) == [m[0] for m in re.finditer(pattern, text)]
