import numpy as np
import pytest

from vfm.data import augment
from vfm.errors import UserError


def test_shift_moves_whole_places_and_fills_with_zero():
    image = np.zeros((5, 5, 1), np.float32)
    image[2, 2, 0] = 1
    seen = set()
    for seed in range(200):
        out = augment.apply(image, np.random.default_rng(seed), {"shift": 1})
        assert out.shape == image.shape and out.dtype == np.float32 and out.sum() == 1
        seen.add(tuple(int(v) for v in np.argwhere(out)[0][:2]))
    assert seen == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}
    ones = np.ones((4,), np.float32)
    sums = {float(augment.apply(ones, np.random.default_rng(s), {"shift": 9}).sum()) for s in range(200)}
    assert sums == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert ones.sum() == 4  # the item of the source is not touched


def test_rotation_and_scale_turn_about_the_centre():
    image = np.zeros((9, 9, 2), np.float32)
    image[4, 1:8] = 1
    out = augment.apply(image, np.random.default_rng(0), {"rotate": 90.0, "scale": 0.2})
    assert out.shape == image.shape and out.dtype == np.float32
    assert out[4, 4].min() > 0.9 and np.abs(out - image).max() > 0.5
    np.testing.assert_allclose(out, out[::-1, ::-1], atol=1e-5)


def test_gain_is_in_decibels():
    gains = [augment.apply(np.ones(3, np.float32), np.random.default_rng(s), {"gain_db": 6.0}) for s in range(100)]
    decibels = 20 * np.log10([gain[0] for gain in gains])
    assert -6 <= decibels.min() < -4 and 4 < decibels.max() <= 6 and gains[0].dtype == np.float32


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"image": {"shfit": 1}}, "did you mean 'shift'"),
        ({"picture": {"shift": 1}}, "unknown modality 'picture'"),
        ({"audio": {"rotate": 1}}, "rank 1"),
        ({"image": {"shift": -1}}, "out of range"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(UserError, match=words):
        augment.check(fields, {"image": 3, "audio": 1})
