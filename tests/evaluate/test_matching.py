"""All pairs of two modalities in batches, against one pair at a time."""

import functools

import jax
import numpy as np
import pytest

from configs import contrastive
from experiments.contrastive import SCHEMES
from experiments.study import resolve
from tests import tiny
from vfm import flops, tree
from vfm import model as model_lib
from vfm.data.fused import Fused
from vfm.errors import UserError
from vfm.evaluate.matching import item_reader, match_scores, matching, pair_scores
from vfm.experiment import Experiment
from vfm.tokenizers.byte import ByteTokenizer

TOKENIZER, WORDS, LENGTH = ByteTokenizer(), ("one", "three", "nine"), 8


def model_of(backbone, length):
    model = model_lib.build({
        "centre": "text",
        "encoders": {
            "text": {"name": "text", "vocab_size": 259, "width": 12},
            "image": {"name": "vit", "image_size": (4, 4), "patch_size": 2, "width": 12, "depth": 1, "mlp_dim": 8},
        },
        "backbone": {"name": backbone, "width": 12, "depth": 1, "mlp_dim": 8, "max_len": 16},
        "decoders": {"label": {"name": "classifier"}},
    })  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), length))
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.3, leaf.shape).astype(np.float32)
    return model, jax.tree.map(draw, tree.paths(shapes), shapes)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@pytest.mark.parametrize("backbone, length, decoder_length", [("encoder_only", 12, 0), ("cross_encoder", 4, LENGTH)])
def test_all_pairs_equal_one_pair_at_a_time(backbone, length, decoder_length):
    model, variables = model_of(backbone, length)
    fused = Fused(model_lib.layout(model, length), TOKENIZER, decoder_length)
    images = np.random.default_rng(1).normal(size=(4, 4, 4, 1)).astype(np.float32)
    row = lambda i, j: fused.row({"image": images[i]}, WORDS[j])
    scores = match_scores(model, variables, row, len(images), len(WORDS), batch_size=5)  # which does not divide 12
    assert scores.shape == (4, 3) and scores.dtype == np.float32

    forward = jax.jit(lambda batch: model.apply(variables, **batch, train=False)[1]["label"]["logits"])
    for i in range(len(images)):
        for j in range(len(WORDS)):
            batch = {name: value for name, value in row(i, j).items() if name in model_lib.INPUTS}
            logits = np.asarray(forward(jax.tree.map(lambda x: x[None], batch))[0])
            np.testing.assert_allclose(scores[i, j], logits[1] - logits[0], atol=1e-5, err_msg=f"{i}, {j}")
    assert np.abs(scores - scores[0]).max() > 1e-3 and np.abs(scores - scores[:, :1]).max() > 1e-3

    from_words = match_scores(model, variables, lambda j, i: row(i, j), len(WORDS), len(images))  # one batch, too long
    np.testing.assert_allclose(from_words, scores.T, atol=1e-5)
    assert match_scores(model, variables, row, 0, 3).shape == (0, 3)


def experiment_of(**changes):
    """Of the study's configuration, with images and texts alone."""
    base = contrastive.get_config("smoke")
    with base.unlocked():
        del base.study
    base.mesh.data = 1
    base.model.encoders.image = {"name": "vit", "image_size": (8, 16), "width": contrastive.WIDTH, "depth": 1}
    base.model.encoders.text.backbone.depth = 1
    return Experiment(resolve(base, {"data.repeats": 1, **changes}), jax.devices()[:1])


FUSED = contrastive.fusion(("image-text",))


def test_retrieval_by_hand():
    """A model that is not trained, with larger parameters: its ranks are those of the scores of all pairs."""
    experiment = experiment_of(**FUSED)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape), experiment.init_state().params)
    found, samples = matching(experiment, params, {}, "test", 12)
    dataset = experiment.dataset("test")
    rows = [dataset.example(i, np.random.default_rng(0)) for i in range(12)]
    items = {name: np.stack([row["inputs"][name][0] for row in rows]) for name in ("image", "text")}
    read = jax.jit(item_reader(experiment.model))(params, {}, items)
    x, y = ((read["features"][name], read["real"][name]) for name in ("image", "text"))
    scores = jax.jit(functools.partial(pair_scores, experiment.model, ("image", "text")))({"params": params}, x, y)
    scores = np.asarray(scores)
    places = {"image_text": (scores >= np.diag(scores)[:, None]).sum(axis=1)}
    places["text_image"] = (scores >= np.diag(scores)).sum(axis=0)
    for name, place in places.items():
        assert len(set(place.tolist())) > 1
        for k in (1, 5, 10):
            assert found[f"r{k}_{name}"] == pytest.approx((place <= k).mean())
    caption, table = samples["retrieval"]
    assert "12 items" in caption and [row[1][1] for row in table[1:]] == ["pairs of them"] * 2
    # What a candidate costs: a pass of both items' features through the backbone.
    block = 4 * contrastive.WIDTH**2 + 2 * contrastive.WIDTH * 2 * contrastive.WIDTH  # attention; MLP
    length = 8 + contrastive.LENGTH  # the patches; the text
    candidate = 2 * block * length + 2 * 2 * length**2 * contrastive.WIDTH + 2 * contrastive.WIDTH * 2
    encoders = flops.count(item_reader(experiment.model), params, {}, {n: x[:1] for n, x in items.items()})
    assert found["query_flops"] == encoders / 2 + 12 * candidate


@pytest.mark.parametrize(
    "changes, message",
    [
        ({**SCHEMES["image-text alone"], "eval.evaluators": ("matching",)}, "'matching' needs a backbone"),
        ({**FUSED, "eval.matching": {"top": 1}}, "unknown field 'top' in config.eval.matching"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        experiment_of(**changes)
