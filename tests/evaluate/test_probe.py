"""Linear probes: the choice of features, pooling, and the evaluator on a model that knows nothing."""

import jax
import numpy as np
import pytest

from tests import tiny
from tests.evaluate import families
from vfm.data.passages import Passages
from vfm.errors import UserError
from vfm.evaluate.probe import LinearProbe, check_probe, fit, probe, reader


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def test_features_that_only_name_the_documents_are_not_chosen():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    labels = rng.integers(0, 3, 60)[groups]
    names = np.eye(60)[groups]  # of every document that was seen all is known, of others nothing
    signal = np.eye(3)[labels] + rng.normal(0, 0.6, (240, 3))
    found = fit({"names": names, "signal": signal, "noise": rng.normal(size=(240, 3))}, labels, groups)
    assert found.name == "signal" and list(found.scores) == ["names", "signal", "noise"]
    assert found.scores["signal"] > 0.75 and found.scores["names"] < 0.6 and found.scores["noise"] < 0.6
    assert LinearProbe(names, labels).accuracy(names, labels) == 1.0  # it would win on documents that it has seen
    assert found.model.accuracy(signal, labels) > 0.75
    assert set(found.model.predict(signal)) == {0, 1, 2}


def test_one_class_and_no_features_are_refused():
    with pytest.raises(UserError, match="at least two classes"):
        fit({"a": np.zeros((4, 2))}, np.zeros(4), np.arange(4))
    with pytest.raises(UserError, match="needs features"):
        fit({}, np.zeros(4), np.arange(4))


def test_pooled_features_are_means_over_real_tokens(tmp_path):
    experiment = families.experiment(tmp_path, "span_corruption")
    weights = {"params": experiment.init_state().params}
    passages = Passages(
        experiment.config.data.source, split="test", tokenizer=experiment.tokenizer, length=8, most=10, labelled=True
    )
    names = ("output", "backbone/encoder/layers", "backbone/encoder/output")
    found, there = reader(experiment, names)(weights, passages)
    assert there.tolist() == [*range(len(passages))]
    layers = {f"backbone/encoder/layers/{i}" for i in range(2)}
    assert set(found) == {"output", "backbone/encoder/output", *layers}
    assert {x.shape for x in found.values()} == {(10, 16)}  # of 8 + 2 rows, without those that fill the batch
    short = next(i for i, ids in enumerate(passages.ids) if len(ids) == 6)
    apply = jax.jit(lambda weights, tokens: experiment.model.apply(weights, tokens, train=False)[1])
    out = apply(weights, passages.ids[short][None])  # the sentence alone, without padding
    for name, x in (
        ("output", out["output"]),
        ("backbone/encoder/layers/1", out["backbone"]["encoder"]["layers"][1]),
        ("backbone/encoder/output", out["backbone"]["encoder"]["output"]),
    ):
        np.testing.assert_allclose(found[name][short], x[0].mean(axis=0), atol=1e-5)


def test_a_trained_model_is_compared_with_an_untrained_one_and_with_the_majority(tmp_path):
    experiment = families.experiment(tmp_path)
    state = experiment.init_state()
    found = probe(experiment, state.params, state.variables, "test", None)
    metrics = found.metrics
    assert metrics["probe_accuracy"] == metrics["probe_random_accuracy"] > 0.9  # the word is there to be read
    assert metrics["probe_majority"] == pytest.approx(1 / 3)
    assert (metrics["probe_examples"], metrics["probe_classes"]) == (30, 3)
    rows = found.samples["probe"][1]
    assert [row[0][1] for row in rows] == [
        f"{prefix}: backbone/layers/{i}" for prefix in ("probe", "probe_random") for i in range(2)
    ]
    silent = jax.tree.map(lambda x: 0 * x, state.params)
    metrics = probe(experiment, silent, state.variables, "test", 12).metrics
    assert metrics["probe_accuracy"] <= 0.5 < metrics["probe_random_accuracy"] and metrics["probe_examples"] == 12


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("data.source.label_field", "", "needs labels: set config.data.source.label_field"),
        ("eval.probe.length", 64, "eval.probe.length=64 is longer than model.backbone.max_len=40"),
        ("eval.probe.features", ("backbone/layer",), "unknown features 'backbone/layer'.*mean 'backbone/layers'"),
        ("eval.probe.layers", 3, "unknown field 'layers' in config.eval.probe"),
        ("data.name", "pairs", "needs config.data.name='text'"),
    ],
)
def test_what_is_refused(tmp_path, field, value, words):
    experiment = families.experiment(tmp_path)
    with experiment.config.unlocked():
        experiment.config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words):
        check_probe(experiment)
