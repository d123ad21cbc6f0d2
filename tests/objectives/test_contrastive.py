"""Contrastive losses: against the reference, in parts, on devices, with caches, momentum encoders and queues."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vfm import model as model_lib
from vfm import objectives, sharding
from vfm.data.aligned import parse_pairs, slots
from vfm.errors import UserError
from vfm.objectives.contrastive import infonce, sigmoid

FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions"
B, E = 16, 8
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def embeddings(seed=0, rows=B):
    return unit(jax.random.normal(jax.random.key(seed), (rows, E)))


@needs_fixtures
@pytest.mark.parametrize("name", ["clip_infonce", "siglip_loss"])
def test_equals_the_reference(name):
    io = np.load(FIXTURES / name / "io.npz")
    given = [jnp.asarray(io[f"in/{field}"]) for field in ("image", "text", "log_scale", "bias") if f"in/{field}" in io]

    def loss(image, text, log_scale, *bias):
        compare = sigmoid if bias else infonce
        return compare(unit(image), unit(text), jnp.exp(log_scale), *bias)[0].mean()

    value, gradients = jax.value_and_grad(loss, tuple(range(len(given))))(*given)
    np.testing.assert_allclose(value, io["out/loss"], atol=1e-6)
    for field, gradient in zip(("image", "text", "log_scale", "bias"), gradients):
        np.testing.assert_allclose(gradient, io[f"out/grad_{field}"].reshape(gradient.shape), atol=1e-5)


def test_hits_and_losses_by_hand():
    a, b = embeddings(0, 4), embeddings(1, 4)
    loss, hits = infonce(a, b, 5.0)
    logits = 5 * np.asarray(a) @ np.asarray(b).T
    for i in range(4):
        there = math.log(np.exp(logits[i]).sum()) - logits[i, i]
        back = math.log(np.exp(logits[:, i]).sum()) - logits[i, i]
        assert loss[i] == pytest.approx((there + back) / 2, rel=1e-5)
        assert hits[i] == ((logits[i].argmax() == i) + (logits[:, i].argmax() == i)) / 2
    loss, hits = sigmoid(a, b, 5.0, -1.0)
    for i in range(4):
        sign = np.where(np.arange(4) == i, 1, -1)
        assert loss[i] == pytest.approx(np.log1p(np.exp(-sign * (logits[i] - 1))).sum(), rel=1e-5)
        assert hits[i] == (logits[i].argmax() == i)


def run(kind, a, b, mask=None, **options):
    if kind == "sigmoid":
        return sigmoid(a, b, 5.0, -1.0, mask, **options)
    return infonce(a, b, 5.0, mask, **options)


kinds = pytest.mark.parametrize("kind", ["infonce", "sigmoid"])


@kinds
def test_rows_that_only_fill_the_batch_change_nothing(kind):
    a, b = embeddings(0), embeddings(1)
    mask = jnp.arange(B) < 10
    for found, expected in zip(run(kind, a, b, mask), run(kind, a[:10], b[:10])):
        np.testing.assert_allclose(found[:10], expected, atol=1e-5)


@kinds
def test_rows_of_one_group_are_no_negatives_of_each_other(kind):
    a, b = embeddings(0, 4), embeddings(1, 4)
    groups = jnp.asarray([0, 0, 1, 2])
    found = run(kind, a, b, groups=groups)
    keep = jnp.asarray([0, 2, 3])  # without row 1, row 0 has the same negatives
    for x, expected in zip(found, run(kind, a[keep], b[keep])):
        np.testing.assert_allclose(x[0], expected[0], atol=1e-5)


@kinds
@pytest.mark.parametrize("chunks", [2, 16])
def test_parts_give_the_values_and_gradients_of_the_whole(kind, chunks):
    a, b = embeddings(0), embeddings(1)
    mask, groups = jnp.arange(B) != 5, jnp.arange(B) // 2

    def loss(a, b, chunks):
        nll, hits = run(kind, a, b, mask, groups=groups, chunks=chunks)
        return (nll * mask).sum(), hits

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    for x, expected in zip(jax.tree.leaves(both(a, b, chunks)), jax.tree.leaves(both(a, b, 1)), strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-5)


@kinds
def test_parts_need_less_memory(kind):
    rows = 1024
    a, b = embeddings(0, rows), embeddings(1, rows)
    size = {}
    for chunks in (1, 32):
        loss = jax.jit(jax.grad(lambda a, b, chunks=chunks: run(kind, a, b, chunks=chunks)[0].sum(), (0, 1)))
        size[chunks] = loss.lower(a, b).compile().memory_analysis().temp_size_in_bytes
    assert size[1] > rows * rows * 4 > 4 * size[32]


VOCABULARY = 11
CONFIG = {
    "alignment": {"temperature": 0.2, "max_scale": 20.0},
    "encoders": {
        "image": {"name": "vector", "num_features": 7, "width": 16, "mlp_dim": 16},
        "text": {
            "name": "text_transformer", "vocab_size": VOCABULARY, "length": 5, "width": 16, "pad_id": 0,
            "backbone": {"name": "encoder_only", "depth": 1, "mlp_dim": 16, "num_heads": 2, "dropout": 0.1},
        },
        "vector": {"name": "vector", "num_features": 6, "width": 16, "mlp_dim": 16},
    },
    "input_projectors": {name: {"name": "linear", "width": E} for name in ("image", "text", "vector")},
}  # fmt: skip
PAIRS = ("image-text", "vector-text")


@pytest.fixture(scope="module")
def setting():
    model = model_lib.build(CONFIG)
    keys = jax.random.split(jax.random.key(0), 3)
    batch = {
        "inputs": {
            "image": jax.random.normal(keys[0], (B, 1, 7)),
            "text": jax.random.randint(keys[1], (B, 2, 5), 1, VOCABULARY),
            "vector": jax.random.normal(keys[2], (B, 1, 6)),
        },
        "example_mask": (jnp.arange(B) != 3).astype(jnp.float32),
        "label": jnp.arange(B) // 2,
    }
    return model, jax.jit(lambda key: model_lib.init(model, key, 5))(jax.random.key(1))["params"], batch


def total(loss_fn, train=False):
    def loss(params, batch, rng, variables):
        terms, aux = loss_fn(params, variables, batch, rng, train=train)
        return sum(weight * value / count for weight, value, count in terms.values()), (terms, aux)

    jitted = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda params, batch, rng, variables=None: jitted(params, batch, rng, variables or {})


def test_terms_are_those_of_the_items_of_each_pair(setting):
    model, params, batch = setting
    (_, (terms, aux)), _ = total(objectives.build({"name": "contrastive", "pairs": PAIRS}, model))(
        params, batch, jax.random.key(2)
    )
    out = jax.jit(lambda p: model.apply({"params": p}, inputs=batch["inputs"], train=False)[1])(params)
    mask = batch["example_mask"]
    assert list(terms) == list(PAIRS)
    for pair, item in (("image-text", 0), ("vector-text", 1)):
        a, b = (out[name]["embedding"] for name in pair.split("-"))
        assert a.dtype == jnp.float32 and a.shape == (B, 1, E)
        np.testing.assert_allclose(jnp.linalg.norm(b, axis=-1), 1, rtol=1e-5)
        nll, hits = infonce(a[:, 0], b[:, item], 5.0, mask)  # 1 / 0.2
        np.testing.assert_allclose(terms[pair][1], (nll * mask).sum(), rtol=1e-5)
        assert terms[pair][2] == B - 1
        np.testing.assert_allclose(aux.metrics[f"hits_{pair}"][0], (hits * mask).sum())
    np.testing.assert_allclose(aux.metrics["logit_scale"][0], 5, rtol=1e-5)


def test_the_scale_is_clamped(setting):
    model, params, batch = setting
    large = {**params, "logit_scale": jnp.asarray(9.0)}
    out = model.apply({"params": large}, inputs=batch["inputs"], train=False)[1]
    np.testing.assert_allclose(out["logit_scale"], 20, rtol=1e-5)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_data_parallel_is_the_whole_batch(setting, devices):
    """The negatives of a row are those of all devices."""
    model, params, batch = setting
    run = lambda **more: total(objectives.build({"name": "contrastive", "pairs": PAIRS, **more}, model))
    (expected, _), gradients = run()(params, batch, jax.random.key(2))
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    with sharding.use_mesh(mesh):
        there = jax.device_put(batch, sharding.batch_sharding(mesh))
        for more in ({}, {"cache": 2, "chunks": 2}):
            (found, _), found_gradients = run(**more)(params, there, jax.random.key(2))
            np.testing.assert_allclose(found, expected, atol=1e-5)
            for x, y in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("loss", ["infonce", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_gradient_caching_is_exact(setting, loss):
    _, params, batch = setting
    bias = -2.0 if loss == "sigmoid" else None
    model = model_lib.build({**CONFIG, "alignment": {**CONFIG["alignment"], "bias": bias}})
    params = params if bias is None else {**params, "logit_bias": jnp.asarray(bias)}
    found = {}
    for cache in (1, 4):
        loss_fn = objectives.build({"name": "contrastive", "pairs": PAIRS, "loss": loss, "cache": cache}, model)
        found[cache] = total(loss_fn)(params, batch, jax.random.key(2))
    for x, y in zip(jax.tree.leaves(found[4]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_momentum_encoders_and_queue_are_exact(setting):
    model, params, batch = setting
    fields = {"name": "contrastive", "pairs": PAIRS, "momentum": 0.9, "queue": 24}
    loss_fn = objectives.build(fields, model)
    variables = loss_fn.variables(params)
    embed = jax.jit(lambda p: model.apply({"params": p}, inputs=batch["inputs"], train=False)[1])
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(variables["queue"]))
    other = jax.tree.map(lambda p: p + 0.01, params)
    slow, queue, mask = params, {name: np.zeros((24, E)) for name in variables["queue"]}, batch["example_mask"][:, None]
    step = total(loss_fn, True)
    for _ in range(3):  # the queue is full in the second step
        (_, (terms, aux)), _ = step(other, batch, jax.random.key(2), variables)
        slow = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, slow, other)
        keys = embed(slow)
        earlier = tuple(jnp.asarray(queue[f"vector-text/{name}"]) for name in ("vector", "text"))
        variables = aux.variables
        for x, y in zip(jax.tree.leaves(variables["momentum"]), jax.tree.leaves(slow), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
        for pair, items in zip(PAIRS, slots(parse_pairs(PAIRS, model.encoders, ""))):
            for name, item in zip(pair.split("-"), items):
                new = np.asarray(keys[name]["embedding"][:, item] * mask)
                queue[f"{pair}/{name}"] = np.concatenate([new, queue[f"{pair}/{name}"]])[:24]
                np.testing.assert_allclose(variables["queue"][f"{pair}/{name}"], queue[f"{pair}/{name}"], atol=1e-5)
    # The term of the last step: a row's own key, those of the batch, and what was in the queue before.
    before = {f"vector-text/{name}": x for name, x in zip(("vector", "text"), earlier)}
    before |= {f"image-text/{name}": jnp.zeros((24, E)) for name in ("image", "text")}
    (_, (terms, _)), gradient = total(loss_fn)(other, batch, jax.random.key(2), {"momentum": slow, "queue": before})
    trained = embed(other)
    nll, _ = infonce(
        trained["vector"]["embedding"][:, 0], trained["text"]["embedding"][:, 1], 5.0 * math.exp(0.01), mask[:, 0],
        keys=(keys["vector"]["embedding"][:, 0], keys["text"]["embedding"][:, 1]), queues=earlier,
    )  # fmt: skip
    np.testing.assert_allclose(terms["vector-text"][1], (nll * mask[:, 0]).sum(), rtol=1e-4)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(gradient["encoders_vector"]))


def test_a_queue_adds_negatives():
    a, b, queue = embeddings(0, 4), embeddings(1, 4), embeddings(2, 6)
    padded = jnp.concatenate([queue, jnp.zeros((5, E))])
    found, _ = infonce(a, b, 5.0, keys=(a, b), queues=(padded, padded))
    for i in range(4):
        ways = [5 * jnp.concatenate([y, queue]) @ x[i] for x, y in ((a, b), (b, a))]
        expected = sum(jax.nn.logsumexp(logits) - logits[i] for logits in ways) / 2
        np.testing.assert_allclose(found[i], expected, rtol=1e-5)


def test_pairs_take_items_of_their_own():
    pairs = parse_pairs(("image-text", "audio-text", "audio-image"), ("image", "text", "audio"), "here")
    assert slots(pairs) == ((0, 0), (0, 1), (1, 1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pairs": ()}, "no pairs"),
        ({"pairs": ("image-text",)}, "no pair names vector; without one nothing trains its encoder"),
        ({"pairs": ("image-image", *PAIRS)}, "must have the form 'a-b'"),
        ({"pairs": ("image-txt", *PAIRS)}, "unknown modality 'txt'.*did you mean 'text'"),
        ({"pairs": (*PAIRS, "text-image")}, "'text-image' is there twice"),
        ({"pairs": PAIRS, "loss": "info"}, "unknown loss 'info'.*Known: infonce, sigmoid"),
        ({"pairs": PAIRS, "loss": "sigmoid"}, "needs model.alignment.bias"),
        ({"pairs": PAIRS, "weights": (1.0,)}, "1 weights for 2 pairs"),
        ({"pairs": PAIRS, "queue": 8}, "set momentum"),
        ({"pairs": PAIRS, "same_label": "positive"}, "unknown same_label"),
        ({"pairs": PAIRS, "same_label": "ignored", "momentum": 0.9, "queue": 8}, "a queue holds no labels"),
    ],
)  # fmt: skip
def test_bad_fields_are_one_line(setting, fields, message):
    with pytest.raises(UserError, match=message):
        objectives.build({"name": "contrastive", **fields}, setting[0])


@pytest.mark.parametrize("fields, message", [({"cache": 3}, "cache=3 must divide the 16"), ({"chunks": 5}, "chunks=5")])
def test_parts_must_divide_the_batch(setting, fields, message):
    model, params, batch = setting
    with pytest.raises(UserError, match=message):
        objectives.build({"name": "contrastive", "pairs": PAIRS, **fields}, model)(
            params, {}, batch, jax.random.key(0), train=True
        )


def test_ignored_labels_need_labels(setting):
    model, params, batch = setting
    loss_fn = objectives.build({"name": "contrastive", "pairs": PAIRS, "same_label": "ignored"}, model)
    unlabelled = {name: value for name, value in batch.items() if name != "label"}
    with pytest.raises(UserError, match="same_label='ignored' needs batches with a label"):
        jax.eval_shape(lambda: loss_fn(params, {}, unlabelled, jax.random.key(0), train=True))


def test_rows_of_other_pairs_are_refused(setting):
    model, params, batch = setting
    pairs = ("image-text", "vector-text", "image-vector")
    with pytest.raises(UserError, match="rows hold 1 item.s. of 'image', but 2 pair.s. name it"):
        objectives.build({"name": "contrastive", "pairs": pairs}, model)(
            params, {}, batch, jax.random.key(0), train=True
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_projectors": {"image": {"name": "linear", "width": 4}}}, "the shared space has one width"),
        ({"encoders": {**CONFIG["encoders"], "text": {"name": "text", "vocab_size": 9}}}, "'text_transformer'"),
        ({"decoders": {"sound": {"name": "autoencoder"}}}, r"decoders.sound \(ConvDecoder\) needs a backbone"),
        ({"alignment": {"temprature": 0.1}}, "unknown field 'temprature' in model.alignment; did you mean"),
        ({"alignment": {"temperature": 0.0}}, "temperature=0.0 must be more than 0"),
        ({"alignment": None}, "model.centre is missing"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        model_lib.build({**CONFIG, **changes})
