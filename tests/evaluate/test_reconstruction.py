"""The evaluator of autoencoders, against what its numbers mean."""

import functools
import types

import jax
import numpy as np
import pytest

from tests import tiny
from tests.evaluate.autoencoders import HALF, build, config
from vfm.data.image import Digits
from vfm.errors import UserError
from vfm.evaluate import reconstruction as evaluator
from vfm.evaluate import spaces
from vfm.evaluate.reconstruction import (
    Read,
    _sounds,
    active_units,
    codes,
    decoder,
    nearest_codes,
    reader,
    warn_of_collapse,
)
from vfm.train.checkpoint import Checkpointer
from vfm.workdir import prepare


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def evaluated(experiment, limit):
    state = experiment.init_state()
    weights = {"params": state.params, **state.variables}
    return weights, evaluator(experiment, state.params, state.variables, "test", limit)


def test_metrics_are_those_of_every_item_once():
    """40 items are a batch of 32 and one that is filled up."""
    experiment = build(config("gaussian", reconstruction={"features": "judge", "probe_examples": 100}))
    weights, found = evaluated(experiment, 40)
    model, items = experiment.model, Digits("test").images[:40]
    parts = {name: weights["params"][f"{name}s_image"] for name in ("encoder", "decoder")}
    encode, decode = (
        functools.partial(blocks["image"].apply, train=False) for blocks in (model.encoders, model.decoders)
    )
    latents, out = jax.jit(encode)({"params": parts["encoder"]}, items)
    back = np.asarray(jax.jit(decode)({"params": parts["decoder"]}, latents)[0])
    metrics = found.metrics
    assert metrics["reconstruction_image_mse"] == pytest.approx(np.square(items - back).mean(), rel=1e-5)
    assert metrics["active_units_image"] == (np.asarray(out["mean"]).var(axis=0) > 0.01).sum()
    assert metrics["latent_floats_image"] == 4 * 2
    assert metrics["latent_std_image"] == pytest.approx(np.asarray(latents).std(), rel=1e-4)
    assert metrics["judge_image_accuracy"] > 0.9 > metrics["reconstruction_image_agreement"]
    assert metrics["reconstruction_image_ssim"] < 0.5 and metrics["reconstruction_image_frechet"] > 1
    assert metrics["probe_image"] == metrics["probe_random_image"]  # this model is the untrained one
    assert metrics["probe_pca_image"] > 0.6
    (_, grid), (_, ways) = (found.samples[name] for name in ("reconstruction_image", "interpolation_image"))
    np.testing.assert_allclose(grid[0][3][1], items[2])
    np.testing.assert_allclose(grid[1][3][1], np.clip(back[2], 0, 1), atol=1e-5)
    # A way begins at one item and ends at the next.
    np.testing.assert_allclose(ways[1][1][1], np.clip(back[2], 0, 1), atol=1e-5)
    np.testing.assert_allclose(ways[1][7][1], np.clip(back[3], 0, 1), atol=1e-5)


def test_every_batch_of_a_split_has_a_number():
    experiment = build(config())
    numbers, measured = [], {"loss": (1.0, 1.0)}
    experiment.eval_step = lambda params, variables, batch, number: numbers.append(number) or (measured, {"loss": 1.0})
    experiment.evaluate_loss({}, {}, "test", 80)
    assert numbers == [0, 1, 2]


class Tones:
    """A source whose pictures are heard as a constant: their mean."""

    sample_rate = 50

    def sound(self, item):
        return np.full(100, item.mean(), np.float32)


def test_pictures_of_sounds_are_heard_beside_their_reconstructions():
    items = np.arange(3.0).reshape(3, 1, 1, 1) * np.ones((1, 2, 2, 1))
    read = Read(items, None, 10 * items, None, None, None)
    dataset = types.SimpleNamespace(source=Tones())
    _, rows = _sounds(dataset, "image", read, 2)["sounds_image"]
    assert rows[0] == [("text", "item"), ("text", "given back")] and len(rows) == 3
    (kind, item, rate), (_, back, _) = rows[2]
    assert kind == "audio" and rate == 50 and item.max() == 1 and back.max() == 10
    dataset.source = Digits("test")
    assert _sounds(dataset, "image", read, 2) == {}


