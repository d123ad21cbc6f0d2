import itertools

import numpy as np
import pytest

from vfm import data
from vfm.data.interleave import Layout
from vfm.data.sources import build_source
from vfm.errors import UserError
from vfm.tokenizers import SymbolTokenizer

SPLITS = ("train", "validation", "test")


def items(split="train", **cfg):
    source = build_source(cfg, split)
    return [source[i] for i in range(len(source))]


def prompts(**cfg):
    return {split: [item["prompt"] for item in items(split, **cfg)] for split in SPLITS}


ALL = [
    {"name": "addition", "digits": 2, "examples": 4000},
    {"name": "addition", "digits": 2, "examples": 3000, "lengths": "up_to"},
    {"name": "addition", "digits": 6, "examples": 500},
    {"name": "modular", "modulus": 13},
    {"name": "modular", "modulus": 13, "operation": "/", "signs": False},
    {"name": "relations", "entities": 9},
]


@pytest.mark.parametrize("cfg", ALL, ids=lambda cfg: "-".join(map(str, cfg.values())))
def test_no_question_is_twice_in_a_split_or_in_two(cfg):
    found = prompts(**cfg)
    every = list(itertools.chain(*found.values()))
    assert len(set(every)) == len(every)
    assert all(found.values())
    assert prompts(**cfg) == found
    assert prompts(**cfg, seed=1) != found


def value(text):
    a, b = text.rstrip("=").split("+")
    return int(a) + int(b)


@pytest.mark.parametrize("lengths", ["exact", "up_to"])
@pytest.mark.parametrize("form", ["plain", "reversed", "scratchpad"])
def test_sums(form, lengths):
    found = items(name="addition", digits=3, form=form, examples=300, lengths=lengths)
    for item in found:
        total = value(item["prompt"])
        answer = item["answer"].rpartition(">")[2]
        assert answer == item["final"]
        assert int(answer[::-1] if form == "reversed" else answer) == total
        sizes = {len(part) for part in item["prompt"].rstrip("=").split("+")}
        assert sizes == {3} if lengths == "exact" else item["task"] == f"{max(sizes)}_digits"
    if lengths == "up_to":
        assert {item["task"] for item in found} == {"1_digits", "2_digits", "3_digits"}


def test_every_step_of_a_scratchpad_is_right():
    for item in items(name="addition", digits=4, form="scratchpad", examples=200, lengths="up_to"):
        a, b = item["prompt"].rstrip("=").split("+")
        steps, _, total = item["answer"].partition(">")
        carry, digits = 0, ""
        for place, step in enumerate(steps.split(",")):
            x, y = (int(number[::-1][place]) if place < len(number) else 0 for number in (a, b))
            left, _, right = step.partition("=")
            assert left == f"{x}+{y}+{carry}" and int(right) == x + y + carry and len(right) == 2
            carry, digits = int(right[0]), right[1] + digits
        assert int(f"{carry}{digits}") == int(total) == int(a) + int(b)


def test_forms_share_their_questions_and_fewer_examples_are_the_first_of_more():
    cfg = {"name": "addition", "digits": 3, "examples": 700}
    plain = prompts(**cfg)
    assert prompts(**cfg, form="scratchpad") == plain
    more = prompts(**{**cfg, "examples": 5000})
    assert more["train"][:700] == plain["train"] and more["test"] == plain["test"]
    assert len(more["train"]) == 5000 and len(more["test"]) == 1000 and len(more["validation"]) == 500


def test_the_table_modulo_p():
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for name, operation in operations.items():
        cfg = {"name": "modular", "modulus": 11, "operation": name}
        every = list(itertools.chain(*(items(split, **cfg) for split in SPLITS)))
        assert len(every) == 121
        for item in every:
            a, sign, b, equals = item["prompt"].split()
            assert (sign, equals) == (name, "=") and int(item["answer"]) == operation(int(a), int(b)) % 11
    for item in items(name="modular", modulus=11, operation="/", signs=False):
        a, b = map(int, item["prompt"].split())
        assert int(item["answer"]) * b % 11 == a
    part = {"train": 0.3, "validation": 0.2, "test": 0.5}
    sizes = {split: len(items(split, name="modular", modulus=11, fractions=part)) for split in SPLITS}
    assert sizes == {"train": 36, "validation": 24, "test": 61}


