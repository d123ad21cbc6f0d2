import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import model as model_lib
from vfm import tree, wiring
from vfm.backbones import DecoderOnly
from vfm.decoders import TextDecoder
from vfm.encoders import TextEncoder
from vfm.errors import UserError
from vfm.objectives.classification import classification

V, D, W, T = 20, 16, 12, 24
CONFIG = {
    "centre": "text",
    "encoders": {
        "text": {"name": "text", "vocab_size": V, "width": D},
        "image": {"name": "vit", "image_size": (8, 8), "patch_size": 4, "width": W, "depth": 1, "mlp_dim": 16},
        "vector": {"name": "vector", "num_features": 5, "num_tokens": 3, "width": W, "mlp_dim": 16},
    },
    "input_projectors": {
        "text": {"name": "linear", "width": D},
        "image": {"name": "mlp", "width": D, "hidden": 16},
        "vector": {"name": "linear", "width": D},
    },
    "backbone": {"name": "decoder_only", "width": D, "depth": 1, "mlp_dim": 16, "max_len": T, "positions": "learned"},
    "output_projectors": {
        "text": {"name": "mlp", "width": D, "hidden": 16},
        "image": {"name": "query", "width": W, "num_tokens": 4, "num_signals": 2, "mlp_dim": 16},
        "vector": {"name": "linear", "width": W},
    },
    "decoders": {
        "text": {"name": "text", "vocab_size": V},
        "image": {"name": "autoencoder", "grid": (2, 2), "upsample": (2, 2), "conv_width": 8},
    },
}


def config(**changes):
    """CONFIG with dotted fields changed ("__" for the dot); None removes."""
    cfg = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *parents, name = path.split("__")
        node = cfg
        for parent in parents:
            node = node[parent]
        if value is None:
            del node[name]
        else:
            node[name] = value
    return cfg


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_projectors__image__in_width": 10},
         r"encoders.image \(ViT\) gives width 12, but input_projectors.image \(MLPProjector\) takes width 10"),
        ({"input_projectors__image__width": 20},
         r"input_projectors.image \(MLPProjector\) gives width 20, but backbone \(DecoderOnly\) takes width 16"),
        ({"input_projectors__image": None},
         r"encoders.image \(ViT\) gives width 12, but backbone \(DecoderOnly\) takes width 16"),
        ({"encoders__text__width": 20},
         r"encoders.text \(TextEncoder\) gives width 20, but backbone \(DecoderOnly\) takes width 16"),
        ({"output_projectors__image__in_width": 10},
         r"backbone \(DecoderOnly\) gives width 16, but output_projectors.image \(Query\) takes width 10"),
        ({"output_projectors__image__width": 10},
         r"output_projectors.image \(Query\) gives width 10, but encoders.image \(ViT\).* takes width 12"),
        ({"decoders__image__in_width": 10},
         r"output_projectors.image \(Query\) gives width 12, but decoders.image \(ConvDecoder\) takes width 10"),
        ({"output_projectors__image__num_tokens": 5},
         r"output_projectors.image \(Query\) gives number of features 5, but decoders.image \(ConvDecoder\) takes "
         "number of features 4"),
        ({"encoders__image__patch_size": 2},
         r"number of features 4, but encoders.image \(ViT\).* takes number of features 16"),
        ({"output_projectors__image": {"name": "linear", "width": W}, "encoders__image__patch_size": 2},
         r"encoders.image \(ViT\) gives number of features 16, but decoders.image \(ConvDecoder\) takes number of "
         "features 4"),
        ({"decoders__image__upsample": (2,)},
         r"decoders.image \(ConvDecoder\) gives items of shape \(4, 4, 1\), but encoders.image \(ViT\) takes items of "
         r"shape \(8, 8, 1\)"),
        ({"decoders__text__in_width": 20},
         r"backbone \(DecoderOnly\) gives width 16, but decoders.text \(TextDecoder\) takes width 20"),
        ({"decoders__text__vocab_size": 21}, "encoders.text gives a vocabulary of 20, but decoders.text takes .* 21"),
        ({"output_projectors__image": None}, "decoders.image has no output projector.*model.output_projectors.image"),
        ({"encoders__vector": None}, "input_projectors.vector has no encoder|output_projectors.vector .* has neither"),
        ({"output_projectors__video": {"name": "linear"}}, "output_projectors.video .* has neither decoders.video"),
        ({"centre": "video"}, "centre='video' has neither an encoder nor a decoder; modalities: image, text, vector"),
        ({"decoders__text__tied": True, "encoders__text": None}, "tied, but there is no encoders.text"),
    ],
)  # fmt: skip
def test_a_chain_that_does_not_fit_names_both_sides(changes, message):
    with pytest.raises(UserError, match=message):
        model_lib.build(config(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoders__image__name": "vitt"}, "unknown block 'vitt' in model.encoders.image; did you mean 'vit'"),
        ({"backbone__name": "recurrent"}, "unknown block 'recurrent' in model.backbone.*Known: .*decoder_only"),
        ({"encoders__image__dept": 3}, "unknown field 'dept' in model.encoders.image; did you mean 'depth'"),
        ({"encoder": {}}, "unknown field 'encoder' in model; did you mean 'encoders'"),
        ({"encoders__image__image_size": (9, 8)}, "patch_size=4 does not divide"),
    ],
)
def test_unknown_names_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        model_lib.build(config(**changes))


