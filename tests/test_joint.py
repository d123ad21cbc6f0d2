"""Joint generation (CoDi): what it adds to diffusion decoders, what learns of it, and how its draws are judged."""

import functools
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from configs import codi
from tests import tiny
from vfm import diffusion, flow_matching, objectives, tree
from vfm import model as model_lib
from vfm import run as run_lib
from vfm.data.image import Digits
from vfm.decoders import joint
from vfm.errors import UserError
from vfm.evaluate import joint as evaluator
from vfm.evaluate import spaces
from vfm.evaluate.joint import agreements
from vfm.evaluate.judge import Judge
from vfm.experiment import Experiment
from vfm.objectives.contrastive import infonce
from vfm.objectives.generation import generation_terms

NETWORK = {"name": "dit", "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 8, "frequencies": 8}
GAUSSIAN = {"name": "gaussian", "timesteps": 20}
PLAIN = FrozenDict(GAUSSIAN)
LEARNED = {**GAUSSIAN, "variance": "learned_range"}
JOINT = {"modalities": ("image", "audio"), "width": 8, "depth": 1, "mlp_dim": 8, "frequencies": 8}
KEY = jax.random.key(3)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def config(process=GAUSSIAN, **changes):
    decoder = {"name": "diffusion", "network": NETWORK, "process": process}
    decoders = {"image": {**decoder, "item_shape": (4, 4, 1)}, "audio": {**decoder, "item_shape": (4, 6)}}
    return {"centre": "image", "backbone": None, "decoders": decoders, "joint": JOINT, **changes}


def items(rows=3):
    draw = lambda seed, *shape: jax.random.uniform(jax.random.key(seed), (rows, 1, *shape))
    return {"image": draw(1, 4, 4, 1), "audio": draw(2, 4, 6)}


def is_gate(path):
    return path.endswith("joint_gate")


@functools.cache
def built(process=PLAIN):
    """(model, parameters with random values; those that the joint stage starts as zero are zero)."""
    model = model_lib.build(config(dict(process)))
    shapes = jax.eval_shape(lambda: model_lib.init(model, KEY, 1))["params"]
    rng = np.random.default_rng(0)
    values = {path: rng.normal(0, 0.2, leaf.shape) for path, leaf in tree.flatten(shapes).items()}
    return model, tree.unflatten({path: jnp.asarray(x * (not is_gate(path)), "float32") for path, x in values.items()})


def opened(params):
    """The parameters with other gates than zero."""
    return tree.unflatten({path: x + 0.7 * is_gate(path) for path, x in tree.flatten(params).items()})


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("steps", "sampler", "batch_size"))
def draw(model, name, params, *, rng=KEY, steps=3, batch_size=3, **settings):
    settings |= {"rng": rng, "steps": steps, "batch_size": batch_size}
    if name is None:
        return model.apply({"params": params}, {}, **settings, method="sample_joint")
    return model.apply({"params": params}, name, {}, **settings, method="sample")


@pytest.mark.parametrize(
    "process",
    (
        GAUSSIAN,
        pytest.param(LEARNED, marks=pytest.mark.slow),
        pytest.param({"name": "flow"}, marks=pytest.mark.slow),
    ),
    ids=("gaussian", "learned", "flow"),
)
def test_before_training_items_are_those_that_each_decoder_draws_alone(process):
    model, params = built(FrozenDict(process))
    together = draw(model, None, params)
    assert {name: x.shape for name, x in together.items()} == {"audio": (3, 1, 4, 6), "image": (3, 1, 4, 4, 1)}
    for i, name in enumerate(("audio", "image")):
        alone = draw(model, name, params, rng=jax.random.fold_in(KEY, i))
        np.testing.assert_allclose(together[name], alone, atol=1e-5)
        assert np.asarray(alone).std() > 0.01
    trained = draw(model, None, opened(params))
    for name, x in trained.items():
        assert np.abs(np.asarray(x - together[name])).max() > 1e-3