@pytest.mark.parametrize("chain", [False, True])
def test_relations(chain):
    cfg = {"name": "relations", "entities": 12, "chain": chain, "repeat": 2}
    train = items(**cfg)
    one = [item for item in train if item["task"] == "one_hop"]
    facts = {item["prompt"]: item["answer"] for item in one}
    assert len(facts) == 12 * 4 and len(one) == 2 * len(facts)
    for relation in ("father", "mother", "friend", "neighbour"):
        assert {facts[f"{i} {relation} ="] for i in range(12)} == {str(i) for i in range(12)}
    for item in (*train, *items("validation", **cfg), *items("test", **cfg)):
        if item["task"] == "two_hop":
            start, first, second, _ = item["prompt"].split()
            middle = facts[f"{start} {first} ="]
            end = facts[f"{middle} {second} ="]
            assert item["final"] == end and item["answer"] == (f"{middle} > {end}" if chain else end)
    for split in ("validation", "test"):
        assert {item["task"] for item in items(split, **cfg)} == {"two_hop"}


def test_pairs_of_relations_that_are_never_chained():
    cfg = {"name": "relations", "entities": 12, "unchained": 0.5}
    pair = lambda item: tuple(item["prompt"].split()[1:-1])
    of_task = lambda found, task: [item for item in found if item["task"] == task]
    direct, chain, both = (
        {split: items(split, **cfg, **fields) for split in ("train", "validation", "test")}
        for fields in ({}, {"chain": True}, {"chain": True, "both": True})
    )
    never = {pair(item) for item in direct["test"]}
    assert len(never) == 8 and never == {pair(item) for item in chain["validation"]}
    # All ask the same, and with `both` directly.
    for split in ("validation", "test"):
        assert direct[split] == both[split]
        assert [item["prompt"] for item in direct[split]] == [item["prompt"] for item in chain[split]]
        assert all(" > " in item["answer"] for item in chain[split])
    # Training: all pairs directly, the others with a chain.
    assert {pair(item) for item in of_task(direct["train"], "two_hop")} > never
    assert of_task(both["train"], "two_hop") == of_task(direct["train"], "two_hop")
    for chained in (of_task(both["train"], "two_hop_chain"), of_task(chain["train"], "two_hop")):
        assert not {pair(item) for item in chained} & never and len({pair(item) for item in chained}) == 8
        assert all(" > " in item["answer"] for item in chained)
    assert len(of_task(both["train"], "one_hop")) == 12 * 4
    assert {pair(item) for item in items("test", **{**cfg, "unchained": 0.0})} > never


def test_they_are_rows_with_the_tokenizers_of_their_symbols():
    digits = SymbolTokenizer(symbols="0123456789+=,>\n")
    words = SymbolTokenizer(
        numbers=13, symbols=("+", "=", ">", "father", "mother", "friend", "neighbour"), separator=" "
    )
    forms = [{"name": "addition", "digits": 3, "form": form, "examples": 50} for form in ("plain", "scratchpad")]
    others = [{"name": "modular", "modulus": 13}, {"name": "relations", "entities": 13, "chain": True}]
    for tokenizer, cfg in [(digits, cfg) for cfg in forms] + [(words, cfg) for cfg in others]:
        dataset = data.build({"name": "questions", "source": cfg}, "test", layout=Layout(48), tokenizer=tokenizer)
        row, item = dataset.example(0), dataset.items[0]
        assert tokenizer.decode(row["targets"][row["loss_mask"] > 0]) == item["answer"]
        assert (
            np.count_nonzero(row["input_mask"])
            == len(tokenizer.encode(item["prompt"])) + len(tokenizer.encode(item["answer"])) + 2
        )


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"name": "addition", "digits": 1}, "11500 questions .* of the 100 with 1 digit"),
        ({"name": "addition", "form": "revresed"}, "did you mean 'reversed'"),
        ({"name": "addition", "lengths": "any"}, "unknown lengths 'any'"),
        ({"name": "addition", "digits": 0}, "digits=0"),
        ({"name": "modular", "modulus": 15}, "modulus=15 must be a prime"),
        ({"name": "modular", "operation": "**"}, "unknown operation"),
        ({"name": "modular", "fractions": {"train": 0.9, "test": 0.2}}, "at most 1 together"),
        ({"name": "relations", "entities": 1}, "entities=1"),
        ({"name": "relations", "unchained": 1.0}, "unchained=1.0 of 16 pairs .* not all"),
        ({"name": "relations", "unchained": 0.03}, "unchained=0.03 of 16 pairs .* at least one"),
        ({"name": "relations", "both": True}, "both=True needs chain=True"),
    ],
    ids=str,
)
def test_refusals(cfg, message):
    with pytest.raises(UserError, match=message):
        build_source(cfg, "train")
