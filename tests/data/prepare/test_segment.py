import random
import sys

import pytest

from vfm.data.prepare import scripts, sentences, words
from vfm.data.prepare.segment import script, script_of, segmenter
from vfm.errors import UserError

MIXED = "Don’t stop: 我来到北京，ภาษาไทย हिन्दी भाषा カタカナ 한국어 naïve t167 über_x ＡＢ 3.5"


@pytest.mark.parametrize(
    "char, name",
    [("a", "Latin"), ("ß", "Latin"), ("Ａ", "Latin"), ("я", "Cyrillic"), ("λ", "Greek"), ("我", "Han"), ("𠀀", "Han")]
    + [("々", "Han"), ("あ", "Hiragana"), ("ｶ", "Katakana"), ("ー", "Katakana"), ("한", "Hangul"), ("ก", "Thai")]
    + [("अ", "Devanagari"), ("ع", "Arabic"), ("µ", "Common"), ("𝐀", "Common"), ("1", "Common"), ("。", "Common")],
)
def test_script_of_a_character(char, name):
    assert script_of(char) == name


def test_shares_of_scripts():
    assert scripts("abc 我来 1.") == {"Latin": 0.6, "Han": 0.4}
    assert scripts("12 !") == {} and script("12 !") == "Common"
    assert script("我来 ab 到") == "Han"


def test_words_of_many_scripts():
    assert words(MIXED, "characters") == (
        ["Don’t", "stop", *"我来到北京", *"ภาษาไทย", "हिन्दी", "भाषा", *"カタカナ", "한국어", "naïve", "t167", "über_x"]
        + ["ＡＢ", "3", "5"]
    )
    assert words("don't a_b (x)", "characters") == ["don't", "a_b", "x"]


def test_combining_marks_stay_with_their_letter():
    assert words("e\u0301té น้ำ", "characters") == ["e\u0301té", "น้", "ำ"]


def test_no_letter_or_digit_is_lost():
    rng = random.Random(0)
    alphabet = "ab1_ .,'’我来、あのカー ก้ำ हिन्दी한\u0301\u200d𠀀"
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=30))
        kept = "".join(words(text, "characters"))
        assert [c for c in text if c.isalnum() or c == "_"] == [c for c in kept if c.isalnum() or c == "_"]


def test_chinese_by_dictionary():
    pytest.importorskip("rjieba")
    assert words("我来到北京清华大学, ok カナ", "jieba") == ["我", "来到", "北京", "清华大学", "ok", "カ", "ナ"]
    assert words("我来到北京", "auto") == ["我", "来到", "北京"]


def test_chinese_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    segmenter.cache_clear()
    assert words("来到北京", "auto") == list("来到北京")
    with pytest.raises(UserError, match=r"rjieba.*vfm\[prepare\]"):
        words("来到北京", "jieba")
    with pytest.raises(UserError, match="did you mean 'jieba'"):
        words("来到北京", "jeba")
    segmenter.cache_clear()


@pytest.mark.parametrize(
    "text, expected",
    [
        ('It\'s over! "Really?" Yes.', ["It's over!", '"Really?"', "Yes."]),
        (
            "Dr. Smith v. Jones took 3.5 days. The U.S. Army won.",
            ["Dr. Smith v. Jones took 3.5 days.", "The U.S. Army won."],
        ),
        ("See e.g. this one, i.e. that. Next", ["See e.g. this one, i.e. that.", "Next"]),
        ("He left... and came back. Why?!", ["He left... and came back.", "Why?!"]),
        ("你好。我是人！“是吗？”他说。", ["你好。", "我是人！", "“是吗？”", "他说。"]),
        ("यह एक वाक्य है। दूसरा।", ["यह एक वाक्य है।", "दूसरा।"]),
        ("A title\n\nFirst line\nsecond line.", ["A title", "First line\nsecond line."]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_sentences_lose_white_space_only():
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("aB. !?。”\n Dr我", k=40))
        assert "".join("".join(sentences(text)).split()) == "".join(text.split())
