import itertools

import numpy as np
import pytest

from vfm.data.interleave import Carry, Input, Layout, Modality, Output, Text, interleave
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()
A, B = TOKENIZER.encode("ab")
LAYOUT = Layout(12, {"image": Modality((2, 2, 1), 3, 2, items=2), "audio": Modality((4,), 2)})
IMAGE, AUDIO = np.ones((2, 2, 1), np.float32), np.arange(4, dtype=np.float32)


def test_input_then_answer_against_hand_written_arrays():
    row = interleave([Text([1]), Input("image", IMAGE), Text("ab", target=True), Text([2], True)], LAYOUT, TOKENIZER)
    np.testing.assert_array_equal(row["tokens"], [1, 0, 0, 0, A, B, 2, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["targets"], [0, 0, 0, A, B, 2, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["loss_mask"], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["input_mask"], [1] * 7 + [0] * 5)
    np.testing.assert_array_equal(row["starts"]["image"], [1, -1])
    np.testing.assert_array_equal(row["signal_starts"]["image"], [-1, -1])
    np.testing.assert_array_equal(row["inputs"]["image"], np.stack([IMAGE, 0 * IMAGE]))
    np.testing.assert_array_equal(row["starts"]["audio"], [-1])
    np.testing.assert_array_equal(row["inputs"]["audio"], np.zeros((1, 4)))
    kinds = {key: row[key].dtype for key in ("tokens", "targets", "loss_mask", "input_mask")}
    assert kinds == {"tokens": np.int32, "targets": np.int32, "loss_mask": np.float32, "input_mask": bool}
    assert row["inputs"]["audio"].dtype == np.float32 and row["starts"]["audio"].dtype == np.int32


def test_output_takes_signal_positions_and_text_is_context():
    row = interleave([Text("ab"), Output("image", IMAGE), Text("b")], LAYOUT, TOKENIZER)
    np.testing.assert_array_equal(row["tokens"], [A, B, 0, 0, B, 0, 0, 0, 0, 0, 0, 0])
    assert row["loss_mask"].sum() == 0 and row["input_mask"].sum() == 5
    np.testing.assert_array_equal(row["signal_starts"]["image"], [2, -1])
    np.testing.assert_array_equal(row["starts"]["image"], [-1, -1])
    np.testing.assert_array_equal(row["inputs"]["image"][0], IMAGE)
    blind = interleave([Text("ab"), Output("image"), Text("b")], LAYOUT, TOKENIZER)
    assert blind["inputs"]["image"].sum() == 0
    np.testing.assert_array_equal(blind["signal_starts"]["image"], [2, -1])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order_of_modalities(order):
    other = 2 * IMAGE
    segments = [Text("ab"), Input("image", IMAGE), Input("audio", AUDIO), Input("image", other)]
    sizes, starts, at = [2, 3, 2, 3], {}, 0
    for k in order:
        starts[k], at = at, at + sizes[k]
    row = interleave([segments[k] for k in order], LAYOUT, TOKENIZER)
    first, second = sorted((1, 3), key=lambda k: starts[k])
    np.testing.assert_array_equal(row["starts"]["image"], [starts[first], starts[second]])
    np.testing.assert_array_equal(row["inputs"]["image"][0], IMAGE if first == 1 else other)
    assert row["starts"]["audio"][0] == starts[2]
    np.testing.assert_array_equal(row["tokens"][starts[0] : starts[0] + 2], [A, B])
    assert row["input_mask"].sum() == 10


def test_the_same_object_as_input_and_output_is_one_item_and_a_copy_is_two():
    row = interleave([Input("image", IMAGE), Output("image", IMAGE)], LAYOUT, TOKENIZER)
    assert (row["starts"]["image"][0], row["signal_starts"]["image"][0]) == (0, 3)
    row = interleave([Input("image", IMAGE), Output("image", IMAGE.copy())], LAYOUT, TOKENIZER)
    np.testing.assert_array_equal(row["starts"]["image"], [0, -1])
    np.testing.assert_array_equal(row["signal_starts"]["image"], [-1, 3])


def test_carried_item_takes_no_position():
    row = interleave([Carry("audio", AUDIO), Text("a", target=True), Text("b", target=True)], LAYOUT, TOKENIZER)
    np.testing.assert_array_equal(row["inputs"]["audio"][0], AUDIO)
    assert row["starts"]["audio"][0] == row["signal_starts"]["audio"][0] == -1
    # The first token opens the row: there is no position before it to predict it from.
    np.testing.assert_array_equal(row["loss_mask"][:3], [1, 0, 0])
    assert row["input_mask"].sum() == 2


@pytest.mark.parametrize(
    "segments, words",
    [
        ([Input("image", np.ones((2, 2)))], ("'image'", "(2, 2)", "rank 2", "(2, 2, 1)", "rank 3")),
        ([Input("image", np.ones((3, 2, 1)))], ("'image'", "(3, 2, 1)", "size=(2, 2) of a source of images")),
        ([Input("audio", np.ones(5))], ("'audio'", "(5,)", "(4,)")),
        ([Input("imagee", IMAGE)], ("'imagee'", "did you mean 'image'", "audio")),
        ([Output("audio", AUDIO)], ("'audio'", "generated", "signals=0")),
        ([Input("audio", AUDIO), Input("audio", AUDIO + 1)], ("'audio'", "items=1")),
        ([Input("image", IMAGE), Input("image", IMAGE)], ("'image'", "twice")),
        ([Text("a" * 9), Input("image", IMAGE), Text("a")], ("13", "text 10", "image 3", "12")),
    ],
)
def test_what_does_not_fit_is_named(segments, words):
    with pytest.raises(UserError) as error:
        interleave(segments, LAYOUT, TOKENIZER)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_full_row_fits():
    row = interleave([Text("a" * 12, target=True)], LAYOUT, TOKENIZER)
    assert row["loss_mask"].sum() == 11 and row["input_mask"].all()
