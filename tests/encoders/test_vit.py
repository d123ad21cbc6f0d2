import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import sharding, tree
from vfm.encoders import ViT
from vfm.errors import UserError
from vfm.layers.positions import resize_positions, rotary_2d, rotate, sinusoidal, sinusoidal_2d
from vfm.layers.transformer import Transformer

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


FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "fixtures"
TINY = {"image_size": (8, 8), "channels": 1, "patch_size": 2, "width": 16, "depth": 1, "mlp_dim": 24}


def build(seed=0, batch=2, **fields):
    """(model, random parameters, images)."""
    model = ViT(**{**TINY, **fields})
    images = jax.random.normal(jax.random.key(seed), (batch, *model.item_shape))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    rng = np.random.default_rng(seed)
    draw = lambda path, leaf: jnp.asarray(rng.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32)
    return model, jax.tree.map(draw, tree.paths(shapes), shapes), images


@functools.cache
def jitted(model, train):
    return jax.jit(lambda p, x, rngs: model.apply({"params": p}, x, train=train, rngs=rngs))


def apply(model, params, images, train=False, rngs=None):
    return jitted(model, train)(params, images, rngs)


@pytest.mark.parametrize("pooling", ["class", "mean", "map"])
def test_pooled(pooling):
    model, params, images = build(pooling=pooling, num_registers=3)
    y, out = apply(model, params, images)
    E = 3 + (pooling == "class")
    assert y.shape == (2, model.num_tokens, 16) and out["pooled"].shape == (2, 16)
    assert out["layers"].shape == (1, 2, E + 16, 16) and out["registers"].shape == (2, 3, 16)
    # All tokens in the order that the docstring says, before the norm of the stack, and after it.
    norm = nn.LayerNorm(epsilon=1e-5).apply({"params": params["transformer"]["norm"]}, out["layers"][-1])
    np.testing.assert_allclose(norm[:, E:], y, atol=2e-5)
    np.testing.assert_allclose(norm[:, E - 3 : E], out["registers"], atol=2e-5)
    if pooling == "class":
        np.testing.assert_allclose(norm[:, 0], out["pooled"], atol=2e-5)
        np.testing.assert_array_equal(out["class"], out["pooled"])
    elif pooling == "mean":
        np.testing.assert_allclose(y.mean(axis=1), out["pooled"], atol=1e-5)
    else:  # one query: softmax over the patches, by hand
        p = params["pooling"]
        project = lambda name, x: jnp.einsum("...d,dnk->...nk", x, p["attention"][name]["kernel"])
        query = project("query", p["queries"])[0] + p["attention"]["query"]["bias"]
        key = project("key", y) + p["attention"]["key"]["bias"][None, None]
        value = project("value", y) + p["attention"]["value"]["bias"][None, None]
        weights = jax.nn.softmax(jnp.einsum("nk,bpnk->bnp", query, key) / np.sqrt(8), axis=-1)
        h = jnp.einsum("bnp,bpnk,nkd->bd", weights, value, p["attention"]["out"]["kernel"])
        h = h + p["attention"]["out"]["bias"][None]
        normed = nn.LayerNorm(epsilon=1e-5).apply({"params": p["norm"]}, h)
        up = nn.gelu(normed @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"][None])
        expected = h + up @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"][None]
        np.testing.assert_allclose(expected, out["pooled"], atol=2e-5)


def test_a_permutation_of_the_patches_permutes_the_features_but_for_the_positions():
    """Without positions patches are a set: the positions alone tell where a patch stands."""
    order = np.random.default_rng(0).permutation(16)
    cut = lambda x: x.reshape(2, 4, 2, 4, 2, 1).swapaxes(2, 3).reshape(2, 16, 2, 2, 1)
    join = lambda x: x.reshape(2, 4, 4, 2, 2, 1).swapaxes(2, 3).reshape(2, 8, 8, 1)
    for positions in ("learned", "sinusoidal", "rope"):
        model, params, images = build(positions=positions, pooling="class")
        y, _ = apply(model, params, images)
        moved, _ = apply(model, params, join(cut(images)[:, order]))
        assert float(jnp.abs(moved - y[:, order]).max()) > 1e-2
        if positions == "learned":
            same = {**params, "positions": jnp.zeros_like(params["positions"])}
            (y, _), (moved, _) = apply(model, same, images), apply(model, same, join(cut(images)[:, order]))
            np.testing.assert_allclose(moved, y[:, order], atol=2e-5)


def test_rotary_positions_are_relative():
    """A shift of the whole grid by rows or columns changes no logit: only the offsets of the patches count."""
    q, k = np.random.default_rng(0).normal(size=(2, 1, 20, 2, 8)).astype(np.float32)
    sin, cos = rotary_2d((9, 9), 8, 100.0)

    def logits(row, column):
        at = [(row + r) * 9 + column + c for r in range(4) for c in range(5)]
        turned = [rotate(jnp.asarray(x), (sin[None, at], cos[None, at])) for x in (q, k)]
        return jnp.einsum("btnk,bsnk->bnts", *turned)

    frequency = 100.0 ** -np.array([0, 0.5])
    for angle, pairs in ((np.repeat(np.arange(9), 9), slice(0, 2)), (np.tile(np.arange(9), 9), slice(2, 4))):
        np.testing.assert_allclose(sin[:, pairs], np.sin(angle[:, None] * frequency), atol=1e-6)
        np.testing.assert_allclose(cos[:, pairs], np.cos(angle[:, None] * frequency), atol=1e-6)
    start = logits(0, 0)
    for shift in ((1, 0), (0, 1), (4, 3)):
        np.testing.assert_allclose(logits(*shift), start, atol=1e-4)
    assert float(jnp.abs(start - jnp.einsum("btnk,bsnk->bnts", q, k)).max()) > 0.1
    with pytest.raises(UserError, match="head_dim that 4 divides, not 6"):
        rotary_2d((2, 2), 6, 100.0)


def test_the_first_patch_and_the_other_tokens_do_not_turn():
    fields = {"image_size": (2, 2), "pooling": "class", "num_registers": 2}
    turned, params, images = build(**fields, positions="rope")
    plain = turned.clone(positions="learned")
    still = {**params, "positions": jnp.zeros((2, 16))}
    np.testing.assert_allclose(apply(turned, params, images)[0], apply(plain, still, images)[0], atol=1e-5)


def test_sinusoidal_positions_of_a_grid():
    table = sinusoidal_2d((3, 5), 12).reshape(3, 5, 12)
    np.testing.assert_array_equal(table[:, :, :6], np.broadcast_to(sinusoidal(5, 6)[None], (3, 5, 6)))
    np.testing.assert_array_equal(table[:, :, 6:], np.broadcast_to(sinusoidal(3, 6)[:, None], (3, 5, 6)))
    with pytest.raises(UserError, match="a width that 4 divides, not 10"):
        sinusoidal_2d((2, 2), 10)


@pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
def test_sinusoidal_positions_are_those_of_mae():
    theirs = np.load(FIXTURES / "functions" / "sincos_positions" / "io.npz")["out/mae_6x6"]
    model, params, images = build(image_size=(12, 12), width=24, positions="sinusoidal", pooling="class")
    zero = {**params, "class_token": jnp.zeros((1, 24)), "patch": jax.tree.map(jnp.zeros_like, params["patch"])}
    _, out = apply(model, zero, images)
    np.testing.assert_allclose(out["input"][0], theirs.reshape(37, 24), atol=2e-5)


def test_any_size():
    wide = jax.random.normal(jax.random.key(1), (2, 6, 12, 1))
    for positions in ("sinusoidal", "rope"):
        model, params, _ = build(positions=positions, pooling="class", num_registers=1, any_size=True)
        y, out = jax.eval_shape(lambda p, m=model: m.apply({"params": p}, wide, train=False), params)
        assert y.shape == (2, 18, 16) and out["input"].shape == (2, 20, 16)
    fixed, params, images = build(pooling="class", num_registers=1)
    free = fixed.clone(any_size=True)
    same = jax.jit(lambda p: [m.apply({"params": p}, images, train=False)[0] for m in (free, fixed)])(params)
    np.testing.assert_array_equal(*same)
    y, out = apply(free, params, wide)
    # The same as a model of that size whose table of positions is the resized one.
    own, table = fixed.clone(image_size=(6, 12)), resize_positions(params["positions"], (4, 4), (3, 6))
    np.testing.assert_allclose(apply(own, {**params, "positions": table}, wide)[0], y, atol=1e-5)
    with pytest.raises(UserError, match=r"ViT takes items of shape \(8, 8, 1\), not \(6, 12, 1\)"):
        apply(fixed, params, wide)
    with pytest.raises(UserError, match=r"patch_size=2 does not divide the size of the image=\(6, 11\)"):
        apply(free, params, wide[:, :, :11])
    with pytest.raises(UserError, match=r"not \(8, 8, 2\)"):
        apply(free, params, jnp.ones((2, 8, 8, 2)))


def test_resized_positions():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(2 + 12, 5)), jnp.float32)
    for interpolation in ("bicubic", "bilinear"):
        np.testing.assert_allclose(resize_positions(table, (3, 4), (3, 4), interpolation), table, atol=1e-6)
        # Constants stay, and with straight lines so do slopes away from the edges.
        flat = resize_positions(jnp.ones((12, 1)), (3, 4), (5, 9), interpolation)
        np.testing.assert_allclose(flat, 1, atol=1e-6)
    slope = jnp.tile(jnp.arange(8.0), 2)[:, None]
    found = resize_positions(slope, (2, 8), (2, 16), "bilinear").reshape(2, 16)[0, 4:12]
    np.testing.assert_allclose(found, (np.arange(4, 12) + 0.5) / 2 - 0.5, atol=1e-5)
    both = [resize_positions(table, (3, 4), (6, 5), name) for name in ("bicubic", "bilinear")]
    assert both[0].shape == (2 + 30, 5) and float(jnp.abs(both[0] - both[1]).max()) > 1e-2
    np.testing.assert_array_equal(both[0][:2], table[:2])