def batch_like(shapes, seed=0):
    """Random values; the items stand one after the other, so that none covers another."""
    rng = np.random.default_rng(seed)
    batch = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    batch["input_mask"] = jnp.ones(shapes["input_mask"].shape, bool)
    if "tokens" in shapes:
        batch["tokens"] = jnp.asarray(rng.integers(0, V, shapes["tokens"].shape), jnp.int32)
    for field, at in (("starts", 1), ("signal_starts", 12)):
        for name in sorted(shapes[field]):
            batch[field][name] = jnp.full(shapes[field][name].shape, at, jnp.int32)
            at += 5
    return batch


@pytest.mark.parametrize("centre", ["text", "image"])
def test_any_modality_may_be_the_centre(centre):
    """By one field: what the centre's projectors did, its encoder and its decoder now do alone."""
    widths = {} if centre == "text" else {"encoders__image__width": D, "output_projectors__image__width": D}
    model = model_lib.build(config(centre=centre, **widths))
    batch = model_lib.example_batch(model, T, 2)
    init = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))
    roots = set(init["params"])
    other = {"text", "image", "vector"} - {centre}
    assert roots == {
        *(f"encoders_{name}" for name in ("text", "image", "vector")), "decoders_text", "decoders_image", "backbone",
        *(f"{kind}_{name}" for kind in ("input_projectors", "output_projectors") for name in other),
        "signals_image", "signals_vector"}  # fmt: skip
    assert init["params"]["signals_image"].shape == ((2, D) if centre == "text" else (4, D))
    logits, out = jax.eval_shape(lambda v, b: model.apply(v, **b, train=False), init, batch)
    assert logits.shape == (2, T, V)
    assert out["image"]["decoded"].shape == out["image"]["reconstructed"].shape == (2, 1, 8, 8, 1)
    assert out["image"]["predicted"].shape == out["image"]["features"].shape
    assert out["vector"]["predicted"].shape == out["vector"]["features"].shape == (2, 1, 3, W)
    assert "decoded" not in out["vector"]


@pytest.fixture(scope="module")
def built():
    model = model_lib.build(CONFIG)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.2, leaf.shape).astype(np.float32)
    variables = jax.tree.map(draw, tree.paths(shapes), shapes)
    return model, variables, jax.jit(lambda variables, batch: model.apply(variables, **batch, train=False))


