"""Visual sentences: what stands where, what is predicted, and that the control tells nothing."""

import numpy as np
import pytest

from vfm import data
from vfm.data import pipeline
from vfm.data.annotate import STEPS, Task, reserved
from vfm.data.interleave import Layout
from vfm.data.shapes import SHAPES, Shapes
from vfm.errors import UserError
from vfm.tokenizers import ByteTokenizer, Palette
from vfm.tokenizers.palette import SPECIAL

COLORS = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]], np.float32)
PALETTE = Palette(COLORS, (4, 4, 3))
SOURCE = {"name": "shapes", "size": 4, "colors": 5, "sizes": {"train": 40, "validation": 30, "test": 4}}
P, PAIRS = 16, 2
LENGTH = 1 + (PAIRS + 1) * (2 * P + 2)
PAD, BOS, EOS, TO, SEP = range(5)
SENTENCES = {"name": "visual_sentences", "source": SOURCE, "pairs": PAIRS, "tasks": ("recolor",)}


def make(split="train", length=LENGTH + 3, tokenizer=PALETTE, **fields):
    overrides = {name: fields.pop(name) for name in ("answer", "opened") if name in fields}
    cfg = {**SENTENCES, **fields}
    return data.build(cfg, split, layout=Layout(length), tokenizer=tokenizer, **overrides)


def row(dataset, index=0, seed=0):
    return dataset.example(index, pipeline.rng(seed, index))


def parts(row):
    """The images float[n, 4, 4, 3] and the annotations of a row with PAIRS + 1 pairs."""
    ids = row["tokens"][1:LENGTH].reshape(-1, 2 * P + 2)
    return PALETTE.decode(ids[:, :P]), PALETTE.decode(ids[:, P + 1 : -1])


def test_a_row_is_pairs_with_separators_and_the_query_comes_last():
    dataset = make()
    found = row(dataset, index=7)
    tokens = found["tokens"]
    assert tokens[0] == BOS and tokens[LENGTH:].tolist() == [PAD] * 3
    kinds = [TO if i % (2 * P + 2) == P else SEP if i % (2 * P + 2) == 2 * P + 1 else None for i in range(LENGTH - 1)]
    for token, kind in zip(tokens[1:LENGTH], kinds, strict=True):
        assert token == kind if kind else token >= len(SPECIAL)
    images, _ = parts(found)
    np.testing.assert_array_equal(images[-1], Shapes("train", 4, 5, sizes=SOURCE["sizes"])[7]["image"])
    np.testing.assert_array_equal(found["input_mask"], np.arange(LENGTH + 3) < LENGTH)


@pytest.mark.parametrize("targets", ["all", "annotations"])
def test_loss_mask_by_brute_force(targets):
    found = row(make(targets=targets))
    place, expected = 0, []  # of each token of the row: whether it is predicted
    expected.append(False)
    for _ in range(PAIRS + 1):
        expected += [targets == "all"] * (P + 1) + [True] * P + [targets == "all"]
    mask = np.zeros(LENGTH + 3)
    for place, predicted in enumerate(expected):
        if predicted:
            mask[place - 1] = 1
            assert found["targets"][place - 1] == found["tokens"][place]
    np.testing.assert_array_equal(found["loss_mask"], mask)


def test_one_task_for_all_pairs_of_a_row_and_another_for_the_next():
    dataset, orders = make(), set()
    for index in range(12):
        images, annotations = parts(row(dataset, index))
        table = {}
        for a, b in zip(images.reshape(-1, 3), annotations.reshape(-1, 3)):
            assert table.setdefault(tuple(a), tuple(b)) == tuple(b)
        assert len(set(table.values())) == len(table) and any(a != b for a, b in table.items())
        orders.add(tuple(sorted(table.items())))
    assert len(orders) > 8  # a few may be equal by chance


