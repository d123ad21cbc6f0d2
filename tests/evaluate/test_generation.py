"""The evaluator of what models draw."""

import copy

import jax
import numpy as np
import pytest

from tests import tiny
from tests.evaluate.autoencoders import build, config
from vfm.data.image import Digits
from vfm.errors import UserError
from vfm.evaluate import generation as evaluator
from vfm.evaluate.generation import _adherence, _bits_per_dim, _draw

HERE = "tests.evaluate.autoencoders"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def copies(**settings):
    """An experiment whose model draws the items of the split themselves."""
    return build(config(encoder={"name": f"{HERE}.Whole"}, decoder={"name": f"{HERE}.Copy"}, generation=settings))


def evaluated(experiment, limit=100):
    state = experiment.init_state()
    return evaluator(experiment, state.params, state.variables, "test", limit)


def test_copies_of_real_items_are_perfect():
    found = evaluated(copies(features="judge")).metrics
    assert found["sample_image_agreement"] == found["judge_image_accuracy"] > 0.9
    assert found["sample_image_frechet"] == pytest.approx(0, abs=1e-3)
    assert found["sample_image_diversity"] == pytest.approx(1, abs=1e-4)
    assert [found[f"sample_image_{name}"] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert 0 < found["sample_image_seconds"] < 1


def test_settings_reach_the_sampler_and_are_seen_in_every_metric():
    found = evaluated(copies(brightness=0.0, noise=0.01))
    metrics = found.metrics
    assert metrics["sample_image_agreement"] < 0.3 < metrics["judge_image_accuracy"]
    assert metrics["sample_image_recall"] < 0.1 and metrics["sample_image_diversity"] < 0.2
    assert metrics["sample_image_frechet"] > 1
    _, rows = found.samples["sample_image"]
    assert [row[0] for row in rows] == [("text", str(k)) for k in range(10)]
    assert all(1 < len(row) <= 9 and row[1][1].max() < 0.1 for row in rows)


def controlled(**settings):
    """An experiment whose model draws under edges."""
    c = copy.deepcopy(diffusing(17).config)
    with c.unlocked():
        c.eval.generation.update(settings)
        c.model.decoders.image.update(control={"from": "edges"})
        c.model.decoders.image.network.update(control_depth=1, patch_size=2)
        c.data.source = {"name": "edges", "source": {"name": "digits"}}
    return build(c)


def diffusing(levels, **settings):
    network = {"name": "dit", "width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8, "frequencies": 4}
    process = {"name": "gaussian", "timesteps": 3, "levels": levels}
    decoder = {"name": "diffusion", "item_shape": (8, 8, 1), "network": network, "process": process}
    label = {"name": "label", "num_classes": 10, "width": 8}
    c = config(decoder=decoder, generation={"steps": 1, **settings})
    with c.unlocked():
        c.model.update(encoders={"label": label}, centre="label")
    return build(c)


def test_bits_per_dimension_are_the_decoders_bound_over_real_items():
    experiment = diffusing(17, bits=40)
    state = experiment.init_state()
    weights = {"params": state.params, **state.variables}
    found = _bits_per_dim(experiment, weights, 0, "image", None, "test", 40)
    digits = Digits("test")

    @jax.jit
    def bound(label, items, key):
        of = lambda m: m.decoders["image"].bits_per_dim(m.encoders["label"](label, train=False)[0], items, rng=key)
        return experiment.model.apply(weights, method=of)

    bits = []
    for i in range(2):  # the second batch has 8 rows that are real
        rows = np.arange(32 * i, 32 * i + 32)
        bits.append(bound(digits.labels[rows], digits.images[rows], jax.random.fold_in(jax.random.key(0), i)))
    expected = np.concatenate([bits[0], bits[1][:8]]).mean()
    assert found == pytest.approx(expected, rel=1e-5) and expected > 0.1


def test_adherence_is_the_correlation_of_what_was_given_and_what_is_read_from_the_item():
    rng = np.random.default_rng(0)
    given = rng.normal(size=(200, 4, 4, 1))
    read = lambda item: 2 * item + 3
    assert _adherence(read, given, given) == pytest.approx(1)
    assert _adherence(read, -given, given) == pytest.approx(-1)
    assert abs(_adherence(read, rng.permutation(given), given)) < 0.1
    assert _adherence(read, np.zeros_like(given), given) == 0


@pytest.mark.slow
def test_adherence_is_that_without_control_until_the_branch_has_learned():
    e = controlled(adherence="edges", features="pixels")
    state = e.init_state()
    rng = np.random.default_rng(0)
    leaves, shape = jax.tree.flatten(state.params)
    params = jax.tree.unflatten(shape, [leaf + rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype) for leaf in leaves])
    network = params["decoders_image"]["denoiser"]

    def adherence():
        found = evaluator(e, params, state.variables, "test", 20).metrics
        return found["sample_image_adherence"], found["sample_image_adherence_uncontrolled"]

    trained = network.pop("control_out")
    network["control_out"] = jax.tree.map(np.zeros_like, trained)
    assert len(set(adherence())) == 1
    free = adherence()[1]
    network["control_out"] = trained
    assert adherence()[0] != free == adherence()[1]


def test_bits_are_of_items_with_the_levels_of_the_process():
    experiment = diffusing(16, bits=8)
    with pytest.raises(UserError, match="process.levels=16 values, evenly spaced from 0 to 1; the data have others"):
        evaluated(experiment)
    with pytest.raises(UserError, match="bits=8 needs a decoder that bounds the likelihood"):
        copies(bits=8)


@pytest.mark.parametrize("bottleneck", ["none", {"name": "vq", "codebook_size": 8, "codebook_init": "normal"}])
def test_autoencoders_draw_latents_from_a_density(bottleneck):
    found = evaluated(build(config(bottleneck, generation={"components": 2})), 40).metrics
    assert "sample_image_agreement" not in found and "judge_image_accuracy" not in found  # nothing was asked for
    assert found["sample_image_frechet"] > 0


def test_densities():
    rng = np.random.default_rng(0)
    latents = np.concatenate([rng.normal(5, 1, (500, 2)), rng.normal(-5, 1, (500, 2))])
    own = {"seed": 0, "components": 2}
    drawn = {name: _draw(name, latents, 2000, own) for name in ("prior", "gaussian", "mixture")}
    near = lambda x: (np.abs(np.abs(x) - 5) < 3).all(axis=1).mean()
    assert {name: x.shape for name, x in drawn.items()} == dict.fromkeys(drawn, (2000, 2))
    assert abs(drawn["prior"].std() - 1) < 0.05 and near(drawn["prior"]) < 0.01
    assert abs(drawn["gaussian"].std() - latents.std()) < 0.3 and near(drawn["gaussian"]) < 0.6
    assert near(drawn["mixture"]) > 0.98
    assert (drawn["mixture"][:100, 0] > 0).any() and (drawn["mixture"][:100, 0] < 0).any()  # not one after the other


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"brightnes": 1.0}, "unknown field 'brightnes' in config.eval.generation; did you mean 'brightness'"),
        ({"density": "priors"}, "unknown density 'priors'.*did you mean 'prior'"),
        ({"adherence": "edge"}, "unknown adherence 'edge' in config.eval.generation.adherence; did you mean 'edges'"),
        ({"adherence": "edges"}, "adherence='edges' needs a decoder with a control"),
        ({"features": "nowhere"}, "pixels, judge or a folder.='nowhere' is not the folder of a run"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        copies(**settings)


def test_a_prior_needs_a_posterior():
    with pytest.raises(UserError, match="needs an encoder with a Gaussian posterior"):
        evaluated(build(config(generation={"density": "prior"})), 40)


@pytest.mark.slow
def test_decoders_behind_a_backbone_draw_for_every_task():
    """Both evaluators of an any-to-any model whose images come from a generative decoder."""
    c = tiny.get_config()
    c.mesh.data = 1
    c.model.decoders.image = {"name": f"{HERE}.Copy"}
    del c.model.output_projectors.image
    c.data.tasks = ("audio->image", "text->image")
    c.eval.update(evaluators=("any_to_any", "generation"), judge_examples=200)
    c.eval.generation = {"features": "judge", "brightness": 0.0}
    experiment = build(c)
    state = experiment.init_state()
    found = {}
    for _, evaluate in experiment.evaluators():
        found |= evaluate(experiment, state.params, state.variables, "test", 40).metrics
    for task in ("audio_to_image", "text_to_image"):
        assert found[f"{task}_accuracy"] == found[f"{task}_agreement"] < 0.3  # black images
        assert found[f"{task}_diversity"] == 0 and found[f"{task}_frechet"] > 1
    assert found["judge_image_accuracy"] > 0.8
