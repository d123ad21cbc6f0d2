import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from vfm.data.prepare.labels import suspects
from vfm.data.prepare.perplexity import CharNgram, fit
from vfm.errors import UserError


def plain_bits(texts, text, order, strength):
    """The formula of `CharNgram`, written with dictionaries."""
    counts, total = Counter(), 0
    for sample in texts:
        symbols = ["<"] * order + list(sample) + [">"]
        total += len(sample) + 1
        for end in range(order, len(symbols) + 1):
            for n in range(1, order + 1):
                counts[tuple(symbols[end - n : end])] += 1
    symbols, bits = ["<"] * order + list(text), []
    for end in range(order + 1, len(symbols) + 1):
        p = 1 / 0x110001
        for n in range(1, order + 1):
            gram = tuple(symbols[end - n : end])
            before = counts[gram[:-1]] if n > 1 else total
            p = (counts[gram] + strength * p) / (before + strength)
        bits.append(-math.log2(p))
    return bits


def test_ngram_model_is_its_formula():
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab c我", k=rng.randrange(0, 30))) for _ in range(40)]
    for order, strength in itertools.product((1, 2, 4), (0.5, 8.0)):
        model = CharNgram(order, strength).fit(texts[:25]).fit(texts[25:])
        for text in ("ab cab", "我zz", "a"):
            np.testing.assert_allclose(model.bits(text), plain_bits(texts, text, order, strength), rtol=1e-9)
    assert model.bits_per_char("") == 0


def test_ngram_model_is_a_distribution():
    """Over all characters that may follow, seen and unseen, and the end, the probabilities add up to one."""
    model = CharNgram(3).fit(["abab ba", "ab", "b a"])
    for history in ("", "a", "ab", "zz"):
        seen = [2 ** -model.bits(history + char)[-1] for char in "ab "]
        unseen = 2 ** -model.bits(history + "z")[-1]
        total = sum(seen) + (0x110000 - 3) * unseen
        assert 0 < 1 - total < 0.5  # the rest is the end of the text
    never_ends = CharNgram(2).fit(["ab" * 5000])
    p = sum(2 ** -never_ends.bits("a" + char)[-1] for char in "ab") + 0x110000 * 2 ** -never_ends.bits("az")[-1]
    assert p == pytest.approx(1, abs=1e-3)


def sentences(rng, n):
    nouns = ["river", "house", "garden", "window", "letter", "brother", "morning", "road"]
    verbs = ["saw", "built", "left", "found", "kept"]
    say = lambda: f"the {rng.choice(nouns)} of my {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)}"
    return [". ".join(say() for _ in range(6)) for _ in range(n)]


def test_threshold_keeps_clean_text_and_finds_noise():
    rng = random.Random(0)
    model, limit = fit(sentences(rng, 400))
    clean = sentences(rng, 300)
    noise = ["".join(rng.choice("abcdefgh ") if rng.random() < 0.2 else c for c in text) for text in clean]
    shuffled = ["".join(rng.sample(text, len(text))) for text in clean]
    above = lambda texts: np.mean([model.bits_per_char(text) > limit for text in texts])
    assert above(clean) < 0.04 and above(noise) > 0.98 and above(shuffled) > 0.98
    with pytest.raises(UserError, match="3 texts; it needs 100"):
        fit(["a", "b", "", "c"])


def test_sample_is_read_to_a_limit():
    texts = iter(["some text"] * 10_000)
    fit(texts, max_chars=9 * 200)
    assert len(list(texts)) == 10_000 - 200


def labelled(rng, n, flips):
    """Texts whose words tell the class, and which of their labels were changed."""
    classes = ["fever cough lungs", "court judge appeal", "goal match league"]
    records, wrong = [], set()
    for index in range(n):
        k = rng.randrange(3)
        text = " ".join(rng.choices(classes[k].split(), k=3) + rng.choices(["and", "the", "of", "a", "it", "was"], k=8))
        label = k
        if rng.random() < flips:
            label = (k + rng.randrange(1, 3)) % 3
            wrong.add(index)
        records.append((text, f"class {label}", index))
    return records, wrong


def test_wrong_labels_are_found():
    records, wrong = labelled(random.Random(0), 1200, 0.1)
    found = dict(suspects(lambda: records))
    hits = wrong & set(found)
    assert len(hits) / len(wrong) > 0.9 and len(hits) / len(found) > 0.9
    word = {"class 0": "fever|cough|lungs", "class 1": "court|judge|appeal", "class 2": "goal|match|league"}
    likely = [sum(w in word[found[index]].split("|") for w in records[index][0].split()) for index in hits]
    assert np.mean(np.array(likely) == 3) > 0.95  # what is suggested is the class of the words
    assert list(found) == sorted(found)


def test_a_text_and_its_copy_do_not_vouch_for_each_other():
    """Equal keys share a fold: the wrong label of a text with many copies is found, though all copies have it."""
    records, _ = labelled(random.Random(1), 600, 0)
    copies = [("fever cough lungs fever", "class 1", 7)] * 30
    by_key = {index for index, _ in suspects(lambda: records + copies)}
    assert by_key >= set(range(600, 630))
    alone = [(text, label, n) for n, (text, label, _) in enumerate(records + copies)]
    assert not {index for index, _ in suspects(lambda: alone)} & set(range(600, 630))


def test_rare_classes_are_left_alone():
    records, _ = labelled(random.Random(2), 300, 0)
    records += [("fever cough", "rare", 1000 + n) for n in range(5)]
    found = dict(suspects(lambda: records))
    assert not set(found) & set(range(300, 305)) and "rare" not in found.values()
    with pytest.raises(UserError, match="two classes with at least 20 records each; it found 'x': 30"):
        list(suspects(lambda: [("a", "x", n) for n in range(30)]))
