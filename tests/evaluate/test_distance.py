"""Distances against the reference libraries, and by hand."""

import pathlib

import numpy as np
import pytest

from vfm.evaluate import distance

FIXTURES = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "functions"
needs = lambda name: pytest.mark.skipif(not (FIXTURES / name).exists(), reason="no reference files")


@needs("psnr_ssim")
def test_images_equal_the_reference_library():
    io = np.load(FIXTURES / "psnr_ssim" / "io.npz")
    a, b = io["in/a"][None], io["in/b"][None]
    whole = [io[name][None].astype(np.float64) for name in ("in/a8", "in/b8")]
    found = {
        "mse": distance.mse(a, b),
        "psnr": distance.psnr(a, b),
        "psnr8": distance.psnr(*whole, data_range=255),
        "ssim_default": distance.ssim(a, b),
        "ssim8": distance.ssim(*whole, data_range=255),
        "ssim_gaussian": distance.ssim(a, b, gaussian=True),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, io[f"out/{name}"], atol=1e-6, err_msg=name)


@needs("frechet_distance")
def test_sets_equal_the_reference_libraries():
    io = np.load(FIXTURES / "frechet_distance" / "io.npz")
    x, y = io["in/x"], io["in/y"]
    assert distance.frechet_distance(x, y) == pytest.approx(float(io["out/fid"]), abs=1e-6)
    assert distance.kernel_distance(x, y) == pytest.approx(float(io["out/kid"]), abs=1e-6)
    assert distance.inception_score(io["in/probs"]) == pytest.approx(float(io["out/inception_score"]), abs=1e-6)
    # With fewer items than features the reference takes the root of a singular matrix.
    singular = distance.frechet_distance(io["in/xs"], io["in/ys"])
    assert singular == pytest.approx(float(io["out/fid_rank_deficient"]), rel=1e-2)


def test_every_item_and_channel_counts_for_itself():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 12, 14, 5))
    for measure in (distance.mse, distance.psnr, distance.ssim):
        alone = [measure(a[i : i + 1], b[i : i + 1])[0] for i in range(3)]
        np.testing.assert_allclose(measure(a, b), alone)
    channels = [distance.ssim(a[..., c : c + 1], b[..., c : c + 1]) for c in range(5)]
    np.testing.assert_allclose(distance.ssim(a, b), np.mean(channels, axis=0))
    np.testing.assert_allclose(distance.ssim(a, a, gaussian=True), 1)
    np.testing.assert_allclose(distance.psnr(a, a), 100)


def test_frechet_distance_of_few_items_in_many_dimensions_is_exact():
    """Two sets in different planes: their covariances have nothing in common."""
    x, y = np.zeros((4, 6)), np.zeros((4, 6))
    x[:, 0], y[:, 1] = (-1, 1, -1, 1), (-3, 3, -3, 3)
    assert distance.frechet_distance(x, y) == pytest.approx(4 / 3 + 12, abs=1e-12)
    assert distance.frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert distance.frechet_distance(x, x + np.arange(6)) == pytest.approx(55, abs=1e-12)


def test_manifolds_by_hand():
    real, generated = np.array([[0.0], [1.0], [2.0], [10.0]]), np.array([[0.5], [1.5], [30.0], [31.5]])
    # Real balls (k = 1): [-1, 1], [0, 2], [1, 3], [2, 18]. Generated: [-.5, 1.5], [.5, 2.5], [28.5, 31.5], [30, 33].
    found = distance.manifold_scores(real, generated, k=1)
    assert found == {"precision": 0.5, "recall": 0.75, "density": 1.0, "coverage": 0.75}
    with pytest.raises(ValueError, match="more than 4 items"):
        distance.manifold_scores(real, generated, k=4)


def test_spread_is_within_classes():
    x, labels = np.array([[0.0], [2.0], [100.0], [104.0]]), np.array([0, 0, 1, 1])
    assert distance.spread(x, labels) == pytest.approx(3)
    assert distance.spread(x, np.arange(4)) == 0


def test_score_of_sure_and_unsure_classifiers():
    assert distance.inception_score(np.eye(5)) == pytest.approx(5)
    assert distance.inception_score(np.full((7, 5), 0.2)) == pytest.approx(1)


@pytest.mark.parametrize("call", [lambda x: distance.mse(x, x[:1]), lambda x: distance.ssim(x, x)])
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="needed|takes"):
        call(np.zeros((2, 6, 9, 1)))
