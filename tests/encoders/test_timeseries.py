import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from tests import tiny
from tests.encoders import fitting
from vfm import model as model_lib
from vfm import tree
from vfm.data import build
from vfm.data.interleave import Layout
from vfm.encoders import TimeSeries, VectorEncoder
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

B, T, C, PATCH = 4, 64, 3, 8
fields = pytest.mark.parametrize("mix, normalise", ((True, True), (False, False)), ids=("mixed", "per_channel_raw"))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@functools.cache
def built(**fields):
    """(encoder, parameters, jitted call (parameters, series, **rest) -> (features, out))."""
    sizes = {"length": T, "channels": C, "patch_length": PATCH, "width": 16, "mlp_dim": 32}
    model = TimeSeries(**{**sizes, **fields})
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *model.item_shape)), train=False))
    rng, shapes = np.random.default_rng(5), shapes["params"]
    draw = lambda path, leaf: jnp.asarray(rng.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32)
    params = jax.tree.map(draw, tree.paths(shapes), shapes)
    return model, params, jax.jit(lambda params, x, **rest: model.apply({"params": params}, x, **rest, train=False))


def series(seed=0, shape=(B, T, C)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def moved(a, b):
    """Which patches differ."""
    return np.flatnonzero((np.asarray(a) != np.asarray(b)).any(axis=(0, 2))).tolist()


@pytest.mark.parametrize("mix, stride", ((True, None), (False, 4)), ids=("mixed", "per_channel"))
def test_patches_are_cut_along_time(mix, stride):
    model, params, run = built(mix_channels=mix, stride=stride, window=1)
    P = 8 if stride is None else 15
    assert model.num_tokens == (P if mix else C * P)
    x = series()
    y, out = run(params, x)
    assert y.shape == (B, model.num_tokens, 16) and bool(out["mask"].all())
    for step, channel in ((0, 0), (29, 1), (T - 1, 2)):
        other = x.copy()
        other[:, step, channel] += 1
        begins = np.arange(P) * (stride or PATCH)
        of_step = np.flatnonzero((begins <= step) & (step < begins + PATCH))
        assert moved(run(params, other)[0], y) == (of_step + (0 if mix else channel * P)).tolist()


def test_channels_share_weights_and_have_their_own_embedding():
    _, params, run = built(mix_channels=False, normalise=False)
    alike = {**params, "channel_table": 0 * params["channel_table"]}
    x = np.tile(series()[:, :, :1], (1, 1, C))
    y, z = (run(p, x)[0].reshape(B, C, -1, 16) for p in (params, alike))
    np.testing.assert_allclose(z[:, 0], z[:, 1], atol=1e-5)
    assert bool((jnp.abs(y[:, 0] - y[:, 1]).max(axis=-1) > 1e-2).all())


@pytest.mark.parametrize("gap", (slice(32, 40), slice(35, 38)), ids=("whole_patch", "part_of_a_patch"))
def test_a_gap_does_not_reach_beyond_its_receptive_field(gap):
    """Patch 4 is concerned; two layers with a window of 2 carry that two patches far."""
    _, params, run = built(window=2, depth=2)
    whole = series()
    holed = whole.copy()
    holed[:, gap] = np.nan
    assert moved(run(params, holed)[0], run(params, whole)[0]) == [2, 3, 4, 5, 6]


@fields
def test_the_values_under_a_gap_do_not_matter(mix, normalise):
    _, params, run = built(mix_channels=mix, normalise=normalise)
    x, present = series(), np.ones((B, T, C), bool)
    present[0, 30:50] = present[1, 3:5, 1] = present[1, 40:, 0] = False
    y, out = run(params, x, present=present)
    assert bool(out["mask"].all()) is False
    for value in (100.0, np.nan, np.inf):
        changed, _ = run(params, np.where(present, x, np.float32(value)), present=present)
        np.testing.assert_array_equal(changed, y)
    np.testing.assert_array_equal(run(params, np.where(present, x, np.nan))[0], y)  # NaN says the same by itself
    probe = series(1, y.shape)
    slope = jax.jit(jax.grad(lambda x: (run(params, x, present=present)[0] * probe).sum()))(x)
    assert bool((slope[~present] == 0).all()) and bool((slope[present] != 0).mean() > 0.99)


@fields
def test_missing_values_are_never_seen_in_outputs_or_gradients(mix, normalise):
    _, params, run = built(mix_channels=mix, normalise=normalise)
    x = series()
    x[0, np.random.default_rng(1).random((T, C)) < 0.5] = np.nan
    x[1, :, 1], x[2], x[3, 8:24] = np.nan, np.nan, np.nan
    y, out = run(params, x)

    def loss(params, x):
        y, out = run(params, x)
        return (y * series(1, y.shape)).sum() + (out["pooled"] ** 2).sum()

    for leaf in jax.tree.leaves((y, out, jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))):
        assert bool(jnp.isfinite(leaf).all())
    nothing = ~np.asarray(out["mask"])
    assert nothing[2].all() and nothing[3].sum() == 2 * (1 if mix else C) and (mix or nothing[1].sum() == T // PATCH)
    assert bool((y[nothing] == 0).all()) and bool((y[~nothing] != 0).any(axis=-1).all())
    for row in (0, 1, 3):  # what has no value is left out of the mean
        np.testing.assert_allclose(out["pooled"][row], y[row][~nothing[row]].mean(axis=0), atol=1e-5)
    assert bool((out["pooled"][2] == 0).all())


def test_a_patch_without_values_is_seen_by_no_other():
    _, params, run = built()
    x = series()
    x[:, 2 * PATCH : 3 * PATCH] = np.nan
    probe = series(1, (B, T // PATCH, 16))
    slope = jax.jit(jax.grad(lambda params: (run(params, x)[0] * probe).sum()))(params)["positions"]
    np.testing.assert_array_equal(np.flatnonzero((slope == 0).all(axis=1)), [2])


def test_the_model_knows_missing_values_from_zeros():
    _, params, run = built()
    x = series()
    zeros, holes = x.copy(), x.copy()
    zeros[:, 10:12], holes[:, 10:12] = 0, np.nan
    assert moved(run(params, zeros)[0], run(params, holes)[0])


def test_normalisation_is_over_the_values_that_are_there():
    _, params, run = built(mix_channels=True, normalise=True)
    x = series()
    x[0, 5:30, 1] = np.nan
    y, out = run(params, x)
    np.testing.assert_allclose(out["mean"], np.nanmean(x, axis=1), atol=1e-5)
    np.testing.assert_allclose(out["std"], np.nanstd(x, axis=1), atol=1e-4)
    scale, shift = np.array([3.0, 0.5, 40.0], np.float32), np.array([-7.0, 0.0, 300.0], np.float32)
    np.testing.assert_allclose(run(params, x * scale + shift)[0], y, atol=2e-3)
    _, raw_params, raw = built()
    assert float(jnp.abs(raw(raw_params, x + 1)[0] - raw(raw_params, x)[0]).max()) > 0.1


def test_wrong_sizes_are_refused():
    with pytest.raises(UserError, match=r"TimeSeries takes items of shape \(64, 3\), not \(64, 2\)"):
        built()[0].init(jax.random.key(0), jnp.zeros((1, 64, 2)), train=False)
    with pytest.raises(UserError, match=r"length=64 must be patch_length \+ k · stride = 10 \+ k · 10"):
        _ = TimeSeries(length=64, patch_length=10).num_tokens
    with pytest.raises(UserError, match="length=8 must be patch_length"):
        _ = TimeSeries(length=8, patch_length=16).num_tokens


def test_missing_values_pass_the_data_layer_for_encoders_that_take_them(tmp_path):
    x = series(shape=(4, 16, 2))
    x[0, 3:9, 1], x[1, 5, 0] = np.nan, np.inf
    np.savez(tmp_path / "test.npz", sensor=x, label=np.arange(4) % 2)
    cfg = {
        "name": "pairs",
        "sources": {"sensor": {"name": "npz", "arrays": {"sensor": "sensor"}, "paths": {"test": "test.npz"},
                               "dir": str(tmp_path)}},
        "words": ("on", "off"),
        "tasks": ("sensor->text",),
    }  # fmt: skip
    text = {"name": "text", "vocab_size": 261}

    model = model_lib.build({
        "centre": "text",
        "encoders": {"sensor": {"name": "timeseries", "length": 16, "channels": 2, "patch_length": 4}, "text": text,
                     "other": {"name": "vector"}},
        "input_projectors": {},
        "backbone": {"name": "decoder_only"},
        "decoders": {"text": text},
    })  # fmt: skip
    layout = model_lib.layout(model, 32)
    sensor = layout.modalities["sensor"]
    assert sensor.takes_missing and not layout.modalities["other"].takes_missing

    def read(index, layout):
        tokenizer = ByteTokenizer(("<pad>", "<bos>", "<eos>", "<text>", "<sensor>"))
        dataset = build(cfg, "test", layout=layout, tokenizer=tokenizer)
        return dataset.example(index, np.random.default_rng(0))["inputs"]["sensor"][0]

    np.testing.assert_array_equal(read(0, layout), x[0])
    with pytest.raises(UserError, match="'sensor': item 1 of its source holds numbers that are not finite"):
        read(1, layout)
    with pytest.raises(UserError, match="'sensor': item 0 of its source holds numbers that are not finite"):
        read(0, Layout(32, {"sensor": dataclasses.replace(sensor, takes_missing=False)}))


def test_a_series_that_is_generated_has_no_missing_values():
    """There would be nothing to compare the generated value with."""
    decoder = VectorEncoder()  # any block will do
    groups = [FrozenDict({"sensor": TimeSeries()}), FrozenDict(), None, FrozenDict()]
    read, generated = (model_lib.VFM("", *groups, FrozenDict(d)) for d in ({}, {"sensor": decoder}))
    assert model_lib.layout(read, 8).modalities["sensor"].takes_missing
    assert not model_lib.layout(generated, 8).modalities["sensor"].takes_missing


@pytest.mark.slow
@pytest.mark.parametrize("mix", (True, False), ids=("mixed", "per_channel"))
def test_it_learns_which_frequency_a_series_with_gaps_has(mix):
    """Sines of three frequencies, of any phase, scale and level, with two fifths of the values missing."""
    model = TimeSeries(length=T, channels=2, patch_length=PATCH, mlp_dim=64, mix_channels=mix, normalise=True)

    def draw(rng, size):
        label = rng.integers(3, size=size)
        time, phase = np.arange(T)[None, :, None], rng.uniform(0, 2 * np.pi, (size, 1, 2))
        x = np.sin(2 * np.pi * (label[:, None, None] + 1) / 24 * time + phase) + 0.1 * rng.normal(size=(size, T, 2))
        x = x * rng.uniform(0.1, 10, (size, 1, 2)) + rng.uniform(-50, 50, (size, 1, 2))
        start = rng.integers(0, T - 20, (size, 1))
        x[(np.arange(T) >= start) & (np.arange(T) < start + 20)] = np.nan  # one gap in all channels
        x[rng.random(x.shape) < 0.15] = np.nan
        return x.astype(np.float32), label

    train, held_out = draw(np.random.default_rng(0), 1024), draw(np.random.default_rng(2), 300)
    assert fitting.accuracy(model, train, held_out, steps=100, classes=3) >= 0.9