def test_what_one_draws_depends_on_the_noise_of_the_other():
    shapes, seen, given = {"audio": (4, 6, 1), "image": (4, 4, 1)}, {}, {}

    def sample(denoise, x, rng, **how):
        given.update(how)
        return denoise(x, jnp.zeros(len(x)))

    dynamics = types.SimpleNamespace(learned=False, split=lambda output: (output, None), sample=sample)

    def decoder(name, clip):
        def denoise(x, t, environment):
            seen[name] = environment
            return 2 * x

        return types.SimpleNamespace(
            dynamics=dynamics,
            _denoiser=lambda *_: denoise,
            make_observer=lambda: lambda x, t: x.reshape(len(x), 1, -1),
            noise=lambda rng, count: jax.random.normal(rng, (count, *shapes[name])),
            sampler_options=lambda **settings: {**settings, "clip": clip},
            _outside=lambda x: x + 1,
        )

    decoders = {"audio": decoder("audio", 1.0), "image": decoder("image", None)}
    none = dict.fromkeys(shapes)
    drawn = joint.joint_sample(decoders, none, none, rng=KEY, batch_size=2, steps=7)
    noise = {name: jax.random.normal(jax.random.fold_in(KEY, i), (2, *shapes[name])) for i, name in enumerate(shapes)}
    for name, other in (("audio", "image"), ("image", "audio")):
        np.testing.assert_array_equal(seen[name], noise[other].reshape(2, 1, -1))
        np.testing.assert_array_equal(drawn[name], 2 * noise[name] + 1)
    np.testing.assert_array_equal(given["clip"], [[1.0] * 24 + [np.inf] * 16])  # latents are not clipped
    assert given["steps"] == 7


@pytest.mark.parametrize("dynamics", (diffusion.Gaussian(timesteps=20), flow_matching.Flow()), ids=("gaussian", "flow"))
def test_all_items_are_noisy_at_one_time_and_each_sees_the_other(dynamics):
    read = {}

    def decoder(name):
        def denoiser(x, t, condition, *, control, environment, train):
            read[name] = (x, t, environment)
            return jnp.zeros_like(x), {}

        return types.SimpleNamespace(
            dynamics=dynamics,
            prepare=lambda condition, x, rng, train: (x, condition),
            environment_encoder=lambda x, t, train: (x.reshape(len(x), -1, 4), {"embedding": (x.max(), t.max())}),
            denoiser=denoiser,
        )

    given = {"audio": jnp.ones((5, 2, 6, 1)), "image": jnp.ones((5, 2, 2, 1))}
    decoders = {name: decoder(name) for name in given}
    losses, embeddings = joint.joint_losses(
        decoders, dict.fromkeys(given), given, dict.fromkeys(given), rng=KEY, train=True
    )
    np.testing.assert_array_equal(read["audio"][1], read["image"][1])
    assert len(set(np.asarray(read["image"][1]).tolist())) > 1
    np.testing.assert_array_equal(read["audio"][2], read["image"][0].reshape(5, -1, 4))
    np.testing.assert_array_equal(read["image"][2], read["audio"][0].reshape(5, -1, 4))
    noise = [np.asarray(read[name][0] - given[name]).reshape(5, -1)[:, :4] for name in given]
    assert np.abs(noise[0] - noise[1]).min() > 1e-4  # each has its own
    assert {x.shape for terms in losses.values() for x in terms.values()} == {(5,)}
    assert embeddings["clean"] == {"audio": (1, 0), "image": (1, 0)}
    for name, found in embeddings["noisy"].items():
        assert found == (read[name][0].max(), read[name][1].max()) != (1, 0)


