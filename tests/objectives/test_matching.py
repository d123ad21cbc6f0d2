"""Matching by a fusion encoder: its score against the whole model, its loss against NumPy, its negatives."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vfm import model as model_lib
from vfm import objectives, sharding, tree
from vfm.data.aligned import parse_pairs, slots
from vfm.errors import UserError
from vfm.evaluate.matching import item_reader, pair_scores

B, D, T, PAD = 6, 12, 7, 0
PAIRS = ("image-text", "vector-text")
BLOCK = {"width": D, "depth": 1, "mlp_dim": 8}
MODEL = {
    "centre": "text",
    "encoders": {
        "text": {
            "name": "text_transformer",
            "vocab_size": 9,
            "length": T,
            "width": D,
            "pad_id": PAD,
            "backbone": {"name": "encoder_only", "depth": 1, "mlp_dim": 8},
        },
        "image": {"name": "vit", "image_size": (4, 4), "patch_size": 2, "width": 10, "depth": 1, "mlp_dim": 8},
        "vector": {"name": "vector", "num_features": 3, "width": D},
    },
    "input_projectors": {"image": {"name": "linear", "width": D}},
    "backbone": {"name": "encoder_only", "max_len": 16, "num_token_types": 3, **BLOCK},
    "decoders": {"label": {"name": "classifier", "pooling": "mean"}},
}
CROSS = {**MODEL, "backbone": {"name": "cross_encoder", "max_len": 16, **BLOCK}}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@functools.cache
def setting(cross: bool):
    model, rng = model_lib.build(CROSS if cross else MODEL), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))["params"]
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.4, leaf.shape).astype(np.float32)
    params = jax.tree.map(draw, tree.paths(shapes), shapes)
    params["decoders_label"]["classes"]["kernel"] *= 4  # scores that differ
    return model, params


def batch_of(rng):
    """The last row only fills the batch; rows 0 and 2 show the same."""
    lengths = rng.integers(2, T + 1, (B, 2, 1))
    text = np.where(np.arange(T) < lengths, rng.integers(1, 9, (B, 2, T)), PAD).astype(np.int32)
    inputs = {
        "image": rng.normal(size=(B, 1, 4, 4, 1)).astype(np.float32),
        "text": text,
        "vector": rng.normal(size=(B, 1, 3)).astype(np.float32),
    }
    label = np.array([[3, 1], [1, 2], [3, 1], [4, 3], [5, 4], [6, 5]], np.int32)
    return {"inputs": inputs, "label": label, "example_mask": np.array([1, 1, 1, 1, 1, 0], np.float32)}


@functools.cache
def all_scores(cross: bool):
    """{pair: float[B, B]} of the batch's items, as the evaluator has them."""
    model, params = setting(cross)
    inputs, pairs = batch_of(np.random.default_rng(1))["inputs"], parse_pairs(PAIRS, model.encoders, "")
    found = {}
    for pair, places in zip(pairs, slots(pairs)):
        items = {name: inputs[name][:, i] for name, i in zip(pair, places)}
        read = jax.jit(item_reader(model))(params, {}, items)
        x, y = ((read["features"][name], read["real"][name]) for name in pair)
        found["-".join(pair)] = np.asarray(
            jax.jit(functools.partial(pair_scores, model, pair))({"params": params}, x, y)
        )
    return found


def test_the_score_is_that_of_the_whole_model():
    model, params = setting(False)
    inputs = batch_of(np.random.default_rng(1))["inputs"]
    image, text = inputs["image"], inputs["text"][:, :1]
    slots_of_image = 4

    @jax.jit
    def forward(image, text):
        real = jnp.concatenate([jnp.ones((1, slots_of_image), bool), text[:, 0] != PAD], axis=1)
        types = jnp.repeat(jnp.asarray([[0, 1]]), jnp.asarray([slots_of_image, T]), axis=1, total_repeat_length=11)
        _, out = model.apply(
            {"params": params},
            inputs={"image": image, "text": text},
            starts={"image": jnp.zeros((1, 1), jnp.int32), "text": jnp.full((1, 1), slots_of_image)},
            input_mask=real,
            token_types=types,
            train=False,
        )
        return out["label"]["logits"][0]

    for i in range(2):
        for j in range(B):
            no, yes = forward(image[i : i + 1], text[j : j + 1])
            assert all_scores(False)["image-text"][i, j] == pytest.approx(float(yes - no), abs=1e-4)


