import random
from collections import Counter

import numpy as np
import pytest

from vfm.data.prepare.clean import LINE_RULES, PRESETS, RULES, Cleaner, ngram_shares, parse
from vfm.errors import UserError

GOOD = (
    "The council met on Tuesday to discuss the plans that have been made for the new bridge. Several people there "
    "spoke against it, and some asked to be heard again with more time.\n"
    "After two hours the chairman closed the meeting. A decision is expected next month, when the engineers will have "
    "finished their report on the foundations.\n\n"
    "Costs are estimated at three million, most of which would be paid by the county."
)
LINES = "one small step\ntwo green apples\nthree old friends\nfour long roads\n"
# A text that breaks the rule, with its limit.
BREAKS = {
    "min_chars": (10, "short"),
    "max_chars": (100, GOOD),
    "max_replacement": (0.05, "b\ufffdd t\ufffdxt"),
    "min_letters": (0.5, "12 34 56 ab"),
    "max_digits": (0.5, "12 34 56 ab"),
    "max_symbols": (0.3, "<<--==>> ab ab"),
    "max_char_run": (10, "so" + "o" * 20),
    "min_script": (0.5, "Это не латиница, but"),
    "bad_words": (1, "such a DARN thing"),
    "no_placeholder": (1, "Lorem Ipsum dolor"),
    "no_braces": (1, "if (x) { y }"),
    "min_sentences": (2, "One sentence only."),
    "min_words": (5, "only four words here"),
    "max_words": (5, GOOD),
    "min_word_length": (3, "a b c of a b c"),
    "max_word_length": (10, "incomprehensibilities internationalization"),
    "max_hashes": (0.1, "#a #b #c d"),
    "max_ellipses": (0.1, "well... so... it goes"),
    "min_alphabetic_words": (0.8, "1 2 3 four five"),
    "min_stop_words": (2, "colourless green ideas sleep furiously"),
    "max_bullet_lines": (0.9, "- a\n- b\n• c\n* d"),
    "max_ellipsis_lines": (0.3, "read more...\nand more…\nend"),
    "max_repeated_lines": (0.3, LINES + LINES),
    "max_repeated_line_chars": (0.2, LINES + LINES),
    "max_repeated_paragraphs": (0.3, "ab cd\n\nab cd\n\nef"),
    "max_repeated_paragraph_chars": (0.2, "ab cd\n\nab cd\n\nef"),
    **{f"max_top_{n}gram": (0.15, "buy now cheap pills " * 4) for n in (2, 3, 4)},
    **{f"max_repeated_{n}gram": (0.1, GOOD + " " + GOOD) for n in range(5, 11)},
}


def cleaner(rules):
    scripts = ("Latin",) if "min_script" in rules else ()
    bad_words = ("darn", "heck no") if "bad_words" in rules else ()
    return Cleaner(rules, scripts, bad_words)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_removes_what_breaks_it_and_keeps_good_text(rule):
    limit, text = BREAKS[rule]
    assert cleaner({rule: limit})(text) == (text, rule)
    if rule not in ("max_chars", "max_words"):
        assert cleaner({rule: limit})(GOOD) == (GOOD, "")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_good_text(preset):
    assert Cleaner(parse(preset))(GOOD) == (GOOD, "")


def test_presets_remove_spam_and_boilerplate():
    assert Cleaner(parse("gopher"))("click here to win a prize and more of it " * 20)[1] == "max_top_2gram"
    assert Cleaner(parse("c4"))("lorem ipsum dolor sit amet. and then some more of it. really it goes on.")[1]
    assert Cleaner(parse("basic"))("")[1] == "min_chars"


def test_line_rules_cut_lines_and_then_the_document_is_judged():
    text = "Home | About\n" + GOOD + "\nPlease enable javascript to read this page.\nshort one."
    kept, rule = Cleaner(parse("c4"))(text)
    assert (kept, rule) == (GOOD, "")
    assert Cleaner(parse("c4"))(kept) == (kept, "")
    assert Cleaner(parse("line_punctuation=1,min_chars=1"))("no end\nnor here") == ("", "min_chars")
    assert set(LINE_RULES) <= set(parse("c4"))


def test_chinese_is_counted_in_characters_and_has_no_word_length():
    text = "秦川雄帝宅，函谷壮皇居。绮殿千寻起，离宫百雉余。"
    assert Cleaner({"min_words": 20, "min_word_length": 3, "min_stop_words": 2, "min_sentences": 2})(text) == (text, "")
    assert Cleaner({"min_words": 21})(text)[1] == "min_words"
    assert Cleaner({}, scripts=("Latin",))(text)[1] == "min_script"
    assert Cleaner({}, scripts=("Latin", "Han"))(text)[1] == ""


def test_the_first_broken_rule_in_order_is_named():
    assert Cleaner({"min_words": 50, "min_chars": 100})("short")[1] == "min_chars"


def test_specs():
    assert parse("") == parse("none") == {}
    assert parse("gopher, min_words=20,max_hashes=off")["min_words"] == 20
    assert "max_hashes" not in parse("gopher,max_hashes=off")
    for spec, message in {
        "gofer": "unknown preset.*did you mean 'gopher'",
        "min_word=3": "unknown cleaning rule.*did you mean 'min_words'",
        "min_words=many": "expected a number or off",
    }.items():
        with pytest.raises(UserError, match=message):
            parse(spec)
    with pytest.raises(UserError, match="needs the option `scripts`"):
        Cleaner({"min_script": 0.5})
    with pytest.raises(UserError, match="needs the option `bad_words`"):
        Cleaner({"bad_words": 1})


def test_shares_of_ngrams_against_counting_by_hand():
    rng = random.Random(0)
    for _ in range(60):
        words = rng.choices(["a", "bb", "ccc", "dd", "e"], k=rng.randrange(1, 60))
        shares, total = ngram_shares(words), sum(map(len, words))
        for n in range(2, 11):
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            counts = Counter(grams)
            if n <= 4:
                most = max(counts.values(), default=0)
                best = max((sum(map(len, g)) for g, c in counts.items() if c == most), default=0)
                expected, found = (most * best / total if most > 1 else 0), shares["top"].get(n, 0)
            else:
                inside = np.zeros(len(words), bool)
                for i, gram in enumerate(grams):
                    inside[i : i + n] |= counts[gram] > 1
                expected = sum(len(w) for w, again in zip(words, inside) if again) / total
                found = shares["repeated"].get(n, 0)
            assert found == pytest.approx(expected), (n, words)
