"""Images as published models take them."""

import pathlib

import numpy as np
import pytest

from vfm.data.image import preprocess
from vfm.errors import UserError

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions" / "image_preprocessing"


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
@pytest.mark.parametrize("style, size", [("clip", 28), ("vit", 24)])
def test_equals_the_processors_of_transformers(style, size):
    io = np.load(FIXTURE / "io.npz")
    for number in range(3):
        found = preprocess(io[f"in/img{number}"], size, style)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, io[f"out/{style}_{number}"].transpose(1, 2, 0), atol=1e-5)


def test_the_middle_is_cut_out_only_in_clip():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    middle = preprocess(image, 10, "clip")
    assert middle.shape == (10, 10, 3) and np.ptp(middle, axis=(0, 1)).max() == 0 and middle.min() > 1
    whole = preprocess(image, 10, "siglip")
    assert whole.shape == (10, 10, 3) and whole[:, 0].max() == -1 and whole[:, 5].min() == 1


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4, 1), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_image_of_bytes_is_refused(image):
    with pytest.raises(UserError, match=r"preprocess takes an image uint8\[H, W, 3\], not"):
        preprocess(image, 8)


def test_an_unknown_style_is_refused():
    with pytest.raises(UserError, match="unknown style 'clips'.*did you mean 'clip'"):
        preprocess(np.zeros((4, 4, 3), np.uint8), 8, "clips")