def test_shuffled_examples_are_of_other_images_under_other_tasks():
    """No permutation of colours explains any example, but for chance; the query stays annotated by its own task."""
    plain, shuffled = make(), make(shuffled=True)
    consistent = {False: 0, True: 0}
    for index in range(30):
        for dataset in (plain, shuffled):
            images, annotations = parts(row(dataset, index))
            for image, annotation in zip(images[:-1], annotations[:-1]):
                pairs = set(zip(map(tuple, image.reshape(-1, 3)), map(tuple, annotation.reshape(-1, 3))))
                consistent[dataset is shuffled] += len(pairs) == len({a for a, _ in pairs})
        np.testing.assert_array_equal(parts(row(plain, index))[1][-1], parts(row(shuffled, index))[1][-1])
    assert consistent[False] == 60 and consistent[True] <= 6


def test_a_prompt_ends_before_the_answer_and_examples_are_added_in_order():
    rows = [row(make(pairs=n, answer=False), index=3) for n in range(PAIRS + 1)]
    whole = row(make(), index=3)
    for n, prompt in enumerate(rows):
        used = int(prompt["input_mask"].sum())
        assert used == 1 + n * (2 * P + 2) + P + 1 and prompt["tokens"][used - 1] == TO
        assert not prompt["loss_mask"].any()
        np.testing.assert_array_equal(prompt["answer"], whole["tokens"][LENGTH - 1 - P : LENGTH - 1])
        np.testing.assert_array_equal(
            prompt["tokens"][used - P - 1 : used], whole["tokens"][LENGTH - 2 * P - 2 :][: P + 1]
        )
        np.testing.assert_array_equal(prompt["tokens"][: used - P - 1], whole["tokens"][: used - P - 1])


def test_no_image_is_twice_in_a_row():
    dataset = make(split="test", pairs=3, length=200)  # 4 images in all
    ids = row(dataset)["tokens"][1 : 1 + 4 * (2 * P + 2)].reshape(4, -1)
    source = {dataset.tokenizer.encode(dataset.source[i]["image"]).tobytes() for i in range(4)}
    assert {x[:P].astype(np.int32).tobytes() for x in ids} == source and len(source) == 4


def test_held_out_permutations_and_tasks():
    rng = np.random.default_rng(0)
    draw = lambda held_out: [Task("recolor", rng, (4, 4, 3), COLORS, held_out).steps[0][1] for _ in range(60)]
    assert not any(map(reserved, draw(False))) and all(map(reserved, draw(True)))
    assert make(held_out=("flip",)).tasks == ("recolor",)
    assert make("validation", held_out=("flip",)).tasks == ("flip",)
    assert make("validation").tasks == ("recolor",) and make("validation").held_out