def test_patch_dropout_takes_patches_out_in_training_only():
    model, params, images = build(pooling="class", num_registers=2, patch_dropout=0.75, positions="rope")
    assert apply(model, params, images)[0].shape == (2, 16, 16)
    run = jax.jit(lambda key, images: model.apply({"params": params}, images, train=True, rngs={"dropout": key}))
    y, out = run(jax.random.key(0), images)
    kept = np.asarray(out["kept"])
    assert y.shape == (2, 4, 16) and out["input"].shape == (2, 3 + 4, 16) and kept.shape == (2, 4)
    assert (np.diff(kept) > 0).all() and (kept[0] != kept[1]).any()
    assert (np.asarray(run(jax.random.key(1), images)[1]["kept"]) != kept).any()
    # Those that were taken out do not matter, and the others do.
    pixels = np.repeat(np.repeat(np.isin(np.arange(16), kept[0]).reshape(4, 4), 2, 0), 2, 1)[None, :, :, None]
    first = images[:1]
    changed = lambda where: jnp.concatenate([jnp.where(where, first + 1, first), images[1:]])
    np.testing.assert_array_equal(run(jax.random.key(0), changed(~pixels))[0], y)
    assert (jnp.abs(run(jax.random.key(0), changed(pixels))[0][0] - y[0]).max(axis=-1) > 1e-4).all()
    # Each patch stays equally often.
    many = jax.vmap(lambda key: model.apply({"params": params}, images, train=True, rngs={"dropout": key})[1]["kept"])
    share = np.bincount(np.asarray(jax.jit(many)(jax.random.split(jax.random.key(2), 400))).ravel(), minlength=16) / 800
    np.testing.assert_allclose(share, 0.25, atol=0.08)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope"])
