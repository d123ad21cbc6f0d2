"""Image encoders and dual encoders of the reference fixtures, and against `transformers` both ways."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm import tree
from vfm.errors import UserError
from vfm.evaluate.rollout import attention_maps
from vfm.interop import huggingface
from vfm.objectives.contrastive import infonce
from vfm.parity import transformers_vision

FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "fixtures"
NAMES = ("vit_model", "vit_image_classification", "clip", "clip_legacy_eos")
CLIPS = NAMES[2:]
fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def loaded():
    """name -> (model, variables, arrays, forward pass), each loaded once."""
    found = {}

    def get(name):
        if name not in found:
            model, variables = huggingface.load(str(FIXTURES / name))
            run = jax.jit(lambda variables, inputs: model.apply(variables, inputs=inputs, train=False))
            found[name] = (model, variables, np.load(FIXTURES / name / "io.npz"), run)
        return found[name]

    return get


def items(io, case, model):
    """Our items of the library's call; ids are filled up with padding behind their end, which nothing reads."""
    found = {}
    if f"{case}/in/pixel_values" in io:
        found["image"] = jnp.asarray(io[f"{case}/in/pixel_values"].transpose(0, 2, 3, 1)[:, None])
    if f"{case}/in/input_ids" in io:
        ids = io[f"{case}/in/input_ids"]
        fill = ((0, 0), (0, model.encoders["text"].length - ids.shape[1]))
        found["text"] = jnp.asarray(np.pad(ids, fill, constant_values=1)[:, None], jnp.int32)
    return found


def image_states(out):
    """[what enters the stack, the residual stream after each block]: float[B, 1 + P, D]."""
    return [out["image"]["encoder"]["input"], *out["image"]["encoder"]["layers"]]


def loss_of(out, labels=None):
    """The library's loss: of labels, or of pairs."""
    if labels is not None:
        return optax.softmax_cross_entropy_with_integer_labels(out["label"]["logits"], jnp.asarray(labels)).mean()
    image, text = (out[modality]["embedding"][:, 0] for modality in ("image", "text"))
    return infonce(image, text, out["logit_scale"])[0].mean()


@fixtures
def test_vit(loaded):
    model, variables, io, run = loaded("vit_model")
    inputs = items(io, "basic", model)
    logits, out = run(variables, inputs)
    assert logits is None
    encoder = out["image"]["encoder"]
    np.testing.assert_allclose(out["image"]["features"][:, 0], io["basic/out/last_hidden_state"][:, 1:], **CLOSE)
    np.testing.assert_allclose(encoder["class"], io["basic/out/last_hidden_state"][:, 0], **CLOSE)
    np.testing.assert_allclose(out["label"]["pooled"], io["basic/out/pooler_output"], **CLOSE)
    for number, state in enumerate(image_states(out)):
        np.testing.assert_allclose(state, io[f"basic/out/hidden_states.{number}"], **CLOSE)
    maps = attention_maps(model, variables, inputs=inputs, train=False)
    weights = maps["encoders_image/transformer/layers/attention"]
    for number, layer in enumerate(weights):
        np.testing.assert_allclose(layer, io[f"basic/out/attentions.{number}"], atol=1e-5)


@fixtures
def test_vit_on_a_larger_image(loaded):
    model, variables, io, run = loaded("vit_model")
    inputs = items(io, "interpolated_positions", model)
    with pytest.raises(UserError, match=r"takes items of shape \(32, 32, 3\), not \(48, 48, 3\)"):
        run(variables, inputs)
    free, variables = huggingface.load(str(FIXTURES / "vit_model"), any_size=True)
    _, out = jax.jit(lambda v, inputs: free.apply(v, inputs=inputs, train=False))(variables, inputs)
    wanted = io["interpolated_positions/out/last_hidden_state"]
    np.testing.assert_allclose(out["image"]["features"][:, 0], wanted[:, 1:], **CLOSE)
    np.testing.assert_allclose(out["label"]["pooled"], io["interpolated_positions/out/pooler_output"], **CLOSE)


@fixtures
def test_vit_of_labels(loaded):
    model, variables, io, run = loaded("vit_image_classification")
    inputs, labels = items(io, "basic", model), jnp.asarray(io["basic/in/labels"])
    logits, out = run(variables, inputs)
    np.testing.assert_allclose(logits, io["basic/out/logits"], **CLOSE)
    for number, state in enumerate(image_states(out)):
        np.testing.assert_allclose(state, io[f"basic/out/hidden_states.{number}"], **CLOSE)
    assert abs(float(loss_of(out, labels)) - float(io["basic/out/loss"])) < 1e-6


@fixtures
@pytest.mark.parametrize("name", CLIPS)
def test_clip(loaded, name):
    model, variables, io, run = loaded(name)
    _, out = run(variables, items(io, "basic", model))
    assert abs(float(loss_of(out)) - float(io["basic/out/loss"])) < 1e-6
    image, text = (out[modality]["embedding"][:, 0] for modality in ("image", "text"))
    np.testing.assert_allclose(image, io["basic/out/image_embeds"], **CLOSE)
    np.testing.assert_allclose(text, io["basic/out/text_embeds"], **CLOSE)
    products = out["logit_scale"] * image @ text.T
    np.testing.assert_allclose(products, io["basic/out/logits_per_image"], **CLOSE)
    np.testing.assert_allclose(products.T, io["basic/out/logits_per_text"], **CLOSE)


