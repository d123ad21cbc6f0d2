import numpy as np
import pytest

from vfm.data import build
from vfm.data.interleave import Layout, Modality
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<text>", "<image>", "<audio>", "<vector>")
TOKENIZER = ByteTokenizer(SPECIAL)
SAMPLES = 800
LAYOUT = Layout(48, {"image": Modality((8, 8, 1), 4, 3), "audio": Modality((SAMPLES,), 5, 2)})
CFG = {
    "name": "pairs",
    "sources": {"image": {"name": "digits"}, "audio": {"name": "dtmf", "duration": 0.1, "tone": (0.1, 0.1)}},
    "words": WORDS,
    "tasks": ("image->text", "text->image", "image+audio+text->text"),
    "question": "which?",
}


def rng(seed=0):
    return np.random.default_rng(seed)


def make(split="validation", layout=LAYOUT, tokenizer=TOKENIZER, change=None, **overrides):
    return build(CFG | (change or {}), split, layout=layout, tokenizer=tokenizer, **overrides)


def ids(text):
    return TOKENIZER.encode(text)


def test_to_text():
    dataset = make(task="image->text")
    row = dataset.example(3, rng())
    word = ids(WORDS[row["label"]])
    marker = TOKENIZER.token_id("<text>")
    wanted = [1, 0, 0, 0, 0, marker, *word, 2]
    np.testing.assert_array_equal(row["tokens"][: len(wanted)], wanted)
    assert row["input_mask"].sum() == len(wanted) and row["starts"]["image"][0] == 1
    at = np.flatnonzero(row["loss_mask"])
    np.testing.assert_array_equal(at, np.arange(5, 5 + len(word) + 1))
    np.testing.assert_array_equal(row["targets"][at], [*word, 2])
    np.testing.assert_array_equal(row["inputs"]["image"][0], dataset.sources["image"][3]["image"])
    assert row["label"] == dataset.sources["image"].labels[3] and row["label"].dtype == np.int32
    # The audio of the row is there, but has no place in the sequence.
    assert np.abs(row["inputs"]["audio"]).max() > 0
    assert row["starts"]["audio"][0] == row["signal_starts"]["audio"][0] == -1


def test_from_text():
    row = make(task="text->image").example(5, rng())
    word, marker = ids(WORDS[row["label"]]), TOKENIZER.token_id("<image>")
    wanted = [1, *word, marker, 0, 0, 0]
    np.testing.assert_array_equal(row["tokens"][: len(wanted)], wanted)
    assert row["signal_starts"]["image"][0] == 2 + len(word) and row["starts"]["image"][0] == -1
    assert row["loss_mask"].sum() == 0 and row["input_mask"].sum() == len(wanted)
    assert row["inputs"]["image"].max() > 0


def test_mixed_input_has_the_question_and_not_the_word():
    row = make(task="image+audio+text->text").example(5, rng())
    wanted = [1, *[0] * 9, *ids("which?"), TOKENIZER.token_id("<text>"), *ids(WORDS[row["label"]]), 2]
    np.testing.assert_array_equal(row["tokens"][: len(wanted)], wanted)
    assert (row["starts"]["image"][0], row["starts"]["audio"][0]) == (1, 5)


def test_partners_have_the_label_of_the_anchor():
    dataset = make(task="image+audio->text")
    audio = {
        array["audio"].tobytes(): array["label"] for array in map(dataset.sources["audio"].__getitem__, range(500))
    }
    partners = {dataset.example(index, rng(index))["inputs"]["audio"][0].tobytes() for index in range(60)}
    assert len(partners) > 40  # many different ones
    for index in range(60):
        row = dataset.example(index, rng(index))
        assert audio[row["inputs"]["audio"][0].tobytes()] == row["label"]


def test_order_of_inputs_is_random_in_training_and_fixed_in_evaluation():
    order = lambda row: tuple(sorted(("image", "audio"), key=lambda m: row["starts"][m][0]))
    count = lambda dataset: {order(dataset.example(1, rng(seed))) for seed in range(20)}
    assert count(make("train", task="audio+image->text")) == {("audio", "image"), ("image", "audio")}
    assert count(make("test", task="audio+image->text")) == {("audio", "image")}
    assert count(make("train", task="audio+image->text", train=False)) == {("audio", "image")}
    fixed = make("train", change={"shuffle_inputs": False}, task="audio+image->text")
    assert count(fixed) == {("audio", "image")}


def test_augmentation_is_for_training_only():
    change = {"augment": {"image": {"shift": 1}}}
    for split, expected in (("train", True), ("test", False)):
        dataset = make(split, change=change, task="image->text")
        raw = dataset.sources["image"][0]["image"]
        moved = [not np.array_equal(dataset.example(0, rng(s))["inputs"]["image"][0], raw) for s in range(20)]
        assert any(moved) == expected and not all(moved)


