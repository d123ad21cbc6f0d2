import random
import unicodedata

import pytest

from vfm.data.prepare.normalise import FORMS, WHITESPACE, identity, normalise, strip_html


def test_forms():
    text = "e\u0301 ﬁ Ａ①"
    assert normalise(text) == "é ﬁ Ａ①"
    assert normalise(text, unicode="NFKC") == "é fi A1"
    assert normalise(text, unicode="none") == text


def test_control_characters_and_line_breaks():
    assert normalise("a\x00b\u200bc\ufeff\r\nd\u2028e\xad\x85f") == "abc\nd\ne\nf"
    assert normalise("می\u200cخواهم 👩\u200d🔬") == "می\u200cخواهم 👩\u200d🔬"  # joiners spell
    assert normalise("a\x00b", controls=False) == "a\x00b"


def test_white_space():
    text = "  a\xa0\u3000b  \n\n\n\n  c\t d \n"
    assert normalise(text) == "a  b\n\n  c\t d"
    assert normalise(text, whitespace="collapse") == "a b\n\nc d"
    assert normalise(text, whitespace="keep") == text


def test_lone_surrogates_become_what_utf8_can_hold():
    assert normalise("a\ud800b").encode() == "a\ufffdb".encode()


@pytest.mark.parametrize("unicode", FORMS)
@pytest.mark.parametrize("whitespace", WHITESPACE)
def test_twice_is_once(unicode, whitespace):
    rng = random.Random(0)
    points = [p for p in range(0x3100) if unicodedata.category(chr(p)) != "Cs"] + list(range(0xF900, 0x10000))
    alphabet = list(map(chr, points)) + list(" \t\n\r\xa0\u0301e\u200b") * 400
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=40))
        once = normalise(text, unicode=unicode, whitespace=whitespace)
        assert normalise(once, unicode=unicode, whitespace=whitespace) == once
        assert identity(once) == identity(text) or whitespace == "keep" or unicode in ("NFKC", "NFKD")


def test_html():
    page = (
        "<html><head><title>T</title><style>p {x}</style></head><body><p>One &amp; <b>two</b></p><script>var a='<p>';"
        "</script><ul><li>x&nbsp;<li>y</ul></body>"
    )
    assert normalise(page, html=True) == "T\n\nOne & two\n\nx\ny"
    assert strip_html("a < b and c") == "a < b and c"
    assert normalise("a &lt; b") == "a &lt; b"  # only when asked for


def test_identity_ignores_case_white_space_and_compatibility_forms():
    assert identity(" Straße\u200b\n ﬁx Ａ ") == identity("strasse fix a")
    assert identity("a b") != identity("ab")
