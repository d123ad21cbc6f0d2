"""Weights of one encoder as the start of another: grey images, other channels, other grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import tree
from vfm.encoders import ViT
from vfm.encoders.borrow import borrow, collapse_stem, inflate_stem
from vfm.errors import UserError
from vfm.layers.positions import resize_positions

RNG = np.random.default_rng(0)
FIELDS = {"image_size": (8, 8), "channels": 3, "patch_size": 2, "width": 16, "depth": 1, "pooling": "class"}


def parameters(model, seed):
    images = jnp.zeros((1, *model.item_shape))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def features(model, params, images):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, train=False)[0])(params, images)


def test_collapse_and_inflate():
    kernel = jnp.asarray(RNG.normal(size=(2, 2, 3, 5)), jnp.float32)
    grey = jnp.asarray(RNG.normal(size=(2, 2, 1)), jnp.float32)
    apply = lambda image, kernel: jnp.einsum("hwc,hwcd->d", image, kernel)
    one = collapse_stem(kernel)
    assert one.shape == (2, 2, 1, 5)
    np.testing.assert_allclose(apply(grey, one), apply(jnp.repeat(grey, 3, axis=2), kernel), atol=1e-5)
    four = inflate_stem(one, 4)
    assert four.shape == (2, 2, 4, 5)
    image = jnp.asarray(RNG.normal(size=(2, 2, 4)), jnp.float32)
    np.testing.assert_allclose(apply(image, four), apply(image.mean(axis=2, keepdims=True), one), atol=1e-5)
    np.testing.assert_allclose(collapse_stem(four), one, atol=1e-6)
    with pytest.raises(UserError, match="takes a kernel of one channel, not 3"):
        inflate_stem(kernel, 4)


def test_an_encoder_of_one_channel_sees_grey_images_as_the_lender_does():
    lender, own = ViT(**FIELDS), ViT(**{**FIELDS, "channels": 1})
    theirs = parameters(lender, 1)
    ours = borrow(parameters(own, 2), theirs)
    grey = jnp.asarray(RNG.normal(size=(2, 8, 8, 1)), jnp.float32)
    expected = features(lender, theirs, jnp.repeat(grey, 3, axis=-1))
    np.testing.assert_allclose(features(own, ours, grey), expected, atol=1e-4)
    # And back: three channels that borrow from one.
    back = borrow(parameters(lender, 3), ours)
    np.testing.assert_allclose(features(lender, back, jnp.repeat(grey, 3, axis=-1)), expected, atol=1e-4)


def test_positions_of_another_grid():
    lender, own = ViT(**FIELDS), ViT(**{**FIELDS, "image_size": (4, 12)})
    theirs = parameters(lender, 1)
    with pytest.raises(UserError, match=r"positions has shape \(13, 16\).*\(17, 16\).*give grid and lender_grid"):
        borrow(parameters(own, 2), theirs)
    ours = borrow(parameters(own, 2), theirs, grid=own.grid, lender_grid=lender.grid)
    np.testing.assert_allclose(ours["positions"], resize_positions(theirs["positions"], (4, 4), (2, 6)), atol=1e-6)
    np.testing.assert_array_equal(ours["positions"][0], theirs["positions"][0])
    images = jnp.asarray(RNG.normal(size=(2, 4, 12, 3)), jnp.float32)
    expected = features(lender.clone(any_size=True), theirs, images)
    np.testing.assert_allclose(features(own, ours, images), expected, atol=1e-4)


def test_what_is_kept_and_what_is_refused():
    lender, own = ViT(**FIELDS), ViT(**{**FIELDS, "num_registers": 2})
    theirs, mine = parameters(lender, 1), parameters(own, 2)
    with pytest.raises(UserError, match="the lender has no parameter registers; add it to keep"):
        borrow(mine, theirs)
    found = tree.flatten(borrow(mine, theirs, keep=("registers", "transformer/norm/.*")))
    for path, leaf in found.items():
        source = mine if path == "registers" or path.startswith("transformer/norm/") else theirs
        np.testing.assert_array_equal(leaf, tree.flatten(source)[path])
    with pytest.raises(UserError, match="keep='register' matches no parameter"):
        borrow(mine, theirs, keep=("register",))
    wide = parameters(ViT(**{**FIELDS, "width": 32}), 1)
    with pytest.raises(UserError, match=r"borrow: \S+ has shape .*does not fit"):
        borrow(parameters(lender, 2), wide)
    # What the lender has beyond is left behind, and the type of the parameters stays.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(borrow(half, mine))} == {jnp.dtype("bfloat16")}
    assert jax.tree.structure(borrow(half, mine)) == jax.tree.structure(theirs)
