"""The terms of the losses against NumPy, from what the model gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import model as model_lib
from vfm import objectives, tree
from vfm.errors import UserError

V, D, W, T, B, N = 11, 12, 10, 16, 4, 2
MODEL = {
    "centre": "text",
    "encoders": {
        "text": {"name": "text", "vocab_size": V, "width": D},
        "image": {"name": "vit", "image_size": (4, 4), "patch_size": 2, "width": W, "depth": 1, "mlp_dim": 8},
        "vector": {"name": "vector", "num_features": 3, "num_tokens": 2, "width": W, "mlp_dim": 8},
    },
    "input_projectors": {"image": {"name": "linear", "width": D}, "vector": {"name": "linear", "width": D}},
    "backbone": {"name": "decoder_only", "width": D, "depth": 1, "mlp_dim": 8, "max_len": T},
    "output_projectors": {"image": {"name": "linear", "width": W}, "vector": {"name": "linear", "width": W}},
    "decoders": {
        "text": {"name": "text", "vocab_size": V},
        "image": {"name": "autoencoder", "grid": (2, 2), "upsample": (2,), "conv_width": 6},
    },
}


def batch_of(rng):
    """Two items per row. The last row only fills the batch; the second image of row 0 is absent."""
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    images, vectors = draw(B, N, 4, 4, 1), draw(B, N, 3)
    images[0, 1] = 0
    return {
        "tokens": rng.integers(0, V, (B, T)).astype(np.int32),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "loss_mask": ((rng.random((B, T)) < 0.3) & (np.arange(B) < B - 1)[:, None]).astype(np.float32),
        "input_mask": np.arange(T)[None] < np.array([T, 13, T, T])[:, None],
        "inputs": {"image": images, "vector": vectors},
        "starts": {"image": np.array([[1, -1], [-1, -1], [0, 4], [0, 4]]), "vector": np.full((B, N), -1)},
        "signal_starts": {"image": np.array([[8, -1], [5, 9], [-1, 12], [8, 12]]),
                          "vector": np.array([[6, -1], [-1, 1], [-1, -1], [1, 3]])},
        "example_mask": np.array([1, 1, 1, 0], np.float32),
    }  # fmt: skip


@pytest.fixture(scope="module")
def setting():
    model = model_lib.build(MODEL)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))["params"]
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.3, leaf.shape).astype(np.float32)
    return model, jax.tree.map(draw, tree.paths(shapes), shapes), batch_of(rng)


def test_terms_equal_numpy(setting):
    model, params, batch = setting
    weights = {"text": 2.0, "conversion": 0.5, "generation": 3.0, "reconstruction": 0.25}
    loss_fn = objectives.build({"name": "any_to_any", **weights}, model)
    inputs = {name: batch[name] for name in model_lib.INPUTS if name in batch}
    (terms, aux), (logits, out) = jax.jit(
        lambda params, batch: (loss_fn(params, {}, batch, jax.random.key(0), train=True),
                               model.apply({"params": params}, **inputs, train=True)))(params, batch)  # fmt: skip
    assert aux.variables == {}

    def check(name, values, mask):
        weight, total, count = terms[name]
        assert weight == weights[name.split("_")[0]] and count == mask.sum() > 0
        np.testing.assert_allclose(total, (values * mask).sum(), rtol=1e-4, err_msg=name)

    logits = np.asarray(logits, np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(log_probability, batch["targets"][..., None], axis=-1)[..., 0]
    check("text", -picked, batch["loss_mask"])
    hits = (logits.argmax(axis=-1) == batch["targets"]) * batch["loss_mask"]
    np.testing.assert_allclose(aux.metrics["token_accuracy"], (hits.sum(), batch["loss_mask"].sum()))

    real = batch["example_mask"][:, None]
    out = jax.tree.map(np.asarray, {name: out[name] for name in ("image", "vector")})
    squared = lambda a, b: np.square(a - b).mean(axis=tuple(range(2, a.ndim)))
    for name in ("image", "vector"):
        generated = real * (batch["signal_starts"][name] >= 0)
        check(f"conversion_{name}", squared(out[name]["predicted"], out[name]["features"]), generated)
    images, generated = batch["inputs"]["image"], real * (batch["signal_starts"]["image"] >= 0)
    check("generation_image", squared(out["image"]["decoded"], images), generated)
    present = real * np.array([[1, 0], [1, 1], [1, 1], [1, 1]])
    check("reconstruction_image", squared(out["image"]["reconstructed"], images), present)
    names = {"text", "conversion_image", "conversion_vector", "generation_image", "reconstruction_image"}
    assert set(terms) == names

    # Next-token prediction is the first of these terms alone.
    terms, aux = jax.jit(lambda params, batch: objectives.build({"name": "next_token"}, model)(
        params, {}, batch, jax.random.key(0), train=True))(params, batch)  # fmt: skip
    assert set(terms) == {"text"} and terms["text"][0] == 1
    np.testing.assert_allclose(terms["text"][1], -(picked * batch["loss_mask"]).sum(), rtol=1e-5)


def test_the_target_of_the_conversion_gives_no_gradient_to_the_encoder(setting):
    model, params, batch = setting
    alone = {**batch, "starts": {name: np.full((B, N), -1) for name in batch["starts"]}}

    @jax.jit
    def norms(conversion, reconstruction):
        loss_fn = objectives.build({"name": "any_to_any", "text": 0.0, "conversion": conversion, "generation": 0.0,
                                    "reconstruction": reconstruction}, model)  # fmt: skip

        def loss(params):
            terms, _ = loss_fn(params, {}, alone, jax.random.key(0), train=True)
            return sum(weight * total / count for weight, total, count in terms.values())

        gradients = jax.grad(loss)(params)
        return {root: sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(g)) for root, g in gradients.items()}

    conversion = norms(1.0, 0.0)
    assert conversion["encoders_image"] == conversion["encoders_vector"] == conversion["decoders_image"] == 0
    assert min(conversion[f"output_projectors_{name}"] for name in ("image", "vector")) > 1e-3
    assert min(conversion[name] for name in ("backbone", "signals_image", "signals_vector")) > 1e-4
    reconstruction = norms(0.0, 1.0)
    assert reconstruction["encoders_image"] > 1e-3 and reconstruction["decoders_image"] > 1e-3
    assert reconstruction["backbone"] == reconstruction["encoders_vector"] == 0


def test_a_target_without_an_encoder_is_generated_only():
    without = {kind: {name: block for name, block in blocks.items() if (kind, name) not in (
        ("encoders", "image"), ("input_projectors", "image"))} if isinstance(blocks, dict) and kind != "backbone"
        else blocks for kind, blocks in MODEL.items()}  # fmt: skip
    model = model_lib.build(without)
    batch = batch_of(np.random.default_rng(0))
    params = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))["params"]
    loss_fn = objectives.build({"name": "any_to_any"}, model)
    terms, _ = jax.eval_shape(lambda p, b: loss_fn(p, {}, b, jax.random.key(0), train=True), params, batch)
    assert set(terms) == {"text", "conversion_vector", "generation_image"}


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"name": "next_tokens"}, "unknown objective 'next_tokens'.* did you mean 'next_token'"),
        ({"name": "any_to_any", "conversions": 1.0}, "unknown field 'conversions'.* did you mean 'conversion'"),
        ({}, "objective has no `name`. Known: adversarial, any_to_any, .*next_token"),
    ],
)
def test_unknown_names_are_told(cfg, message):
    with pytest.raises(UserError, match=message):
        objectives.build(cfg, model_lib.build(MODEL))


def test_next_token_needs_a_text_decoder():
    silent = {**MODEL, "decoders": {"image": MODEL["decoders"]["image"]}}
    with pytest.raises(UserError, match="next_token needs model.decoders.text"):
        objectives.build({"name": "next_token"}, model_lib.build(silent))