def test_tasks_are_drawn_by_weight():
    dataset = make(change={"weights": (1.0, 3.0, 0.0)})
    from_text = [dataset.example(0, rng(s))["signal_starts"]["image"][0] >= 0 for s in range(800)]
    assert 0.70 < np.mean(from_text) < 0.80
    assert all(dataset.example(0, rng(s))["starts"]["audio"][0] < 0 for s in range(100))


@pytest.mark.parametrize("task", ["image->text", "text->image", "image+audio+text->text", "audio->image"])
def test_prompt_is_the_row_without_its_answer(task):
    change = {"augment": {"image": {"shift": 1}, "audio": {"gain_db": 3.0}}}
    dataset = make("train", change=change, task=task)
    blank = make("train", change=change, task=task, answer=False)
    for index in range(10):
        full, prompt = dataset.example(index, rng(index)), dataset.prompt(index, task, rng(index))
        assert prompt["word"] == WORDS[prompt["label"]] and prompt["label"] == full["label"]
        used = prompt["input_mask"].sum()
        np.testing.assert_array_equal(prompt["tokens"][:used], full["tokens"][:used])
        assert (prompt["tokens"][used:] == 0).all() and prompt["loss_mask"].sum() == 0
        for modality in ("image", "audio"):
            np.testing.assert_array_equal(prompt["starts"][modality], full["starts"][modality])
            np.testing.assert_array_equal(prompt["signal_starts"][modality], full["signal_starts"][modality])
            read = prompt["starts"][modality][0] >= 0
            wanted = full["inputs"][modality] if read else 0 * full["inputs"][modality]
            np.testing.assert_array_equal(prompt["inputs"][modality], wanted)
        blind = blank.example(index, rng(index))
        np.testing.assert_array_equal(blind["tokens"], prompt["tokens"])
        np.testing.assert_array_equal(blind["inputs"]["audio"], prompt["inputs"]["audio"])


def test_reading_and_writing_the_same_modality_shares_the_item():
    row = make("train", change={"augment": {"image": {"shift": 1}}}, task="image->image").example(0, rng())
    assert row["starts"]["image"][0] == 1 and row["signal_starts"]["image"][0] == 6
    assert row["inputs"]["image"].shape == (1, 8, 8, 1)


def test_a_further_modality_needs_no_code(tmp_path):
    labels = np.arange(50) % 10
    np.savez(tmp_path / "v.npz", x=np.eye(10)[labels], label=labels)
    sources = CFG["sources"] | {
        "vector": {"name": "npz", "paths": {"test": str(tmp_path / "v.npz")}, "arrays": {"x": "x"}}
    }
    layout = Layout(48, dict(LAYOUT.modalities) | {"vector": Modality((10,), 1, 1)})
    change = {"sources": sources, "tasks": ("vector+image->text", "text->vector")}
    row = make("test", layout, change=change, task="vector+image->text").example(2, rng())
    assert row["inputs"]["vector"][0].argmax() == row["label"] and row["starts"]["vector"][0] == 1
    row = make("test", layout, change=change, task="text->vector").example(2, rng())
    assert row["signal_starts"]["vector"][0] > 0


def test_task_split():
    from vfm.data.pairs import Task

    assert Task.split(" image + text -> audio ") == (("image", "text"), "audio")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tasks": ("vector->text",)}, ("'vector'", "vector->text", "audio, image, text")),
        ({"tasks": ("image-text",)}, ("'image-text'", "a+b->c")),
        ({"tasks": ("image->text->audio",)}, ("a+b->c",)),
        ({"tasks": ("image+image->text",)}, ("twice",)),
        ({"tasks": ("text->text",)}, ("nothing to read",)),
        ({"tasks": ()}, ("no task",)),
        ({"weights": (1.0,)}, ("weights", "3 task")),
        ({"words": WORDS[:9]}, ("label 9", "9 classes")),
        ({"anchor": "imgae"}, ("'imgae'", "did you mean 'image'")),
        ({"sources": {"picture": {"name": "digits"}}}, ("'picture'", "layout")),
        ({"sources": CFG["sources"] | {"audio": {"name": "stdlib"}}}, ("'audio'", "no labels")),
        (
            {"sources": CFG["sources"] | {"audio": {"name": "dtmf", "sizes": {"validation": 5}}}},
            ("'audio'", "no item"),
        ),
        ({"question": "w" * 60}, ("image+audio+text->text", "48", "longer")),
        ({"taks": ()}, ("'taks'", "did you mean 'tasks'")),
        ({"augment": {"image": {"shitf": 1}}}, ("did you mean 'shift'",)),
    ],
)
def test_bad_configs_are_told_in_one_line(change, words):
    with pytest.raises(UserError) as error:
        make(change=change)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_missing_marker_and_wrong_shape():
    with pytest.raises(UserError, match="<image>.*special"):
        make(tokenizer=ByteTokenizer(SPECIAL[:4]))
    with pytest.raises(UserError, match=r"'image'.*\(8, 8, 1\).*\(28, 28, 1\)"):
        layout = Layout(48, dict(LAYOUT.modalities) | {"image": Modality((28, 28, 1), 4, 3)})
        make(layout=layout).example(0, rng())