def test_annotations_by_hand():
    image = np.zeros((3, 3, 1), np.float32)
    image[0, 1] = 1
    rng = np.random.default_rng(0)
    apply = lambda name: Task(name, rng, image.shape)(image)[..., 0]
    np.testing.assert_array_equal(apply("copy"), image[..., 0])
    np.testing.assert_array_equal(apply("invert"), [[1, 0, 1], [1, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(apply("dilate"), [[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(apply("dilate+invert"), [[0, 0, 0], [0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(apply("edges"), [[1, 1, 1], [1, 1, 1], [0, 0, 0]])
    places = {name: {tuple(np.argwhere(apply(name))[0]) for _ in range(60)} for name in ("flip", "rotate", "shift")}
    assert places["flip"] == {(0, 1), (2, 1)} and places["rotate"] == {(1, 0), (2, 1), (1, 2)}
    assert places["shift"] == {(i, j) for i in range(3) for j in range(3)} - {(0, 1)}
    assert all(apply(name).shape == (3, 3) for name in STEPS if name not in ("recolor", "channels"))
    colored = rng.random((2, 2, 3)).astype(np.float32)
    orders = {tuple(np.argsort(Task("channels", rng, (2, 2, 3))(colored)[0, 0])) for _ in range(60)}
    assert len(orders) == 5  # all but the one that changes nothing


def test_one_image_is_a_row_of_its_pixels():
    dataset = make(pairs=0, tasks=(), length=P + 1)
    found = row(dataset, 5)
    assert found["tokens"][0] == BOS
    np.testing.assert_array_equal(PALETTE.decode(found["tokens"][1:]), dataset.source[5]["image"])
    np.testing.assert_array_equal(found["loss_mask"], [1] * P + [0])
    np.testing.assert_array_equal(found["targets"][:P], found["tokens"][1:])
    assert dataset.labels is dataset.source.labels


def test_aligned_positions_are_those_of_the_image_for_its_annotation():
    found = row(make(aligned=True))
    positions, types = [0], [0]  # <bos>
    for pair in range(PAIRS + 1):
        first = pair * (P + 1)
        pixels = range(first + 1, first + P + 1)
        positions += [*pixels, first, *pixels, first + P + 1]  # the image, <to>, the annotation, <sep>
        types += [0] * P + [1] * (P + 1) + [0]
    np.testing.assert_array_equal(found["positions"], [*positions, 0, 0, 0])
    np.testing.assert_array_equal(found["token_types"], [*types, 0, 0, 0])


@pytest.mark.parametrize("aligned", [False, True])
def test_rows_are_those_of_blank(aligned):
    cfg = {**SENTENCES, "aligned": aligned}
    found, blank = row(make(aligned=aligned)), data.blank(cfg, layout=Layout(LENGTH + 3), tokenizer=PALETTE)
    shapes = lambda row: {
        name: (np.shape(x), np.asarray(x).dtype) for name, x in row.items() if not isinstance(x, dict)
    }
    assert shapes(found) == shapes(blank)


def test_shapes_are_what_they_say():
    source = Shapes("train", size=6, colors=4, sizes={"train": 300})
    assert len(source) == 300 and set(source.labels) == set(range(len(SHAPES)))
    images = np.stack([source[i]["image"] for i in range(300)])
    assert images.shape == (300, 6, 6, 3) and set(np.unique(images)) == {0.0, 1.0}
    assert len(np.unique(images.reshape(-1, 3), axis=0)) == 4
    assert max(len(np.unique(image.reshape(-1, 3), axis=0)) for image in images) == 3
    again = Shapes("train", 6, 4, sizes={"train": 300})
    np.testing.assert_array_equal(images, [again[i]["image"] for i in range(300)])
    assert (Shapes("test", 6, 4)[0]["image"] != images[0]).any()
    noisy = Shapes("train", 6, 4, noise=0.5, sizes={"train": 300}).images
    assert abs((noisy != source.images).mean() - 0.5 * 3 / 4) < 0.02


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tokenizer": ByteTokenizer()}, "needs a tokenizer of images"),
        ({"targets": "answers"}, "unknown targets 'answers'"),
        ({"tasks": ("recolour",)}, "did you mean 'recolor'"),
        ({"held_out": ("flip+",)}, "unknown annotation ''"),
        ({"tasks": ()}, "pairs=2 examples.*need `tasks`"),
        ({"length": LENGTH - 1}, f"are {LENGTH}, longer than config.data.length={LENGTH - 1}"),
        ({"pairs": 0, "tasks": (), "length": P}, f"an image of {P} tokens.*are {P + 1}"),
        ({"split": "test", "pairs": 4, "length": 400}, "4 examples and a query need more than the 4 images"),
        ({"source": {**SOURCE, "size": 2}}, "size=2"),
    ],
    ids=["tokenizer", "targets", "task", "held_out", "no_tasks", "length", "image", "few", "size"],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        make(**fields)


def test_recolor_needs_a_palette_and_rotate_a_square():
    with pytest.raises(UserError, match="palette"):
        Task("recolor", np.random.default_rng(0), (4, 4, 3))
    with pytest.raises(UserError, match="more than one channel"):
        Task("channels", np.random.default_rng(0), (4, 4, 1))
    with pytest.raises(UserError, match="square"):
        Task("rotate", np.random.default_rng(0), (4, 5, 3))