@pytest.mark.slow
def test_the_gradient_reaches_the_joint_parts_by_all_losses():
    model, params = built()
    loss_fn = objectives.build({"name": "generation", "weights": {"contrast": 0.5}}, model)
    batch = {"inputs": items(), "example_mask": jnp.array([1.0, 1.0, 0.0])}

    def losses(params):
        terms, _ = loss_fn(params, {}, batch, KEY, train=True)
        return {name: weight * total / count for name, (weight, total, count) in terms.items()}

    @jax.jit
    def gradients(params):
        """The largest number in the gradient of each loss by each parameter."""
        found = jax.jacrev(losses)(params)
        return {name: {path: jnp.abs(x).max() for path, x in tree.flatten(found[name]).items()} for name in found}

    closed, through = gradients(params), gradients(opened(params))
    assert set(closed) == {"generation_audio_noise", "generation_image_noise", "generation_joint_contrast"}
    added = {path for path in tree.flatten(params) if re.fullmatch(codi.JOINT, path)}
    plain = jax.eval_shape(lambda: model_lib.init(model_lib.build(config(joint=None)), KEY, 1))["params"]
    assert added == set(tree.flatten(params)) - set(tree.flatten(plain))  # what the config lets learn
    of = lambda path: "image" if path.startswith("decoders_image/denoiser") else "audio"
    for path in added:
        reached = path.startswith(("decoders_image/denoiser", "decoders_audio/environment_encoder"))
        if "key/bias" in path:  # which softmax does not see
            continue
        assert (through["generation_image_noise"][path] > 0) == reached, path
        assert (closed["generation_image_noise"][path] > 0) == (is_gate(path) and of(path) == "image"), path
    for path, x in closed["generation_joint_contrast"].items():
        assert (x > 0) == ("environment_encoder" in path) or "key/bias" in path, path


def test_contrast_is_infonce_of_the_rows_that_count():
    model, _ = built()
    rng = np.random.default_rng(0)
    draw = lambda: {name: jnp.asarray(rng.normal(size=(4, 1, 5)), jnp.float32) for name in ("audio", "image")}
    seen = {"noisy": draw(), "clean": draw()}
    out = {"joint": {"embeddings": seen, "scale": 2.0}}
    batch = {"example_mask": jnp.array([1.0, 1.0, 0.0, 1.0])}
    weight, total, count = generation_terms(out, batch, 2.0, {"contrast": 0.5})["generation_joint_contrast"]
    rows = [0, 1, 3]
    # Never of two that are noisy: the time of the row would tell which belong together.
    pairs = (("clean", "clean"), ("noisy", "clean"), ("clean", "noisy"))
    found = [infonce(seen[a]["audio"][rows, 0], seen[b]["image"][rows, 0], 2.0)[0].sum() for a, b in pairs]
    expected = sum(found) / 3
    assert (weight, count) == (1.0, 3)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert "micro-batches" in objectives.build({"name": "generation"}, model).whole_batch


def test_agreements_of_made_up_classes():
    labels = np.arange(200) % 10
    both = lambda a, b: {"image": a, "audio": b}
    classes = {
        "joint": both(labels, np.where(np.arange(200) < 160, labels, (labels + 1) % 10)),
        "alone": both(labels, np.where(np.arange(200) < 20, labels, (labels + 3) % 10)),
        "real": both(labels, labels),
    }
    found = agreements(classes, 0)
    assert found["joint_agreement"] == 0.8 and found["joint_agreement_alone"] == 0.1
    assert found["joint_ratio"] == pytest.approx(8) and found["joint_agreement_real"] == 1
    assert 0.02 < found["joint_agreement_shuffled"] < 0.2
    # One class alone: it is not because the items belong together that they agree.
    one = agreements({**classes, "joint": both(0 * labels, 0 * labels)}, 0)
    assert one["joint_agreement"] == one["joint_agreement_shuffled"] == 1
    never = agreements({**classes, "alone": both(labels, labels + 1)}, 0)
    assert never["joint_ratio"] == pytest.approx(0.8 * 200)


def smoke(**changes):
    """configs/codi.py:smoke with images of digits in the place of sounds too."""
    c = codi.get_config("smoke")
    c.mesh.data = 1
    c.data.sources.audio = {"name": "digits"}
    c.model.decoders.audio = c.model.decoders.image
    for name, value in changes.items():
        c.eval.joint[name] = value
    c.lock()
    return c