def test_by_cross_attention_the_second_item_asks():
    model, params = setting(True)
    inputs = batch_of(np.random.default_rng(1))["inputs"]

    def forward(model, image, text):
        x, _ = model.encoders["image"](image, train=False)
        x, _ = model.input_projectors["image"](x, train=False)
        y, _ = model.encoders["text"](text, train=False)
        z, _ = model.backbone(x, decoder_x=y, decoder_mask=text != PAD, train=False)
        return model.decoders["label"](z, input_mask=text != PAD, train=False)[0]

    logits = jax.jit(nn.apply(forward, model))({"params": params}, inputs["image"][:, 0], inputs["text"][:, 0])
    np.testing.assert_allclose(np.diag(all_scores(True)["image-text"]), logits[:, 1] - logits[:, 0], atol=1e-4)


def softplus(x):
    return np.logaddexp(0, x)


def rank_loss(score, i, j):
    return (softplus(score[i, j] - score[i, i]) + softplus(score[i, j] - score[j, j])) / 2


def others_of(batch, k, i):
    """Rows that can be negatives of row i: the last one is none, and those that show the same are none."""
    found = [j for j in range(B - 1) if batch["label"][j, k] != batch["label"][i, k]]
    assert len(found) == (3 if i in (0, 2) else 4)
    return found


@pytest.mark.parametrize("cross", [False, True])
def test_the_loss_equals_numpy(cross):
    """With all other rows as negatives nothing is left to chance."""
    model, params = setting(cross)
    batch = batch_of(np.random.default_rng(1))
    loss_fn = objectives.build({"name": "matching", "pairs": PAIRS, "same_label": "ignored", "negatives": B - 1}, model)
    terms, aux = jax.jit(functools.partial(loss_fn, train=True))(params, {}, batch, jax.random.key(3))
    for k, name in enumerate(PAIRS):
        score, total, hits = all_scores(cross)[name], [], []
        for i in range(B - 1):
            others = others_of(batch, k, i)
            hits.append(score[i, i] > max(score[i, j] for j in others))
            total += [rank_loss(score, i, j) for j in others]
        weight, found, count = terms[name]
        assert (weight, count) == (1, len(total))
        np.testing.assert_allclose(found, sum(total), rtol=1e-4)
        assert float(aux.metrics[f"hits_{name}"][0]) == sum(hits) and float(aux.metrics[f"hits_{name}"][1]) == B - 1


def test_hard_negatives_are_drawn_by_their_score():
    model, params = setting(False)
    batch = batch_of(np.random.default_rng(1))
    fields = {"pairs": PAIRS, "same_label": "ignored", "candidates": 99}
    loss_fn = objectives.build({"name": "matching", **fields}, model)
    run = lambda key: loss_fn(params, {}, batch, key, train=True)[0]
    terms = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 400))
    for k, name in enumerate(PAIRS):
        score, mean, variance, random = all_scores(False)[name], 0, 0, 0
        for i in range(B - 1):
            others = others_of(batch, k, i)
            losses = np.array([rank_loss(score, i, j) for j in others])
            chance = np.exp(score[i, others]) / np.exp(score[i, others]).sum()
            mean, random = mean + chance @ losses, random + losses.mean()
            variance += chance @ losses**2 - (chance @ losses) ** 2
        error = (variance / 400) ** 0.5
        assert random < mean - 10 * error  # what is to be seen at all
        assert (
            float(terms[name][1].mean()) == pytest.approx(float(mean), abs=4 * float(error))
            and (terms[name][2] == B - 1).all()
        )