def test_the_example_batch_reaches_every_parameter(built):
    model, variables, _ = built
    shapes = model_lib.example_batch(model, T, 2)
    batch = batch_like(shapes)

    def loss(params):
        outputs = jax.tree.leaves(model.apply({"params": params}, **batch, train=True))
        return sum((y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum() for y in outputs)

    gradients = tree.flatten(jax.jit(jax.grad(loss))(variables["params"]))
    dead = [path for path, gradient in gradients.items() if not float(jnp.abs(gradient).max()) > 1e-4]
    assert [path for path in dead if not path.endswith("/key/bias")] == []  # softmax does not see that one


def test_layout_is_what_the_blocks_declare(built):
    layout = model_lib.layout(built[0], T, items=3)
    found = {name: (m.item_shape, m.slots, m.signals, m.items) for name, m in layout.modalities.items()}
    assert found == {"image": ((8, 8, 1), 4, 2, 3), "vector": ((5,), 3, 3, 3)}
    assert layout.length == T


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_model_is_its_blocks_one_after_the_other_bit_for_bit(tied):
    encoder, backbone = TextEncoder(V, D), DecoderOnly(width=D, depth=2, mlp_dim=16)
    decoder = TextDecoder(V, tied)
    model = model_lib.VFM("text", {"text": encoder}, {}, backbone, {}, {"text": decoder})
    wiring.check(model)
    variables = jax.jit(lambda key: model_lib.init(model, key, T))(jax.random.key(0))
    params = variables["params"]
    assert set(params) == {"encoders_text", "backbone"} | (set() if tied else {"decoders_text"})
    tokens = jax.random.randint(jax.random.key(1), (3, T), 0, V)
    mask = jnp.arange(T)[None] < jnp.asarray([[T], [5], [1]])

    def bare(params, tokens):
        table = {"params": params["encoders_text"]}
        x, _ = encoder.apply(table, tokens, train=False)
        x, _ = backbone.apply({"params": params["backbone"]}, x, input_mask=mask, train=False)
        attend = lambda x: encoder.apply(table, x, method="attend")
        return decoder.apply({"params": params.get("decoders_text", {})}, x, attend=attend, train=False)[0]

    found, _ = jax.jit(lambda v, tokens: model.apply(v, tokens, input_mask=mask, train=False))(variables, tokens)
    np.testing.assert_array_equal(found, jax.jit(bare)(params, tokens))


def test_place_and_gather_are_inverse_and_minus_one_is_dropped():
    x = jnp.arange(2 * 7 * 3, dtype=jnp.float32).reshape(2, 7, 3)
    features = -1 - jnp.arange(2 * 2 * 2 * 3, dtype=jnp.float32).reshape(4, 2, 3)
    starts = jnp.asarray([[4, 0], [-1, 5]])
    placed = model_lib.place(x, features, starts)
    expected = np.array(x)
    expected[0, 4:6], expected[0, 0:2], expected[1, 5:7] = features[0], features[1], features[3]
    np.testing.assert_array_equal(placed, expected)
    read = np.array(model_lib.gather(placed, starts, 2))
    np.testing.assert_array_equal(read, np.where(np.array([1, 1, 0, 1], bool)[:, None, None], features, 0))
    np.testing.assert_array_equal(model_lib.place(x, features, jnp.full((2, 2), -1)), x)
    # The gradient goes to what was placed, and to what was not covered.
    to_x, to_features = jax.grad(lambda *args: model_lib.place(*args, starts).sum(), (0, 1))(x, features)
    np.testing.assert_array_equal(to_x[..., 0], [[0, 0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(to_features[:, 0, 0], [1, 1, 0, 1])


def sequence(model, variables, batch):
    """What the backbone is given: float[B, T, D]."""
    seen = []

    def spy(call, args, kwargs, context):
        if isinstance(context.module, DecoderOnly) and context.method_name == "__call__":
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(spy):
        model.apply(variables, **batch, train=False)
    return seen[0]


def test_an_item_gives_its_features_wherever_it_stands(built):
    model, variables, _ = built
    batch = batch_like(model_lib.example_batch(model, T, 2))
    at = lambda *rows: jnp.asarray(rows, jnp.int32)[:, None]

    @jax.jit
    def run(starts, signal_starts):
        return sequence(model, variables, {**batch, "starts": starts, "signal_starts": signal_starts})

    none = {"image": at(-1, -1), "vector": at(-1, -1)}
    text = run(none, none)
    table = variables["params"]["encoders_text"]["embedding"]["embedding"]
    np.testing.assert_array_equal(text, table[batch["tokens"]])
    one = run({"image": at(0, 9), "vector": at(6, -1)}, {"image": at(10, 3), "vector": at(-1, 20)})
    two = run({"image": at(7, 13), "vector": at(0, 4)}, {"image": at(22, 0), "vector": at(3, -1)})
    np.testing.assert_allclose(one[0, 0:4], two[0, 7:11], atol=1e-6)  # image of row 0
    np.testing.assert_allclose(one[1, 9:13], two[1, 13:17], atol=1e-6)  # image of row 1
    np.testing.assert_allclose(one[0, 6:9], two[0, 0:3], atol=1e-6)  # vector of row 0
    assert float(jnp.abs(one[0, 0:4] - one[1, 9:13]).max()) > 1e-2
    params = variables["params"]
    for row, start, found in ((0, 10, one), (1, 3, one), (0, 22, two), (1, 0, two)):
        np.testing.assert_array_equal(found[row, start : start + 2], params["signals_image"])
    for row, start, found in ((1, 20, one), (0, 3, two)):
        np.testing.assert_array_equal(found[row, start : start + 3], params["signals_vector"])
    np.testing.assert_array_equal(one[0, 12:], text[0, 12:])  # text everywhere else
    np.testing.assert_array_equal(one[1, :3], text[1, :3])


def test_packed_rows_equal_rows_of_their_own(built):
    """Two documents, each with an image that is read and one that is generated, in one row and in two."""
    model, variables, run = built
    rng = np.random.default_rng(0)
    lengths, signals = (11, 13), (8, 5)
    tokens = [rng.integers(0, V, n) for n in lengths]
    images = rng.normal(size=(2, 8, 8, 1)).astype(np.float32)
    pad = lambda x, fill=0: np.pad(x, (0, T - len(x)), constant_values=fill)
    empty = np.full((2, 2), -1, np.int32)
    apart = {
        "tokens": np.stack([pad(t) for t in tokens]),
        "input_mask": np.stack([np.arange(T) < n for n in lengths]),
        "inputs": {"image": np.stack([images[:1], images[1:]]).repeat(2, axis=1)},
        "starts": {"image": np.array([[1, -1], [1, -1]])},
        "signal_starts": {"image": np.array([[signals[0], -1], [signals[1], -1]])},
    }
    packed = {
        "tokens": np.concatenate(tokens)[None].repeat(2, axis=0),
        "input_mask": np.ones((2, T), bool),
        "segment_ids": np.repeat([1, 2], lengths)[None].repeat(2, axis=0),
        "positions": np.concatenate([np.arange(n) for n in lengths])[None].repeat(2, axis=0),
        "inputs": {"image": images[None].repeat(2, axis=0)},
        "starts": {"image": np.array([[1, lengths[0] + 1], *empty[:1]])},
        "signal_starts": {"image": np.array([[signals[0], lengths[0] + signals[1]], *empty[:1]])},
    }
    (logits, out), (expected, separate) = run(variables, packed), run(variables, apart)
    np.testing.assert_allclose(logits[0, : lengths[0]], expected[0, : lengths[0]], atol=1e-5)
    np.testing.assert_allclose(logits[0, lengths[0] :], expected[1, : lengths[1]], atol=1e-5)
    np.testing.assert_allclose(out["image"]["decoded"][0], separate["image"]["decoded"][:, 0], atol=1e-5)
    # Without the segments the second document sees the first.
    mixed, _ = run(variables, {**packed, "segment_ids": np.ones((2, T), int)})
    assert float(jnp.abs(mixed[0, lengths[0] :] - logits[0, lengths[0] :]).max()) > 1e-3


def test_text_behind_an_item_reads_it(built):
    model, variables, run = built
    batch = batch_like(model_lib.example_batch(model, T, 2))
    logits, out = run(variables, batch)
    moved, after = run(variables, {**batch, "inputs": {**batch["inputs"], "image": -batch["inputs"]["image"]}})
    changed = jnp.abs(moved - logits).max(axis=(0, 2))
    assert float(changed[0]) == 0 and float(changed[5:].min()) > 1e-4
    assert float(jnp.abs(after["vector"]["predicted"] - out["vector"]["predicted"]).max()) > 1e-4


def test_a_modality_may_be_a_target_only_and_text_may_be_absent():
    """The data layer gives tokens, and an item of every modality, to every model."""
    model = model_lib.build(config(encoders__image=None, input_projectors__image=None))
    full = model_lib.example_batch(model_lib.build(CONFIG), T, 2)
    init = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))
    _, out = jax.eval_shape(lambda v, b: model.apply(v, **b, train=False), init, full)
    assert out["image"]["decoded"].shape == (2, 1, 8, 8, 1) and "features" not in out["image"]
    assert model_lib.layout(model, T).modalities["image"].slots == 0

    wordless = config(centre="image", encoders__image__width=D, output_projectors__image__width=D)
    for kind in ("encoders", "input_projectors", "output_projectors", "decoders"):
        del wordless[kind]["text"]
    model = model_lib.build(wordless)
    init = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))
    assert not any("text" in root for root in init["params"])
    logits, out = jax.eval_shape(lambda v, b: model.apply(v, **b, train=False), init, full)
    assert logits is None and out["image"]["decoded"].shape == (2, 1, 8, 8, 1)