def test_patches_that_stay_know_their_places(positions):
    """What the Transformer gives for some patches is what it gives for all of them, if only these may be seen."""
    model, params, images = build(patch_dropout=0.5, positions=positions, pooling="class")
    y, out = apply(model, params, images, train=True, rngs={"dropout": jax.random.key(0)})
    tokens = jnp.concatenate([jnp.zeros((2, 1), int), out["kept"] + 1], axis=1)
    seen = jax.vmap(lambda index: jnp.zeros(17, bool).at[index].set(True))(tokens)
    stack = Transformer(num_heads=2, depth=1, mlp_dim=24)
    call = {"table": model._rotary(model.grid, None)} if positions == "rope" else {}
    run = jax.jit(lambda p, x: stack.apply({"params": p}, x, mask=seen[:, None, None], **call, train=False)[0])
    whole = run(params["transformer"], apply(model, params, images)[1]["input"])
    expected = jnp.take_along_axis(whole, tokens[:, :, None], axis=1)
    np.testing.assert_allclose(y, expected[:, 1:], atol=2e-5)
    np.testing.assert_allclose(out["class"], expected[:, 0], atol=2e-5)


def test_switches_of_layers():
    """Each switch adds or takes away the parameters that it says, and no other."""
    paths = lambda **fields: set(tree.flatten(build(**fields)[1]))
    plain = paths()
    assert paths(embedding_norm=True) - plain == {"embedding_norm/scale", "embedding_norm/bias"}
    assert plain - paths(patch_bias=False) == {"patch/bias"}
    gone = {f"transformer/layers/attention/{name}/bias" for name in ("query", "key", "value")}
    assert plain - paths(qkv_bias=False) == gone
    assert plain - paths(positions="rope") == plain - paths(positions="sinusoidal") == {"positions"}
    assert paths(pooling="class") - plain == {"class_token"} and paths(num_registers=2) - plain == {"registers"}
    model, params, images = build(embedding_norm=True)
    _, out = apply(model, params, images)
    scale, bias = (params["embedding_norm"][name][None, None] for name in ("scale", "bias"))
    normal = (out["input"] - bias) / scale
    np.testing.assert_allclose(normal.mean(axis=-1), 0, atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pooling": "max"}, "unknown pooling 'max' in model.encoders.*map"),
        ({"positions": "alibi"}, "unknown positions 'alibi' in model.encoders.*rope"),
        ({"patch_dropout": 1.0}, "patch_dropout=1.0 must be a share"),
        ({"any_size": True, "interpolation": "cubic"}, "unknown interpolation 'cubic'.*bicubic"),
    ],
)
def test_unknown_fields_are_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        images = jnp.zeros((1, 8, 12 if "any_size" in fields else 8, 1))
        ViT(**{**TINY, **fields}).init(jax.random.key(0), images, train=False)


@pytest.mark.slow
def test_every_parameter_has_a_place_and_a_gradient():
    fields = {"num_registers": 2, "embedding_norm": True}
    model, params, images = build(pooling="map", **fields)
    for tree_of in (params, build(pooling="class", **fields)[1]):
        for path, leaf in tree.flatten({"encoders_image": tree_of}).items():
            assert len(sharding.parameter_names(path, leaf.shape)) == leaf.ndim
    weight = jax.random.normal(jax.random.key(1), (2, 16))

    def loss(params):
        return (model.apply({"params": params}, images, train=False)[1]["pooled"] * weight).sum()

    for path, gradient in tree.flatten(jax.jit(jax.grad(loss))(params)).items():
        if not path.endswith("key/bias"):  # softmax does not see it
            assert float(jnp.abs(gradient).max()) > 1e-4, path
    y, out = apply(model.clone(dtype="bfloat16"), params, images)
    assert y.dtype == out["pooled"].dtype == jnp.bfloat16
    exact = apply(model, params, images)[1]["pooled"]
    assert 0 < float(jnp.linalg.norm(out["pooled"] - exact) / jnp.linalg.norm(exact)) < 0.05
