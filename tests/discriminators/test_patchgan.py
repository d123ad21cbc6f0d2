"""PatchGAN: the layout of pix2pix, what each logit sees, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import sharding, tree
from vfm.discriminators.patchgan import PatchGAN
from vfm.errors import UserError


def make(shape, **fields):
    block = PatchGAN(width=4, groups=4, **fields)
    items = jax.random.normal(jax.random.key(1), shape)
    variables = jax.jit(lambda key, x: block.init(key, x, train=False))(jax.random.key(0), items)
    return block, variables, items


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_it_equals_the_layers_of_torch(norm):
    pytest.importorskip("torch")
    from vfm.parity import torch_adversarial

    assert torch_adversarial.patchgan(norm) < 1e-4


@pytest.mark.parametrize("depth, patch", [(1, 16), (2, 34)])
def test_a_logit_sees_its_patch_and_no_more(depth, patch):
    side = patch + 2 * 2**depth
    block, variables, items = make((1, side, side, 1), depth=depth, norm="none")
    run = lambda x: block.apply(variables, x, train=False)[0]
    logits = jax.eval_shape(run, items)
    assert logits.shape == (1, side // 2**depth - 2, side // 2**depth - 2, 1)
    middle = logits.shape[1] // 2
    seen = np.asarray(jax.jit(jax.grad(lambda x: run(x)[0, middle, middle, 0]))(items))[0, ..., 0]
    rows, columns = np.nonzero(seen)
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == patch


def test_a_spectrogram_is_an_image_of_one_channel():
    block, variables, items = make((2, 40, 24, 1), norm="group", depth=2)
    apply = jax.jit(lambda x: block.apply(variables, x, train=False))
    logits, out = apply(items)
    assert logits.shape == (2, 8, 4, 1)
    assert [f.shape for f in out["features"]] == [(2, 20, 12, 4), (2, 10, 6, 8), (2, 9, 5, 16)]
    np.testing.assert_array_equal(apply(items[..., 0])[0], logits)


def test_channels_double_eight_times_at_most():
    block = PatchGAN(width=2, depth=5, norm="none")
    params = jax.eval_shape(lambda k: block.init(k, jnp.zeros((1, 96, 96, 3)), train=False), jax.random.key(0))
    widths = [params["params"][f"conv_{i}"]["kernel"].shape[-1] for i in range(6)]
    assert widths == [2, 4, 8, 16, 16, 16]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_parameter_has_a_row_of_sharding(norm):
    _, variables, _ = make((1, 12, 12, 1), depth=2, norm=norm)
    for path, leaf in tree.flatten({"discriminators_image": variables["params"]}).items():
        sharding.parameter_names(path, leaf.shape)


@pytest.mark.parametrize(
    "shape, fields, words",
    [
        ((1, 23, 40, 1), {"depth": 3}, ("23 × 40", "at least 24")),
        ((1, 2, 24, 24, 1), {}, ("[1, 2, 24, 24, 1]",)),
        ((1, 24, 24, 1), {"norm": "layer"}, ("layer", "batch")),
        ((1, 24, 24, 1), {"norm": "group", "groups": 3}, ("groups=3", "8 channels")),
    ],
    ids=["small", "dimensions", "norm", "groups"],
)
def test_what_does_not_fit_is_refused(shape, fields, words):
    block = PatchGAN(**{"width": 4, **fields})
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda k: block.init(k, jnp.zeros(shape), train=False), jax.random.key(0))
    assert all(word in str(error.value) for word in words), error.value