@pytest.mark.slow
def test_the_evaluator_judges_what_was_drawn(monkeypatch):
    experiment = Experiment(smoke(shown=3), jax.devices()[:1])
    digits = Digits("test")
    order = np.random.default_rng(0).permutation(len(digits.labels))
    by_class = np.concatenate([np.flatnonzero(digits.labels == k)[:20] for k in range(10)])
    pairs = {"joint": (by_class, np.roll(by_class, 1)), "alone": (order[:200], order[100:300]), "real": (by_class,) * 2}
    drawn = {kind: dict(zip(("audio", "image"), (digits.images[rows] for rows in x))) for kind, x in pairs.items()}
    monkeypatch.setattr(sys.modules["vfm.evaluate.joint"], "_draw", lambda *_: drawn)
    experiment.config.unlock()
    experiment.config.data.repeats, experiment.config.eval.judge_examples = 100, 1000
    found = evaluator(experiment, {}, {}, "test", None)
    # The classifiers are fitted on other draws of the training items, and err on a few digits, each on its own.
    seen = {}
    for name in ("audio", "image"):
        training = spaces.training_items(experiment, name, 1000)
        judge = Judge(training.raw, training.labels)
        seen[name] = {kind: judge.predict(items[name]) for kind, items in drawn.items()}
        assert (seen[name]["real"] == digits.labels[by_class]).mean() > 0.95
    for kind, metric in (
        ("real", "joint_agreement_real"),
        ("joint", "joint_agreement"),
        ("alone", "joint_agreement_alone"),
    ):
        assert found.metrics[metric] == (seen["audio"][kind] == seen["image"][kind]).mean()
    assert found.metrics["joint_agreement"] > 0.85
    assert found.metrics["joint_agreement_alone"] < 0.2 and found.metrics["joint_ratio"] > 4
    assert found.metrics["joint_image_frechet"] == pytest.approx(0, abs=1e-3)
    rows = found.samples["joint"][1]
    assert [row[0][1] for row in rows] == ["audio, together", "image, together", "audio, alone", "image, alone"]
    assert all(len(row) == 4 for row in rows)


@pytest.mark.slow
def test_the_joint_stage_leaves_the_decoders_as_they_were(tmp_path):
    start = smoke()
    start.unlock()
    start.model.joint = {}
    start.eval.evaluators = ()
    run_lib.run(start, str(tmp_path / "start"), jax.devices()[:1])
    stage = smoke()
    stage.unlock()
    stage.init.update(path=str(tmp_path / "start"), match=codi.get_config("joint").init.match)
    stage.optimizer.frozen = codi.get_config("joint").optimizer.frozen
    found = run_lib.run(stage, str(tmp_path / "joint"), jax.devices()[:1])
    assert "joint_agreement" in found
    record = json.loads((tmp_path / "joint" / "parameters.json").read_text())
    assert record["frozen"]["parameters"] and len(record["frozen"]["sha256"]) == 64
    assert set(record["random"]) == {path for path in record["random"] if re.fullmatch(codi.JOINT, path)} != set()


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"modalities": ("image", "sound")}, "sound"),
        ({"modalities": ("image", "text")}, "diffusion"),
        ({"modalities": ("image",)}, "two modalities"),
        ({"modalities": ("image", "image")}, "each once"),
        ({"temperature": 0.0}, "temperature"),
        ({"widht": 8}, "width"),
        ({"width": 2.5}, "whole number"),
    ),
    ids=("unknown", "no diffusion", "one", "twice", "temperature", "field", "type"),
)
def test_bad_fields_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError) as refused:
        model_lib.build(config(joint={**JOINT, **changes}))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_processes_that_differ_are_refused():
    cfg = config()
    cfg["decoders"]["image"] = {**cfg["decoders"]["image"], "process": {"name": "gaussian", "timesteps": 30}}
    with pytest.raises(UserError, match="decoders.audio.process is .*timesteps=20.* decoders.image.process is .*=30"):
        model_lib.build(cfg)


def test_what_is_not_drawn_together_is_refused():
    model = model_lib.build(config(joint=None))
    with pytest.raises(UserError, match="needs model.joint"):
        model.apply({}, {}, rng=KEY, method="sample_joint")
    c = smoke(stepz=3)
    with pytest.raises(UserError, match="steps"):
        Experiment(c, jax.devices()[:1])
