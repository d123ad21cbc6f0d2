"""The fusion encoder by cross-attention: what it is without its auxiliary sequence, and what it sees of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import model as model_lib
from vfm import tree
from vfm.backbones.cross_encoder import CrossEncoder
from vfm.backbones.encoder_only import EncoderOnly
from vfm.errors import UserError

B, S, T, D = 3, 5, 4, 16
FIELDS = {"width": D, "depth": 2, "num_heads": 4, "mlp_dim": 24, "max_len": 16}


def features(length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, D)), jnp.float32)


def some_values(init, seed=5):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init)["params"]
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.3, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, tree.paths(shapes), shapes)


def built(**fields):
    block = CrossEncoder(**FIELDS, **fields)
    init = lambda: block.init(jax.random.key(0), features(S), decoder_x=features(T), train=False)
    params = some_values(init)
    return params, jax.jit(lambda x, y, **rest: block.apply({"params": params}, x, decoder_x=y, **rest, train=False))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_without_the_auxiliary_sequence_it_is_the_unimodal_encoder(norm_position):
    params, forward = built(norm_position=norm_position)
    x, y = features(S), features(T, 1)
    mask = jnp.asarray([[1, 1, 0, 0, 0], [0] * S, [0] * S], bool)  # rows 1 and 2 have no auxiliary item
    found, _ = forward(x, y, input_mask=mask)

    alone = EncoderOnly(**FIELDS, norm_position=norm_position)
    own = {path: leaf for path, leaf in tree.flatten(params["decoder"]).items() if "cross" not in path}
    expected, _ = alone.apply({"params": tree.unflatten(own)}, y, train=False)
    np.testing.assert_allclose(found[1:], expected[1:], atol=1e-5)
    assert float(jnp.abs(found[0] - expected[0]).max()) > 0.1


def test_the_main_sequence_sees_what_is_not_masked():
    _, forward = built()
    x, y = features(S), features(T, 1)
    mask = jnp.asarray([[1, 1, 1, 0, 0]] * B, bool)
    found, out = forward(x, y, input_mask=mask)
    assert found.shape == (B, T, D) and out["encoder"]["output"].shape == (B, S, D)
    hidden, _ = forward(x.at[:, 3:].set(features(S, 2)[:, 3:]), y, input_mask=mask)
    np.testing.assert_array_equal(hidden, found)
    seen, _ = forward(x.at[:, 2].set(features(S, 2)[:, 2]), y, input_mask=mask)
    assert (jnp.abs(seen - found).max(axis=-1) > 1e-4).all()  # by every token of the main sequence
    later, _ = forward(x, y.at[:, -1].set(features(T, 2)[:, -1]), input_mask=mask)
    assert (jnp.abs(later - found).max(axis=-1) > 1e-4).all()  # which are bidirectional


def test_the_auxiliary_sequence_has_an_encoder_if_wanted():
    params, forward = built(encoder_depth=1)
    assert params["encoder"]["transformer"]["layers"]["mlp"]["up"]["kernel"].shape == (1, D, 24)
    assert "encoder" not in built()[0]
    x, y = features(S), features(T, 1)
    mask = jnp.asarray([[1, 1, 1, 0, 0]] * B, bool)
    found, out = forward(x, y, input_mask=mask)
    assert float(jnp.abs(out["encoder"]["output"] - x).max()) > 0.1
    moved, _ = forward(x.at[:, 3:].set(0.0), y, input_mask=mask)
    np.testing.assert_array_equal(moved, found)


MODEL = {
    "centre": "text",
    "encoders": {
        "text": {"name": "text", "vocab_size": 11, "width": D},
        "image": {"name": "vit", "image_size": (4, 4), "patch_size": 2, "width": D, "depth": 1, "mlp_dim": 8},
    },
    "backbone": {"name": "cross_encoder", **FIELDS},
    "decoders": {"text": {"name": "text", "vocab_size": 11}, "label": {"name": "classifier"}},
}


def test_in_the_model_items_answer_and_tokens_ask():
    """Without an item the model is the one of text alone, with a backbone that is encoder_only."""
    model = model_lib.build(MODEL)
    params = some_values(lambda: model_lib.init(model, jax.random.key(0), 4))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 11, (B, T)), jnp.int32)
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
    shown = jnp.asarray([True, True, False])[:, None]
    image = jnp.asarray(rng.normal(size=(B, 1, 4, 4, 1)), jnp.float32)
    run = jax.jit(lambda image: model.apply(
        {"params": params}, inputs={"image": image}, starts={"image": jnp.where(shown, 0, -1)},
        input_mask=jnp.broadcast_to(shown, (B, 4)), decoder_tokens=tokens, decoder_mask=mask, train=False))  # fmt: skip
    logits, out = run(image)
    assert logits.shape == (B, T, 11) and out["label"]["logits"].shape == (B, 2)
    other, _ = run(image + 1)
    np.testing.assert_array_equal(other[2], logits[2])
    assert (jnp.abs(other - logits)[:2].max(axis=-1) > 1e-4).all()

    encoders = {"text": MODEL["encoders"]["text"]}
    alone = model_lib.build({**MODEL, "encoders": encoders, "backbone": {"name": "encoder_only", **FIELDS}})
    own = {path.replace("backbone/decoder/", "backbone/"): leaf for path, leaf in tree.flatten(params).items()
           if "cross" not in path and "image" not in path}  # fmt: skip
    expected, found = alone.apply({"params": tree.unflatten(own)}, tokens=tokens, input_mask=mask, train=False)
    np.testing.assert_allclose(logits[2, :2], expected[2, :2], atol=1e-5)
    np.testing.assert_allclose(out["label"]["logits"][2], found["label"]["logits"][2], atol=1e-5)


def test_a_backbone_of_one_sequence_takes_no_second_one():
    model = model_lib.build({**MODEL, "backbone": {"name": "encoder_only", **FIELDS}})
    tokens = jnp.zeros((B, T), jnp.int32)
    call = {"tokens": tokens, "decoder_tokens": tokens}
    with pytest.raises(UserError, match="takes no decoder_tokens.*cross_encoder"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), **call, train=False))