def test_random_negatives_are_others_and_change_with_the_key():
    model, params = setting(False)
    batch = batch_of(np.random.default_rng(1))
    del batch["example_mask"]
    loss_fn = objectives.build({"name": "matching", "pairs": PAIRS}, model)
    run = jax.jit(lambda key: loss_fn(params, {}, batch, key, train=True)[0]["image-text"])
    score = all_scores(False)["image-text"]
    possible = np.array([sum(rank_loss(score, i, (i + shift) % B) for i in range(B)) for shift in range(1, B)])
    gaps = [np.abs(possible - float(run(jax.random.key(seed))[1])) for seed in range(12)]
    assert len({int(gap.argmin()) for gap in gaps}) > 1 and max(gap.min() for gap in gaps) < 1e-3


def total(loss_fn):
    """(params, batch) -> (loss, gradient), jitted."""

    def loss(params, batch):
        terms, _ = loss_fn(params, {}, batch, jax.random.key(0), train=True)
        return sum(total / count for _, total, count in terms.values())

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.slow
def test_all_parameters_learn_and_two_devices_are_one():
    """Other rows are those of all devices."""
    model, params = setting(False)
    loss_fn = objectives.build({"name": "matching", "pairs": PAIRS, "candidates": 3}, model)
    batch = batch_of(np.random.default_rng(1))
    expected, gradients = total(loss_fn)(params, batch)
    for path, gradient in tree.flatten(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient) or path == "decoders_label/classes/bias", path  # which is the same for all pairs
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    with sharding.use_mesh(mesh):
        there = jax.device_put(batch, sharding.batch_sharding(mesh))
        found, found_gradients = total(loss_fn)(params, there)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for x, y in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.parametrize(
    "fields, changes, message",
    [
        ({"pairs": ("image-txt",)}, {}, "unknown modality 'txt'"),
        ({"pairs": ("image-text",)}, {}, "no pair names vector"),
        ({"negatives": 0}, {}, "negatives=0 must be at least 1"),
        ({"negatives": 3, "candidates": 2}, {}, "candidates=2 0 or no fewer"),
        ({"same_label": "positive"}, {}, "unknown same_label"),
        ({}, {"decoders": {}}, "needs model.decoders.label"),
        ({}, {"decoders": {"label": {"name": "classifier", "num_classes": 3}}}, "label with num_classes=2"),
        ({}, {"backbone": {"name": "decoder_only", **BLOCK}}, "encoder_only or cross_encoder"),
        ({}, {"backbone": {**MODEL["backbone"], "num_token_types": 2}}, "num_token_types=2 must be 0, or"),
        ({}, {"encoders": {**MODEL["encoders"], "text": {"name": "text", "width": D}}}, "encoders.text.*one token"),
    ],
)
def test_bad_settings_are_one_line(fields, changes, message):
    model = model_lib.build({**MODEL, **changes})
    with pytest.raises(UserError, match=message):
        objectives.build({"name": "matching", "pairs": PAIRS, **fields}, model)


def test_bad_batches_are_one_line():
    model, params = setting(False)
    batch = batch_of(np.random.default_rng(1))
    build = lambda **fields: objectives.build({"name": "matching", "pairs": PAIRS, **fields}, model)
    run = lambda loss_fn, batch: jax.eval_shape(lambda: loss_fn(params, {}, batch, jax.random.key(0), train=True))
    with pytest.raises(UserError, match="6 rows none has 6 others"):
        run(build(negatives=6), batch)
    with pytest.raises(UserError, match="same_label='ignored' needs batches with a label"):
        run(build(same_label="ignored"), {name: value for name, value in batch.items() if name != "label"})
    one = {**batch["inputs"], "text": batch["inputs"]["text"][:, :1]}
    with pytest.raises(UserError, match=r"1 item\(s\) of 'text', but 2 pair\(s\)"):
        run(build(), {**batch, "inputs": one})
