"""Families of tasks: every answer by hand, and what the choice of families and the splits promise."""

import itertools

import numpy as np
import pytest

from configs import task_families as config
from vfm.data.sources import build_source
from vfm.data.task_families import CHANGES, OPERATIONS, ORDERS, OTHERS, STEPS, TaskFamilies, choose, question, related
from vfm.errors import UserError

# The parameters that are drawn stand behind the text.
ANSWERS = {
    "copy": ("cade", "cade"),
    "reverse": ("cade", "edac"),
    "rotate": ("cade", "adec"),
    "rotate_back": ("cade", "ecad"),
    "swap_ends": ("cadbe", "eadbc"),
    "swap_pairs": ("cadbe", "acbde"),
    "sort": ("cade", "acde"),
    "every_second": ("cadbe", "ab"),
    "drop_first": ("cade", "ade"),
    "drop_last": ("cade", "cad"),
    "uppercase": ("cade", "CADE"),
    "next": ("cajb", "dbkc"),
    "numbers": ("cajb", "2091"),
    "hide_vowels": ("caieb", "cxxxb"),
    "mirror": ("cajb", "hjai"),
    "dot": ("cade", "cade."),
    "star": ("cade", "*cade"),
    "dash": ("cade", "-cade"),
    "bang": ("cade", "cade!"),
    "count_letters": ("cade", "4"),
    "count_vowels": ("caaed", "3"),
    "count_words": ("ab cde", "2"),
    "count_letter": ("caaed", {"letter": "a"}, "2"),
    "has_letter": ("cade", {"letter": "b"}, "no"),
    "letter_at": ("cade", {"n": 3}, "d"),
    "earliest": ("cdbe", "b"),
    "latest": ("cdbe", "e"),
    "first_letters": ("cd be", "cb"),
    "last_letters": ("cd be", "de"),
    "join": ("cd be", "cdbe"),
    "last_word_first": ("cd bea", "bea cd"),
    "longest_word": ("cd bea", "bea"),
    "shortest_word": ("cd bea", "cd"),
    "without_repeats": ("caacd", "cad"),
    "without_letter": ("caacd", {"letter": "a"}, "ccd"),
    "replace": ("caacd", {"old": "a", "new": "b"}, "cbbcd"),
    "spell": ("cad", "c-a-d"),
    "double": ("cad", "ccaadd"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_answers(name):
    text, *parameters, answer = ANSWERS[name]
    assert OPERATIONS[name].apply(text, **(parameters[0] if parameters else {})) == answer


def test_steps_follow_one_another():
    instruction, answer = question("reverse+uppercase+dot", np.random.default_rng(0), "cade")
    assert answer == "EDAC."
    first, second, third = (OPERATIONS[name].phrasings for name in ("reverse", "uppercase", "dot"))
    said = {f"{a}, {b}{join}{c}" for a, b, join, c in itertools.product(first, second, (", ", " and "), third)}
    assert instruction in said


def test_an_instruction_means_one_thing():
    phrasings = [text for operation in OPERATIONS.values() for text in operation.phrasings]
    assert len(set(phrasings)) == len(phrasings) and len(ORDERS) + len(CHANGES) + len(OTHERS) >= 20
    assert all(len(operation.phrasings) >= 2 for operation in OPERATIONS.values())
    sizes = [len(ORDERS), *(len(STEPS[kind]) + 1 for kind in ("changes", "starts", "ends"))]
    names = related(4, {})
    assert len(set(names)) == len(names) == np.prod(sizes)
    assert {name for name in names if name.count("+") < 3} == {*related(3, {})} < {*names}


def test_families_are_drawn_and_those_of_fewer_are_among_those_of_more():
    steps = {"orders": ("copy", "reverse"), "changes": ("uppercase",), "starts": ("star",), "ends": ("dot",)}
    every = related(2, steps)
    assert set(every) == {
        *("copy", "reverse", "uppercase", "star", "dot", "reverse+uppercase", "reverse+star", "reverse+dot"),
        *("uppercase+star", "uppercase+dot", "star+dot"),
    }
    most, held = choose(8, 3, 0, 2, steps)
    assert {*most, *held} == {*every} and len(most) == 8 and all("+" in name for name in held)
    for k in range(1, 8):
        assert choose(k, 3, 0, 2, steps) == (most[:k], held)
    others = [choose(8, 3, draw, 2, steps) for draw in range(1, 5)]
    assert len({most, *(trained for trained, _ in others)}) == 5 and len({held, *(out for _, out in others)}) > 2


SMALL = {"families": 6, "held_out": 4, "sizes": {name: 200 for name in ("train", "validation", "test", "unrelated")}}


def read(split, **fields):
    source = TaskFamilies(split, **{**SMALL, **fields})
    return source, [source[i] for i in range(len(source))]


def text_of(item):
    return item["prompt"].rpartition(": ")[2].removesuffix("=")


def test_splits_share_no_text_and_the_right_families():
    found = {split: read(split) for split in ("train", "validation", "test", "unrelated")}
    trained, held = choose(6, 4, 0, 3, {})
    for split, families in (("train", trained), ("validation", trained), ("test", held), ("unrelated", tuple(OTHERS))):
        assert tuple(item["task"] for item in found[split][1][: len(families)]) == families
        assert {item["task"] for item in found[split][1]} == {*families}
    texts = [{text_of(item) for item in items} for _, items in found.values()]
    assert all(not one & other for one, other in itertools.combinations(texts, 2))
    assert len({item["prompt"] for item in found["train"][1]}) > 190
    source, items = found["train"]
    assert items[7] == source[7] == TaskFamilies("train", **SMALL)[7] != read("train", seed=1)[1][7]


def test_the_answer_is_that_of_the_instruction_and_in_controls_it_is_not_told():
    _, given = read("train")
    for item in given[:50]:
        said = item["prompt"].split(": ")[0]
        for name in item["task"].split("+"):
            assert any(phrasing in said for phrasing in OPERATIONS[name].phrasings)
    _, withheld = read("train", instruction="withheld")
    assert [item["prompt"] for item in withheld] == [f"{text_of(item)}=" for item in given]
    assert [item["answer"] for item in withheld] == [item["answer"] for item in given]
    _, shuffled = read("train", instruction="shuffled")
    assert [(text_of(item), item["answer"]) for item in shuffled] == [(text_of(i), i["answer"]) for i in given]
    same = np.mean([a["prompt"].split(": ")[0] == b["prompt"].split(": ")[0] for a, b in zip(given, shuffled)])
    assert same < 0.3


@pytest.mark.parametrize("variant", ["", "wide"])
def test_questions_fit_the_length_of_the_config(variant):
    c = config.get_config(variant)
    for split, draw in itertools.product(("train", "test", "unrelated"), (0, 1)):
        source = build_source({**c.data.source, "sizes": {split: 600}, "draw": draw, "families": 16}, split)
        longest = max(len(item["prompt"] + item["answer"]) for item in map(source.__getitem__, range(600)))
        assert longest + 2 <= c.data.length


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"families": 0}, "families=0 must be from 1 to"),
        ({"families": 300, "most_steps": 2}, "families=300 must be from 1 to"),
        ({"held_out": 0}, "held_out=0 must be from 1 to"),
        (
            {"orders": ("revers",)},
            "unknown step 'revers' in source 'task_families' .field `orders`..*did you mean 'reverse'",
        ),
        ({"instruction": "shuffle"}, "unknown instruction 'shuffle'.*did you mean 'shuffled'"),
        ({"lengths": (5, 4)}, "lengths=.5, 4. must rise"),
        ({"split": "tests"}, "unknown split 'tests'.*did you mean 'test'"),
    ],
)
def test_bad_fields_are_one_line(fields, message):
    with pytest.raises(UserError, match=message) as error:
        TaskFamilies(**{"split": "train", **fields})
    assert "\n" not in str(error.value)
