"""The exclusive or of two modalities: both fusion encoders solve it, no modality does alone. And the pretraining."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from vfm import model as model_lib
from vfm.evaluate.matching import match_scores
from vfm.experiment import Experiment
from vfm.run import load, run

FILE = pathlib.Path(__file__).parent.parent / "configs" / "fusion.py"


def config_of(arg):
    spec = importlib.util.spec_from_file_location("fusion_config", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    config.lock()
    return config


@pytest.mark.slow
@pytest.mark.parametrize("arg", ["", "cross"])
def test_a_fusion_encoder_solves_the_task(arg, tmp_path):
    assert run(config_of(arg), str(tmp_path), jax.devices()[:1])["test_label_accuracy"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("arg", ["image_only", "text_only"])
def test_one_modality_alone_is_at_chance(arg, tmp_path):
    config = config_of(arg)
    config.train.steps = 500  # where both together are far above
    assert 0.45 <= run(config, str(tmp_path), jax.devices()[:1])["test_label_accuracy"] <= 0.55


def trained(config, path):
    """What a run gives: its results, the experiment, the variables, and the test rows."""
    results = run(config, str(path), jax.devices()[:1])
    experiment = Experiment(config, jax.devices()[:1])
    weights, _ = load(experiment, path)
    return results, experiment, {"params": weights["params"], **weights["variables"]}, experiment.dataset("test")


@pytest.mark.slow
def test_pretraining_tells_what_belongs_together(tmp_path):
    """Also as a scorer of all pairs, which finds the word of an image."""
    results, experiment, variables, dataset = trained(config_of("pretrain"), tmp_path)
    assert results["test_label_accuracy"] > 0.9 and results["test_token_accuracy"] > 0.9
    images, labels = dataset.sources["image"].images[:100], dataset.sources["image"].labels[:100]
    row = lambda i, j: dataset.fused.row({"image": images[i]}, dataset.words[j])
    scores = match_scores(experiment.model, variables, row, len(images), len(dataset.words))
    assert (scores.argmax(axis=1) == labels).mean() > 0.85


@pytest.mark.slow
def test_masked_slots_are_recovered_from_the_text(tmp_path):
    config = config_of("pretrain")
    config.data.region_rate = 0.5  # some items are then masked whole
    _, experiment, variables, dataset = trained(config, tmp_path)
    with_text, without = (class_accuracy(experiment, variables, dataset, text) for text in (True, False))
    assert with_text > 0.3 and without < 0.2


def class_accuracy(experiment, variables, dataset, text: bool) -> float:
    """How often the features recovered for an item that is masked whole are nearest to the mean ones of its class."""
    source, count = dataset.sources["image"], 200
    labels = source.labels[:count]
    rows = [dataset.fused.row({"image": source.images[i]}, dataset.words[labels[i]] if text else None)
            for i in range(count)]  # fmt: skip
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    batch["masked"] = {"image": np.ones((count, 1, experiment.layout.modality("image").slots), bool)}
    inputs = {name: batch[name] for name in model_lib.INPUTS if name in batch}
    _, out = jax.jit(lambda inputs: experiment.model.apply(variables, **inputs, train=False))(inputs)
    found, real = (np.asarray(out["image"][name]).reshape(count, -1) for name in ("recovered", "features"))
    means = np.stack([real[labels == label].mean(axis=0) for label in range(10)])
    nearest = np.square(found[:, None] - means[None]).sum(axis=-1).argmin(axis=1)
    return float((nearest == labels).mean())