def test_codes_are_counted_over_the_split_and_latents_snap_to_them():
    experiment = build(config({"name": "vq", "codebook_size": 16, "codebook_init": "normal"}))
    state = experiment.init_state()
    weights = {"params": state.params, **state.variables}
    found = reader(experiment)(weights, experiment.dataset("test"), 50)["image"]
    assert found.codes.shape == (50, 4) and found.mean is None and found.labels.shape == (50,)
    noisy = found.latents + 1e-3 * np.random.default_rng(0).standard_normal(found.latents.shape)
    np.testing.assert_allclose(nearest_codes(experiment, weights, "image", noisy), found.latents, atol=1e-5)
    np.testing.assert_allclose(decoder(experiment, "image")(weights, found.latents), found.reconstructed, atol=1e-4)
    measured = codes(experiment.model.encoders["image"], found.codes)
    assert measured["codebook_usage"] == len(np.unique(found.codes)) / 16 and measured["code_bits"] == 16


class Sized:
    codebook_size = 8


def test_use_of_codes_by_hand():
    found = codes(Sized, np.array([[0, 0], [1, 1]]))
    assert found == {"codebook_usage": 0.25, "codebook_perplexity": pytest.approx(2), "code_bits": 6}
    levels = np.stack([np.array([[0, 0], [1, 1]]), np.arange(4).reshape(2, 2)], axis=-1)  # of a residual codebook
    found = codes(Sized, levels)
    assert found == {"codebook_usage": 0.375, "codebook_perplexity": pytest.approx(3), "code_bits": 12}


def test_a_collapse_is_one_warning_with_what_helps(caplog):
    with caplog.at_level("WARNING"):
        warn_of_collapse("image", 0.21)
        assert not caplog.records
        warn_of_collapse("image", 0.05)
    assert [record.getMessage() for record in caplog.records] == [
        "the codebook of encoders.image has collapsed: 5.0 % of its codes are in use; what helps: restart of dead "
        "codes, codes that follow the latents by EMA, a start from latents of the data, a smaller codebook"
    ]


def test_units_that_do_not_differ_are_not_active():
    mean = np.zeros((100, 2, 2))
    mean[:, 0, 0], mean[:, 1, 0] = np.random.default_rng(0).standard_normal((2, 100)) * [[1], [0.05]]
    assert active_units(mean + 7) == 1


def test_features_can_be_those_of_a_run(tmp_path):
    """The folder of a run, without its training: a config and a checkpoint."""
    theirs = build(config(encoder={**HALF, "width": 3}))
    prepare(str(tmp_path), theirs.config, write=True)
    state = theirs.init_state()
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, state, {}, wait=True)
    experiment = build(config(reconstruction={"features": str(tmp_path)}))
    items = Digits("test").images[:40]
    space = spaces.space(experiment, "image", str(tmp_path), "here", spaces.Items(items, None))
    encoder, params = theirs.model.encoders["image"], state.params["encoders_image"]
    expected = jax.jit(lambda: encoder.apply({"params": params}, items, train=False)[0].mean(axis=1))()
    np.testing.assert_allclose(space.features(items), expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"reconstruction": {"features": "nowhere"}},
            "pixels, judge or a folder.='nowhere' is not the folder of a run",
        ),
        (
            {"reconstruction": {"feature": "judge"}},
            "unknown field 'feature' in config.eval.reconstruction; did you mean",
        ),
        (
            {"encoder": {"name": "vit"}, "decoder": {"name": "tests.evaluate.autoencoders.Copy"}},
            "needs a modality with",
        ),
    ],
)
def test_bad_input_is_one_line(changes, message):
    c = config(**changes)
    with c.unlocked():
        c.eval.evaluators = ("reconstruction",)
        if "encoder" in changes:
            c.model.update(encoders={"other": {"name": "mlp", "width": 64}}, centre="other")
            c.objective.name = "generation"
    with pytest.raises(UserError, match=message):
        build(c)
