"""Retrieval and the geometry of a shared space, by hand, against the reference, and on a small model."""

import math
import pathlib

import jax
import numpy as np
import pytest

from configs import contrastive
from configs.digits import WORDS
from tests import tiny
from vfm import flops
from vfm.errors import UserError
from vfm.evaluate.retrieval import (
    alignment,
    hit_rate,
    modality_gap,
    ranks,
    reader,
    retrieval,
    uniformity,
)
from vfm.experiment import Experiment

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions" / "retrieval_recall" / "io.npz"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
def test_equals_the_reference_library():
    io = np.load(FIXTURE)
    similarity, relevant = io["in/similarity"], io["in/relevant"] > 0
    place = ranks(similarity, relevant)
    for k in (1, 3, 5, 10):
        assert hit_rate(place, k) == pytest.approx(float(io[f"out/hit_rate@{k}"]), abs=1e-6)


def test_ranks_by_hand():
    similarity = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.3], [0.5, 0.5, 0.5]])
    assert ranks(similarity, np.eye(3, dtype=bool)).tolist() == [3, 3, 3]  # what is as near counts as nearer
    assert ranks(similarity, np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]]) > 0).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no relevant item"):
        ranks(similarity, np.zeros((3, 3), bool))


def test_geometry_by_hand():
    a, b = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, -1.0]])
    assert alignment(a, b) == pytest.approx(2.0)  # (0 + 4) / 2
    assert modality_gap(a, b) == pytest.approx(1.0)  # (0.5, 0.5) and (0.5, -0.5)
    assert uniformity(a) == pytest.approx(-4.0)  # one pair at squared distance 2


def config(**changes):
    c = contrastive.get_config("smoke")
    c.mesh.data = 1
    c.data.update(compose=1, repeats=1, size=300)
    c.data.augment = {}
    c.data.sources.audio.update(duration=0.256)
    c.model.encoders.image = {"name": "vit", "image_size": (8, 8), "width": contrastive.WIDTH, "depth": 1}
    c.eval.retrieval = {
        "probe_examples": 200,
        "classes": WORDS,
        "templates": ("{}", "{} "),
        "neighbours": 3,
    }
    for name in c.model.encoders:
        depth = c.model.encoders[name].get("backbone", c.model.encoders[name])
        depth.depth = 1
    c.update_from_flattened_dict(changes)
    return c


def test_an_untrained_model_by_hand(tmp_path):
    experiment = Experiment(config(), jax.devices()[:1])
    params = experiment.init_state().params
    found, samples = retrieval(experiment, params, {}, "test", None)
    dataset = experiment.dataset("test")
    assert len(dataset) == 10  # the words, once each; batches of 16 are filled
    read = reader(experiment)(params, {}, dataset, 10)
    rows = [dataset.example(i, np.random.default_rng(0)) for i in range(10)]
    embed = jax.jit(lambda inputs: experiment.model.apply({"params": params}, inputs=inputs, train=False)[1])
    one = [embed({name: items[None, :1] for name, items in row["inputs"].items()}) for row in rows]
    for name in contrastive.MODALITIES:
        x = np.stack([out[name]["embedding"][0, 0] for out in one])
        np.testing.assert_allclose(read["embedding"][name], x, atol=1e-5)
        np.testing.assert_array_equal(read["label"][name], [row["label"][0] for row in rows])
    image, text = (np.stack([out[name]["embedding"][0, 0] for out in one]) for name in ("image", "text"))
    nearest = (image @ text.T).argmax(axis=1)
    assert found["r1_image_text"] == pytest.approx(np.mean(nearest == np.arange(10)))
    assert found["r10_image_text"] == 1.0
    centres = []
    for word in WORDS:
        prompts = []
        for text in (word, word + " "):
            ids = [*experiment.tokenizer.encode(text), experiment.tokenizer.eos_id]
            item = np.asarray([[ids + [experiment.tokenizer.pad_id] * (contrastive.LENGTH - len(ids))]], np.int32)
            prompts.append(np.asarray(embed({"text": item})["text"]["embedding"][0, 0]))
        centres.append(np.mean(prompts, axis=0) / np.linalg.norm(np.mean(prompts, axis=0)))
    labels = np.asarray([row["label"][0] for row in rows])
    expected = np.mean((image @ np.stack(centres).T).argmax(axis=1) == labels)
    assert found["zero_shot_image"] == pytest.approx(expected)
    assert found["probe_image"] == pytest.approx(found["probe_random_image"])  # nothing is trained yet
    assert found["probe_pca_image"] > 0.4 and 0 <= found["knn_image"] <= 1  # the labels are those of the items
    assert found["gap_image_text"] == pytest.approx(modality_gap(read["embedding"]["image"], read["embedding"]["text"]))
    encoders = flops.count(
        lambda: embed({n: np.zeros((1, 1, *x.shape[1:]), x.dtype) for n, x in rows[0]["inputs"].items()})
    )
    assert found["query_flops"] == pytest.approx(encoders / 3 + 10 * 2 * contrastive.SPACE)
    table = samples["retrieval"][1]
    assert len(table) == 7 and table[1][1][1] == "pairs of them"
    assert samples["space"][1][0][0][1].ndim == 3
    shown, heat = samples["rollout_image"][1][0]
    np.testing.assert_array_equal(shown[1], read["raw"]["image"][0])
    assert heat[1].shape == (8, 8) and heat[1].max() == 1 and heat[1].min() > 0


def test_emergent_pairs_are_marked():
    c = config(**{"objective.pairs": ("image-text", "audio-text"), "data.pairs": ("image-text", "audio-text")})
    c.eval.retrieval = {"k": (1,), "picture": "", "maps": 0}
    experiment = Experiment(c, jax.devices()[:1])
    found, samples = retrieval(experiment, experiment.init_state().params, {}, "test", 6)
    assert set(samples) == {"retrieval"} and not any(name.startswith("probe") for name in found)
    marked = {row[0][1] for row in samples["retrieval"][1] if "emergent" in row[1][1]}
    assert marked == {"image → audio", "audio → image"}
    assert math.isfinite(found["uniformity_text"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval.retrieval": {"kk": (1,)}}, "unknown field 'kk' in config.eval.retrieval"),
        ({"eval.retrieval": {"classes": ("a",), "templates": ("a photo",)}}, "'a photo' has no place {}"),
        ({"eval.retrieval": {"picture": "tsne"}}, "picture='tsne' must be"),
        ({"train.accumulate": 2}, "accumulate=2: objective 'contrastive'.*config.objective.cache"),
        ({"data.pairs": ("image-text",)}, "config.objective.pairs=.* must be the same"),
    ],
)
def test_bad_input_is_one_line(changes, message):
    c = contrastive.get_config("smoke")
    c.mesh.data = 1
    for field, value in changes.items():
        section, name = field.split(".")
        c[section][name] = value
    with pytest.raises(UserError, match=message):
        Experiment(c, jax.devices()[:1]).check_data("train")
