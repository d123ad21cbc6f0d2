import numpy as np
import pytest

from vfm import data
from vfm.data.interleave import Layout, Modality
from vfm.data.items import check_range
from vfm.data.pipeline import Pipeline, eval_batches
from vfm.errors import UserError

IMAGE = Modality((8, 8, 1), 1)
LAYOUT = Layout(1, {"image": IMAGE, "label": Modality((), 1, dtype="int32")})


def dataset(split="train", layout=LAYOUT, **fields):
    cfg = {"name": "items", "source": {"name": "digits"}} | fields
    return data.build(cfg, split, layout=layout, tokenizer=None)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_a_row_is_the_record_and_its_class():
    items = dataset()
    row, record = items.example(3, rng()), items.source[3]
    np.testing.assert_array_equal(row["inputs"]["image"], record["image"][None])
    assert row["inputs"]["label"].dtype == np.int32 and row["inputs"]["label"].tolist() == [record["label"]]
    assert row["label"] == record["label"]
    image_alone = dataset(modalities=("image",)).example(3, rng())
    assert set(image_alone["inputs"]) == {"image"} and image_alone["label"] == record["label"]
    batch = Pipeline(items, 4, seed=0).batch(0)
    assert batch["inputs"]["image"].shape == (4, 1, 8, 8, 1) and batch["inputs"]["label"].shape == (4, 1)
    blank = data.blank({"name": "items", "source": {"name": "digits"}}, layout=LAYOUT, tokenizer=None)
    assert {n: (a.shape, a.dtype) for n, a in blank["inputs"].items()} == {
        n: (a.shape, a.dtype) for n, a in row["inputs"].items()
    }


def test_binarization():
    how = lambda how, **rest: dataset(binarize={"image": how}, modalities=("image",), **rest)
    image = dataset().source[0]["image"]
    item = lambda items, seed: items.example(0, rng(seed))["inputs"]["image"][0]
    np.testing.assert_array_equal(item(how("threshold"), 0), image > 0.5)
    np.testing.assert_array_equal(item(how("fixed"), 0), item(how("fixed"), 1))
    drawn = how("stochastic")
    stochastic = np.stack([item(drawn, seed) for seed in range(2000)])
    assert set(np.unique(stochastic)) == {0.0, 1.0} and stochastic.dtype == np.float32
    assert np.abs(stochastic.mean(axis=0) - image).max() < 0.06  # five standard deviations of 2000 draws
    drawn, source = how("fixed"), dataset().source
    fixed = np.stack([drawn.example(i, rng())["inputs"]["image"] for i in range(300)])
    grey = np.stack([source[i]["image"] for i in range(300)])
    assert abs(fixed.mean() - grey.mean()) < 0.01
    for first, second in zip(*(eval_batches(how("stochastic", split="test"), 8, 16) for _ in range(2))):
        np.testing.assert_array_equal(first["inputs"]["image"], second["inputs"]["image"])


def test_augment_is_for_training():
    fields = {"augment": {"image": {"shift": 2}}, "modalities": ("image",)}
    train, test = dataset(**fields), dataset("test", **fields)
    image = lambda items, seed: items.example(0, rng(seed))["inputs"]["image"]
    assert any((image(train, 0) != image(train, seed)).any() for seed in range(1, 5))
    assert all((image(test, 0) == image(test, seed)).all() for seed in range(1, 5))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"modalities": ("sound",)}, "unknown modality 'sound'"),
        ({"binarize": {"image": "coin"}}, "unknown binarization 'coin'"),
        ({"binarize": {"sound": "fixed"}}, "unknown modality 'sound'.*binarize"),
        ({"ranges": {"image": (0.0, 0.5)}}, r"'image' of item 0 of the train split has numbers from 0 to 1, but must"),
        ({"classes": 3}, r"item 0 of the train split has label \d, but data.classes=3: labels are 0 to 2"),
        ({"layout": Layout(1, {"image": Modality((9, 9, 1), 1)})}, r"found an item of shape \(8, 8, 1\)"),
        ({"layout": Layout(1, {"image": IMAGE, "sound": IMAGE})}, "unknown modality 'sound' in the records"),
        ({"layout": Layout(1, {"label": IMAGE}), "source": {"name": "stdlib"}}, "gives none"),
    ],
    ids=["modality", "binarization", "binarize", "range", "classes", "shape", "missing", "labels"],
)
def test_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        dataset(**fields).example(0, rng())


def test_range():
    check_range("x", np.array([0.0, 1.0]), (0, 1))
    with pytest.raises(UserError, match=r"^x has numbers from -1 to 1, but must be within \[0, 1\]$"):
        check_range("x", np.array([-1.0, 1.0]), (0, 1))
