import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import tree
from vfm.encoders import ViT
from vfm.errors import UserError

SIZE, PATCH, WIDTH = (6, 8), 2, 16


def embeddings(model, params, images):
    """What the patch embedding alone gives: its kernel applied to patches cut by hand, rows first."""
    kernel, bias = params["patch"]["kernel"], params["patch"]["bias"]
    rows, columns = model.grid
    cut = [[images[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH] for c in range(columns)]
           for r in range(rows)]  # fmt: skip
    patches = jnp.stack([patch for row in cut for patch in row], axis=1)
    return jnp.einsum("bphwc,hwcd->bpd", patches, kernel) + bias[None, None]


@pytest.fixture(scope="module")
def vit():
    model = ViT(image_size=SIZE, channels=2, patch_size=PATCH, width=WIDTH, depth=1)
    images = jax.random.normal(jax.random.key(0), (3, *SIZE, 2))
    params = jax.jit(lambda key: model.init(key, images, train=False)["params"])(jax.random.key(1))
    run = jax.jit(lambda params, images: model.apply({"params": params}, images, train=False)[0])
    return model, run, params, images


def test_patches_are_taken_rows_first(vit):
    model, run, params, images = vit
    assert (model.item_shape, model.grid, model.num_tokens) == ((6, 8, 2), (3, 4), 12)
    bare = tree.unflatten({path: 0 * leaf if path.endswith(("out/kernel", "down/kernel")) else leaf
                           for path, leaf in tree.flatten(params).items()})  # fmt: skip
    x = embeddings(model, params, images) + params["positions"][None]
    expected = nn.LayerNorm(epsilon=1e-5).apply({"params": params["transformer"]["norm"]}, x)
    y = run(bare, images)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    # A change of the pixels of patch (1, 2) moves the embedding of patch 1 · 4 + 2 only.
    moved = run(bare, images.at[:, 2:4, 4:6].add(jnp.linspace(0, 1, 2)[None, None, None]))
    np.testing.assert_array_equal(np.flatnonzero(np.abs(moved - y).max(axis=(0, 2))), [6])


def test_every_patch_sees_every_other_and_knows_its_place(vit):
    _, run, params, images = vit
    y = run(params, images)
    moved = run(params, images.at[:, :2, :2].add(1.0))
    assert (jnp.abs(moved - y).max(axis=(0, 2)) > 1e-4).all()
    same = run(params, jnp.ones_like(images))
    assert float(jnp.abs(same[0, 0] - same[0, 1]).max()) > 1e-3


def test_wrong_shapes_are_refused(vit):
    model, _, params, images = vit
    for wrong in (images[:, :4], images[..., :1], images[..., 0], images.swapaxes(1, 2)):
        with pytest.raises(UserError, match=r"ViT takes items of shape \(6, 8, 2\), not"):
            model.apply({"params": params}, wrong, train=False)
    with pytest.raises(UserError, match="patch_size=3 does not divide image_size"):
        _ = ViT(image_size=(9, 8), patch_size=3).num_tokens
