"""The terms of a fusion encoder's pretraining against NumPy, and what masked slots hide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import model as model_lib
from vfm import objectives, tree
from vfm.errors import UserError

V, D, W, P, T, B = 11, 12, 10, 4, 9, 4
MODEL = {
    "centre": "text",
    "encoders": {
        "text": {"name": "text", "vocab_size": V, "width": D},
        "image": {"name": "vit", "image_size": (4, 4), "patch_size": 2, "width": W, "depth": 1, "mlp_dim": 8},
    },
    "input_projectors": {"image": {"name": "linear", "width": D}},
    "backbone": {"name": "encoder_only", "width": D, "depth": 1, "mlp_dim": 8, "max_len": T},
    "output_projectors": {"image": {"name": "linear", "width": W}},
    "decoders": {"text": {"name": "text", "vocab_size": V}, "label": {"name": "classifier"}},
}


def batch_of(rng):
    """The last row only fills the batch; row 2 does not match."""
    masked = rng.random((B, 1, P)) < 0.5
    masked[:, 0, 0], masked[:, 0, 1] = True, False
    label = np.array([1, 1, 0, 1], np.int32)
    real = np.array([1, 1, 1, 0], np.float32)
    return {
        "tokens": rng.integers(0, V, (B, T)).astype(np.int32),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "loss_mask": (np.arange(T)[None] == 6) * (label * real)[:, None],
        "input_mask": np.arange(T)[None] < np.array([T, 8, T, T])[:, None],
        "inputs": {"image": rng.normal(size=(B, 1, 4, 4, 1)).astype(np.float32)},
        "starts": {"image": np.ones((B, 1), np.int32)},
        "masked": {"image": masked},
        "region_mask": {"image": masked * label.astype(np.float32)[:, None, None]},
        "label": label,
        "example_mask": real,
    }


@pytest.fixture(scope="module")
def setting():
    model, rng = model_lib.build(MODEL), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))["params"]
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.3, leaf.shape).astype(np.float32)
    params = jax.tree.map(draw, tree.paths(shapes), shapes)
    forward = jax.jit(lambda params, batch: model.apply(
        {"params": params}, **{k: batch[k] for k in model_lib.INPUTS if k in batch}, train=False))  # fmt: skip
    return model, params, batch_of(rng), forward


def test_terms_equal_numpy(setting):
    model, params, batch, forward = setting
    weights = {"text": 2.0, "region": 0.5, "matching": 3.0}
    loss_fn = objectives.build({"name": "fusion", **weights}, model)
    terms, aux = jax.jit(lambda p, b: loss_fn(p, {}, b, jax.random.key(0), train=True))(params, batch)
    logits, out = forward(params, batch)
    assert set(terms) == {"text", "region_image", "matching"}
    assert {name: term[0] for name, term in terms.items()} == {"text": 2.0, "region_image": 0.5, "matching": 3.0}

    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], 2)[..., 0]
    np.testing.assert_allclose(terms["text"][1:], [(nll * batch["loss_mask"]).sum(), 2], rtol=1e-5)

    image = jax.tree.map(np.asarray, out["image"])
    assert image["recovered"].shape == image["features"].shape == (B, 1, P, W)
    error = np.square(image["recovered"] - image["features"]).mean(axis=-1)
    mask = batch["region_mask"]["image"] * batch["example_mask"][:, None, None]
    assert mask[2].sum() == mask[3].sum() == 0 < mask.sum()
    np.testing.assert_allclose(terms["region_image"][1:], [(error * mask).sum(), mask.sum()], rtol=1e-5)

    log_p = np.asarray(jax.nn.log_softmax(out["label"]["logits"]))[np.arange(3), batch["label"][:3]]
    np.testing.assert_allclose(terms["matching"][1:], [-log_p.sum(), 3], rtol=1e-5)
    right = np.asarray(out["label"]["logits"]).argmax(axis=-1)[:3] == batch["label"][:3]
    np.testing.assert_allclose(aux.metrics["label_accuracy"], [right.sum(), 3])
    assert aux.metrics["token_accuracy"][1] == 2


def test_what_is_recovered_is_the_output_at_the_items_own_slots(setting):
    model, params, batch, forward = setting
    _, out = forward(params, batch)
    linear = params["output_projectors_image"]["projection"]
    expected = np.asarray(out["output"])[:, None, 1 : 1 + P] @ linear["kernel"] + linear["bias"]
    np.testing.assert_allclose(out["image"]["recovered"], expected, atol=1e-5)


def test_a_masked_slot_holds_the_learned_input_and_nothing_of_the_image(setting):
    model, params, batch, forward = setting
    image = {**batch, "masked": {"image": np.ones((B, 1, P), bool)}}
    logits, _ = forward(params, image)
    other, _ = forward(params, {**image, "inputs": {"image": batch["inputs"]["image"] + 1}})
    np.testing.assert_array_equal(other, logits)  # an item that is masked whole is not seen at all
    for slot in range(P):  # each has an embedding of its own, which reaches all tokens
        signals = params["signals_image"].copy()
        signals[slot] = -signals[slot]
        moved, _ = forward({**params, "signals_image": signals}, image)
        assert (np.abs(moved - logits).max(axis=-1) > 1e-4).all(), slot
    nothing = {**batch, "masked": {"image": np.zeros((B, 1, P), bool)}}
    plain, _ = forward(params, nothing)
    expected, _ = forward(params, {name: value for name, value in batch.items() if name != "masked"})
    np.testing.assert_array_equal(plain, expected)
    assert (np.abs(plain - forward(params, batch)[0]).max(axis=-1) > 1e-4).all()


def test_the_target_of_the_regression_gives_no_gradient(setting):
    model, params, batch, _ = setting
    loss_fn = objectives.build({"name": "fusion", "text": 0.0, "region": 1.0, "matching": 0.0}, model)

    @jax.jit
    def norms(masked):
        def loss(params):
            terms, _ = loss_fn(params, {}, {**batch, "masked": {"image": masked}}, jax.random.key(0), train=True)
            assert set(terms) == {"region_image"}
            return terms["region_image"][1]

        return jax.tree.map(lambda g: jnp.abs(g).sum(), jax.grad(loss)(params))

    total = lambda tree_: float(sum(jax.tree.leaves(tree_)))
    whole = norms(np.ones((B, 1, P), bool))  # then the encoder is nowhere but in the target
    assert total(whole["encoders_image"]) == 0
    assert min(total(whole[name]) for name in ("signals_image", "output_projectors_image", "backbone")) > 1e-3
    assert total(norms(batch["masked"]["image"])["encoders_image"]) > 1e-3


CROSS = {**MODEL, "backbone": {**MODEL["backbone"], "name": "cross_encoder"}}


def test_a_cross_encoder_learns_by_text_and_matching(setting):
    batch = setting[2]
    model = model_lib.build({**CROSS, "output_projectors": {}})
    params = jax.jit(lambda: model_lib.init(model, jax.random.key(0), T)["params"])()
    cross = {name: batch[name] for name in ("inputs", "targets", "loss_mask", "label", "example_mask")} | {
        "starts": {"image": np.zeros((B, 1), np.int32)},
        "input_mask": np.ones((B, P), bool),
        "decoder_tokens": batch["tokens"],
        "decoder_mask": batch["input_mask"],
    }
    loss_fn = objectives.build({"name": "fusion", "region": 0.0}, model)
    terms, _ = jax.jit(lambda p: loss_fn(p, {}, cross, jax.random.key(0), train=True))(params)
    assert set(terms) == {"text", "matching"} and terms["text"][2] == 2 and terms["matching"][2] == 3


@pytest.mark.parametrize(
    "change, fields, words",
    [
        ({"backbone": {**MODEL["backbone"], "name": "decoder_only"}}, {}, ("both sides", "encoder_only")),
        ({"decoders": {"label": {"name": "classifier"}}}, {}, ("decoders.text", "text > 0")),
        ({"decoders": {"text": MODEL["decoders"]["text"]}}, {}, ("decoders.label", "matching > 0")),
        ({}, {"region": -1.0}, ("region=-1.0",)),
        ({}, {"text": 0.0, "region": 0.0, "matching": 0.0}, ("one of text, region and matching",)),
    ],
)
def test_models_and_weights_that_do_not_fit(change, fields, words):
    with pytest.raises(UserError) as error:
        objectives.build({"name": "fusion", **fields}, model_lib.build({**MODEL, **change}))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "cfg, change, words",
    [
        (MODEL, {"region_mask": {}}, ("region=1.0", "data.region_rate")),
        ({**MODEL, "output_projectors": {}}, {}, ("slots of image", "output projector", "4 slots")),
        (MODEL, {"masked": {"sound": np.ones((B, 1, P), bool)}}, ("'sound'", "masked")),
    ],
)
def test_batches_that_do_not_fit(setting, cfg, change, words):
    model, batch = model_lib.build(cfg), {**setting[2], **change}
    loss_fn = objectives.build({"name": "fusion"}, model)
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda: loss_fn(model_lib.init(model, jax.random.key(0), T)["params"], {}, batch,
                                       jax.random.key(0), train=True))  # fmt: skip
    assert all(word in str(error.value) for word in words), str(error.value)