LABELS = {
    "centre": "image",
    "encoders": {"image": {"name": "vit", "width": D, "depth": 1, "pooling": "class"}},
    "backbone": None,
    "decoders": {"label": {"name": "classifier", "num_classes": 3, "in_width": D}},
}


def test_labels_without_a_backbone_read_the_summary_of_the_centre():
    model = model_lib.build(LABELS)
    batch = {"inputs": {"image": jax.random.normal(jax.random.key(1), (4, 1, 8, 8, 1))}}
    variables = jax.jit(lambda: model_lib.init(model, jax.random.key(0), T))()
    logits, out = jax.jit(lambda v, b: model.apply(v, **b, train=False))(variables, batch)
    classes = variables["params"]["decoders_label"]["classes"]
    expected = out["image"]["encoder"]["pooled"] @ classes["kernel"] + classes["bias"][None]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(out["label"]["logits"], logits)
    batch = {**batch, "label": np.array([0, 1, 2, -1], np.int32)}

    def loss(params):
        terms, _ = classification(model)(params, {}, batch, jax.random.key(0), train=True)
        total, count = terms["label"][1:]
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(loss))(variables["params"])
    nll = -jax.nn.log_softmax(logits)[jnp.arange(3), jnp.arange(3)]
    np.testing.assert_allclose(value, nll.mean(), rtol=1e-5)
    assert float(jnp.abs(gradients["encoders_image"]["patch"]["kernel"]).max()) > 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"centre": "audio"}, "model.centre='audio' is no encoder; without a backbone decoders.label reads"),
        (
            {"decoders": {"sound": {"name": "autoencoder"}}},
            r"decoders.sound \(ConvDecoder\) needs a backbone, or encoders",
        ),
        ({"input_projectors": {"image": {"name": "linear"}}}, "input_projectors.image leads nowhere"),
        (
            {"decoders": {"label": {"name": "classifier", "in_width": 7}}},
            rf"encoders.image \(ViT\) gives width {D}, but decoders.label \(Classifier\) takes width 7",
        ),
    ],
)
def test_what_needs_a_backbone_is_refused_without_one(changes, message):
    with pytest.raises(UserError, match=message):
        model_lib.build({**LABELS, **changes})


def test_patches_that_are_dropped_leave_no_slots_empty():
    with pytest.raises(UserError, match="encoders.image.patch_dropout would leave slots of the backbone's sequence"):
        model_lib.build(config(encoders__image__patch_dropout=0.5))
