import numpy as np
import pytest

from vfm import data
from vfm.data.interleave import Layout
from vfm.errors import UserError
from vfm.tokenizers import SymbolTokenizer

TOKENIZER = SymbolTokenizer(symbols="0123456789+=\n")


class Sums:
    """a + b for one digit a and b; the splits take turns."""

    labels = None

    def __init__(self, split: str, tasks: bool = False, size: int = 30, times: int = 1):
        place = ("train", "validation", "test").index(split)
        self.pairs = [divmod(i, 10) for i in range(100) if i % 3 == place][:size]
        self.tasks, self.times = tasks, times

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        a, b = self.pairs[index]
        item = {"prompt": f"{a}+{b}=", "answer": str(a + b) * self.times}
        return item | ({"task": "even" if a % 2 == 0 else "odd"} if self.tasks else {})


SOURCE = {"name": f"{__name__}.Sums"}


def build(split="train", length=10, **fields):
    cfg = {"name": "questions", "source": SOURCE, **fields}
    return data.build(cfg, split, layout=Layout(length), tokenizer=TOKENIZER)


def text(ids):
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize("loss", ["answer", "all"])
def test_a_row_and_where_its_loss_is(loss):
    dataset = build(loss=loss)
    for index in range(len(dataset)):
        item, row = dataset.items[index], dataset.example(index)
        ids = [1, *TOKENIZER.encode(item["prompt"] + item["answer"]), 2]
        assert row["tokens"][row["input_mask"]].tolist() == ids
        assert (row["tokens"][~row["input_mask"]] == TOKENIZER.pad_id).all()
        kept = row["targets"][row["loss_mask"] > 0].tolist()
        wanted = item["answer"] if loss == "answer" else item["prompt"] + item["answer"]
        assert kept == [*TOKENIZER.encode(wanted), 2]
        # Each of them is the token behind its place.
        at = np.flatnonzero(row["loss_mask"])
        np.testing.assert_array_equal(row["tokens"][at + 1], row["targets"][at])


class Repeated(Sums):
    """Each question three times, as one task and as another."""

    def __len__(self):
        return 3 * len(self.pairs)

    def __getitem__(self, index):
        item = super().__getitem__(index % len(self.pairs))
        return item | {"task": f"t{index // len(self.pairs)}"}


@pytest.mark.parametrize("tasks", [False, True])
def test_a_question_never_stands_solved_in_front_of_itself(tasks):
    source = {"name": f"{__name__}.Repeated", "size": 4}
    dataset = build(source=source, shots=3, shots_tasks=tasks, length=32)
    for index in range(12):
        for seed in range(5):
            row = dataset.example(index, np.random.default_rng(seed))
            *shown, asked = text(row["tokens"][row["input_mask"]]).split("\n")
            assert len(shown) == 3 and asked.split("=")[0] not in {line.split("=")[0] for line in shown}
    with pytest.raises(UserError, match="needs more than 4 examples"):
        build(source=source, shots=4, shots_tasks=True, length=40)
    with pytest.raises(UserError, match="needs more than 10 examples .* it has 10"):
        build(source=source, shots=10, length=80)


def test_blank_is_a_row():
    cfg = {"name": "questions", "source": SOURCE}
    blank, row = data.blank(cfg, layout=Layout(10), tokenizer=TOKENIZER), build().example(0)
    assert blank.keys() == row.keys()
    assert all(blank[key].shape == row[key].shape for key in ("tokens", "targets", "loss_mask", "input_mask"))


def test_shots_are_solved_examples_of_the_training_split_and_never_the_question():
    dataset = build(length=40, shots=4)
    known = {item["prompt"] + item["answer"] for item in dataset.items}
    seen = set()
    for index in range(len(dataset)):
        row = dataset.example(index, np.random.default_rng(index))
        *shots, question = text(row["tokens"]).split("\n")
        assert len(set(shots)) == 4 and question not in shots and {*shots, question} <= known
        assert text(row["targets"][row["loss_mask"] > 0]) == dataset.items[index]["answer"]
        seen |= {*shots}
    assert len(seen) > 20
    one, two = (dataset.example(3, np.random.default_rng(0))["tokens"] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    test = build("test", length=40, shots=4)
    *shots, _ = text(test.example(0, np.random.default_rng(0))["tokens"]).split("\n")
    assert {*shots} <= known


def test_shots_of_the_task_alone():
    dataset = build(length=40, shots=3, shots_tasks=True, source={**SOURCE, "tasks": True})
    for index in range(len(dataset)):
        parts = text(dataset.example(index, np.random.default_rng(index))["tokens"]).split("\n")
        assert len({int(part[0]) % 2 for part in parts}) == 1


def test_answers_may_be_as_long_as_those_that_are_shown():
    assert build(length=40).longest_answer == 3
    shown = build("test", length=40, shots=2, shots_source={**SOURCE, "times": 4})
    assert shown.longest_answer == 9 and shown.longest_prompt == 1 + 2 * (4 + 8 + 1) + 4
    row = shown.example(0, np.random.default_rng(0))
    *shots, question = text(row["tokens"]).split("\n")
    assert all(shot.split("=")[1] == str(sum(map(int, shot.split("=")[0].split("+")))) * 4 for shot in shots)
    assert question == shown.items[0]["prompt"] + shown.items[0]["answer"]


def test_a_source_without_questions():
    with pytest.raises(UserError, match="source 'digits' gives image, label, no 'prompt'"):
        build(source={"name": "digits"})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"length": 7}, r"longest row of the train split has 8 tokens .*'3\+9='.*config.data.length"),
        ({"length": 10, "shots": 1}, r"has 15 tokens .* and 7 of 1 solved example"),
        ({"length": 400, "shots": 30}, "needs more than 30 examples in the split 'train'; it has 30"),
        ({"shots": -1}, "shots=-1"),
        ({"loss": "anser"}, "did you mean 'answer'"),
    ],
    ids=["too long", "too long with shots", "too few", "shots", "loss"],
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)
