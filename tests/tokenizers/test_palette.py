"""Palettes: k-means that always gives the same colours, and images that come back."""

import numpy as np
import pytest

from vfm import tokenizers
from vfm.errors import UserError
from vfm.tokenizers.palette import SPECIAL, Palette, kmeans, nearest, train_palette

OFFSET = len(SPECIAL)


def images(n=20, shape=(4, 5, 3), seed=0):
    return np.random.default_rng(seed).random((n, *shape)).astype(np.float32)


def test_kmeans_finds_clusters_that_are_there_and_is_a_fixed_point():
    rng = np.random.default_rng(0)
    truth = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]], np.float64)
    points = np.repeat(truth, 50, axis=0) + rng.normal(0, 0.02, (200, 3))
    centres = kmeans(points, 4)
    np.testing.assert_allclose(centres, np.round(centres), atol=0.02)
    assert set(map(tuple, np.round(centres))) == set(map(tuple, truth))
    points = np.random.default_rng(1).random((500, 2))
    centres, belongs = kmeans(points, 7), nearest(points, kmeans(points, 7))
    np.testing.assert_allclose(centres, [points[belongs == k].mean(axis=0) for k in range(7)], atol=1e-6)


def test_the_same_images_give_the_same_palette_whatever_their_order():
    first = train_palette(images(), vocab_size=OFFSET + 9)
    again = train_palette(images()[::-1], vocab_size=OFFSET + 9)
    assert first.num_codes == 9 and first.vocab_size == OFFSET + 9
    np.testing.assert_array_equal(first.colors, again.colors)
    assert (train_palette(images(seed=1), vocab_size=OFFSET + 9).colors != first.colors).any()


def test_equal_points_weigh_as_often_as_they_are_there():
    points = np.array([[0.0]] * 9 + [[1.0]] + [[10.0]] * 5)
    np.testing.assert_allclose(kmeans(points, 2), [[0.1], [10.0]], atol=1e-6)


def test_round_trip_of_few_colours_is_exact_and_of_many_takes_the_nearest():
    few = np.random.default_rng(0).choice([0.0, 0.25, 1.0], (6, 4, 4, 1)).astype(np.float32)
    palette = train_palette(few, vocab_size=OFFSET + 16)
    np.testing.assert_array_equal(palette.colors[:, 0], [0, 0.25, 1])  # no more than there are
    ids = palette.encode(few.reshape(2, 3, 4, 4, 1))
    assert ids.shape == (2, 3, 16) and ids.dtype == np.int32 and ids.min() == OFFSET
    np.testing.assert_array_equal(palette.decode(ids), few.reshape(2, 3, 4, 4, 1))
    np.testing.assert_array_equal(ids[0, 0], [OFFSET + [0, 0.25, 1].index(v) for v in few[0].ravel()])  # raster order
    many = images()
    palette = train_palette(many, vocab_size=OFFSET + 8)
    found, distance = palette.decode(palette.encode(many)), lambda c: np.square(many - c).sum(axis=-1)
    best = np.min([distance(color) for color in palette.colors], axis=0)
    np.testing.assert_allclose(np.square(many - found).sum(axis=-1), best, atol=1e-6)


def test_saved_and_loaded_as_other_tokenizers(tmp_path):
    palette = train_palette(images(), vocab_size=OFFSET + 8)
    tokenizers.save(tmp_path, palette)
    for found in (
        tokenizers.load(tmp_path),
        tokenizers.build({"name": "file", "path": str(tmp_path)}),
        tokenizers.build({"name": "palette", "path": str(tmp_path), "vocab_size": OFFSET + 8}),
    ):
        np.testing.assert_array_equal(found.colors, palette.colors)
        assert (found.item_shape, found.special) == (palette.item_shape, palette.special)
    cfg = {"name": "palette", "vocab_size": OFFSET + 8, "path": ""}
    assert tokenizers.untrained(cfg) and tokenizers.reads(cfg) == "image"
    np.testing.assert_array_equal(tokenizers.train_config(cfg, images()).colors, palette.colors)


def test_an_id_means_its_special_token_or_colour():
    palette = Palette(np.array([[0.0], [1.0]]), (2, 2, 1))
    assert palette.decode_bytes([1]) == b"<bos>"
    assert palette.decode_bytes([OFFSET + 1]) == np.float32(1).tobytes()
    assert (palette.pad_id, palette.token_id("<sep>")) == (0, SPECIAL.index("<sep>"))


@pytest.mark.parametrize(
    "fails, words",
    [
        (lambda p: p.encode(np.zeros((3, 3, 1))), "shape .2, 2, 1., not .3, 3, 1."),
        (lambda p: p.decode([OFFSET, OFFSET, OFFSET]), "4 tokens"),
        (lambda p: p.decode([OFFSET, OFFSET, OFFSET, 2]), "id 2 is no code"),
        (lambda p: p.decode([OFFSET, OFFSET + 2, OFFSET, OFFSET]), f"id {OFFSET + 2} is no code.*{OFFSET} to"),
        (lambda p: p.token_id("<seq>"), "did you mean '<sep>'"),
        (lambda p: Palette(p.colors, (2, 2, 3)), "do not fit"),
        (lambda p: Palette(p.colors, (2, 2, 1), ("<pad>", "<eos>", "<bos>")), "must begin with"),
        (lambda p: train_palette([], vocab_size=9), "the source has none"),
        (lambda p: train_palette(images(), vocab_size=OFFSET), "no room for colours"),
        (lambda p: train_palette([np.zeros((2, 2, 1)), np.zeros((2, 3, 1))], vocab_size=9), "one shape"),
        (lambda p: tokenizers.build({"name": "palette"}), "neither `path`"),
    ],
    ids=["encode", "length", "special", "code", "token", "channels", "order", "empty", "room", "shapes", "path"],
)
def test_what_does_not_fit_is_refused(fails, words):
    with pytest.raises(UserError, match=words):
        fails(Palette(np.array([[0.0], [1.0]]), (2, 2, 1)))


def test_a_damaged_file_and_another_palette_are_refused(tmp_path):
    tokenizers.save(tmp_path, Palette(np.array([[0.0], [1.0]]), (2, 2, 1)))
    with pytest.raises(UserError, match="has 7 ids"):
        tokenizers.build({"name": "palette", "path": str(tmp_path), "vocab_size": 9})
    (tmp_path / "palette.json").write_text("{")
    with pytest.raises(UserError, match=r"palette.json.*cannot be read"):
        tokenizers.load(tmp_path)