@fixtures
@pytest.mark.parametrize("name", [CLIPS[0], pytest.param(CLIPS[1], marks=pytest.mark.slow)])
def test_towers_of_clip(loaded, name):
    """Each tower alone, and batches of different sizes in the two."""
    model, variables, io, run = loaded(name)
    inputs = items(io, "vision_tower", model) | items(io, "text_tower", model)
    _, out = run(variables, inputs)
    for number, state in enumerate(image_states(out)):
        np.testing.assert_allclose(state, io[f"vision_tower/out/hidden_states.{number}"], **CLOSE)
    np.testing.assert_allclose(out["image"]["encoder"]["layers"][-1], io["vision_tower/out/last_hidden_state"], **CLOSE)
    np.testing.assert_allclose(out["image"]["encoder"]["pooled"], io["vision_tower/out/pooler_output"], **CLOSE)
    real = io["text_tower/in/attention_mask"][:, :, None].astype(bool)
    read = out["text"]["encoder"]["backbone"]
    found = [read["input"], *read["layers"]]
    wanted = [io[f"text_tower/out/hidden_states.{number}"] for number in range(len(found))]
    pairs = [*zip(found, wanted), (out["text"]["features"][:, 0], io["text_tower/out/last_hidden_state"])]
    for ours, theirs in pairs:
        np.testing.assert_allclose(np.where(real, ours[:, : real.shape[1]], 0), np.where(real, theirs, 0), **CLOSE)
    np.testing.assert_allclose(out["text"]["encoder"]["pooled"], io["text_tower/out/pooler_output"], **CLOSE)
    _, out = run(variables, items(io, "uneven", model))
    for modality in ("image", "text"):
        np.testing.assert_allclose(out[modality]["embedding"][:, 0], io[f"uneven/out/{modality}_embeds"], **CLOSE)


@fixtures
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == NAMES[1] else pytest.mark.slow) for n in NAMES])
def test_gradient_norm(loaded, name):
    model, variables, io, _ = loaded(name)
    inputs, labels = items(io, "basic", model), io.get("basic/in/labels")

    def loss(params):
        out = model.apply({"params": params}, inputs=inputs, train=False)[1]
        if "basic/in/cotangent" in io:
            states = jnp.concatenate(
                [out["image"]["encoder"]["class"][:, None], out["image"]["features"][:, 0]], axis=1
            )
            return (states * io["basic/in/cotangent"]).sum()
        return loss_of(out, labels)

    norm = float(optax.tree.norm(jax.jit(jax.grad(loss))(variables["params"])))
    np.testing.assert_allclose(norm, float(io["basic/grad/global_norm"]), rtol=1e-4)


@fixtures
@pytest.mark.parametrize("name", NAMES)
def test_load_save_load(loaded, name, tmp_path):
    """What is written is what was read: each tensor, and each field of config.json that says something."""
    from safetensors.numpy import load_file

    model, variables, _, _ = loaded(name)
    huggingface.save(str(tmp_path), model, variables)
    written, read = (load_file(folder / "model.safetensors") for folder in (tmp_path, FIXTURES / name))
    assert written.keys() == read.keys()
    for key, tensor in read.items():
        assert written[key].shape == tensor.shape, key
        np.testing.assert_array_equal(written[key], tensor)
    again, same = huggingface.load(str(tmp_path))
    assert again == model
    for path, leaf in tree.flatten(same).items():
        np.testing.assert_array_equal(leaf, tree.flatten(variables)[path])
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FIXTURES / name))
    flat = lambda c: {(*key.split("/"),): value for key, value in tree.flatten(c).items()}
    for key, value in flat(ours).items():
        if value is not None:
            assert flat(theirs).get(key) == value, key


# The others are slow tests, and all are in `experiments.certify`.
QUICK = ("vit, oblong, relu", "siglip, texts of another width")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in transformers_vision.MODELS]
)
def test_equals_transformers_both_ways(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = transformers_vision.compare(name)
    assert found.forward < 1e-4 * max(1.0, found.scale)
    assert found.round_trip < 1e-5


@fixtures
@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("vit_model", {"patch_size": [8, 4]}, r"a 'vit' model with patch_size=\[8, 4\] is not supported"),
        ("vit_model", {"pooler_output_size": 12}, "a 'vit' model with pooler_output_size=12 is not supported, only 40"),
        ("vit_model", {"hidden_act": "swoosh"}, "unknown activation 'swoosh'"),
        ("vit_model", {"architectures": ["ViTForMaskedImageModeling"]}, "unknown architecture.*ViTModel"),
        (
            "vit_model",
            {"image_size": 64},
            r"position_embeddings has shape \(1, 17, 40\), which does not fit",
        ),
        (
            "clip",
            {"text_config_dict": {"eos_token_id": [5, 6]}},
            r"eos_token_id=\[5, 6\] is not supported",
        ),
        ("clip", {"projection_dim": 12}, r"projection.weight has shape \(24, 32\), which does not fit"),
        ("clip", {"architectures": ["CLIPForImageClassification"]}, "unknown architecture.*CLIPModel"),
    ],
)
def test_what_is_not_supported_is_one_line(name, changes, message, tmp_path):
    config = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(FIXTURES / name / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        huggingface.load(str(tmp_path))
    assert "\n" not in str(error.value)


@fixtures
def test_fields_go_to_the_encoders_that_have_them():
    model, _ = huggingface.load(str(FIXTURES / "clip"), remat="full", any_size=True)
    image, text = model.encoders["image"], model.encoders["text"]
    assert image.remat == text.backbone["remat"] == "full" and image.any_size
    with pytest.raises(UserError, match="no block of this model has a field 'any_sizes'"):
        huggingface.load(str(FIXTURES / "clip"), any_sizes=True)
