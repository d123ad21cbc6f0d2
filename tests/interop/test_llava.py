"""LLaVA against the reference files and, where it is installed, against `transformers` itself, both ways."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm.errors import UserError
from vfm.generate import generate
from vfm.interop import huggingface, llava
from vfm.parity import transformers_llava

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "llava"
IMAGE, PATCHES = 199, 16  # the placeholder, and how many stand for an image
fixture = pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")


@pytest.fixture(scope="module")
def loaded():
    model, variables = huggingface.load(str(FIXTURE))
    run = jax.jit(lambda variables, call: model.apply(variables, **call, train=False))
    return model, variables, np.load(FIXTURE / "io.npz"), run


def arguments(io, case):
    given = {key.split("/")[-1]: io[key] for key in io.files if key.startswith(f"{case}/in/")}
    call = llava.arrange(given["input_ids"], given["pixel_values"], IMAGE, PATCHES)
    call["input_mask"] = given["attention_mask"].astype(bool)
    if "position_ids" in given:
        call["positions"] = given["position_ids"].astype(np.int32)
    return call, given


def loss(logits, labels):
    logits, labels = logits[:, :-1], jnp.asarray(labels[:, 1:])
    kept = labels >= 0
    return (optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(kept, labels, 0)) * kept).sum() / (
        kept.sum()
    )


@fixture
@pytest.mark.parametrize("case", ["basic", "padded_left_two_images"])
def test_forward(loaded, case):
    model, variables, io, run = loaded
    call, given = arguments(io, case)
    logits, out = run(variables, call)
    real = call["input_mask"][:, :, None]
    close = lambda x, y: np.testing.assert_allclose(np.where(real, x, 0), np.where(real, y, 0), atol=1e-4, rtol=1e-4)
    close(logits, io[f"{case}/out/logits"])
    if case == "basic":
        for n, ours in enumerate([out["backbone"]["input"], out["backbone"]["layers"][0], out["output"]]):
            close(ours, io[f"{case}/out/hidden_states.{n}"])
        assert abs(float(loss(logits, given["labels"])) - float(io[f"{case}/out/loss"])) < 1e-5
    # What the projector gives stands at the images' places, image by image.
    places = np.asarray(out["backbone"]["input"])[given["input_ids"] == IMAGE]
    np.testing.assert_allclose(places, io[f"{case}/out/image_hidden_states"], atol=1e-4, rtol=1e-4)
    assert call["starts"]["image"].shape == ((2, 2) if case != "basic" else (2, 1))


@fixture
@pytest.mark.slow
def test_gradient(loaded):
    model, variables, io, _ = loaded
    call, given = arguments(io, "basic")
    gradient = jax.jit(
        jax.grad(lambda params: loss(model.apply({"params": params}, **call, train=False)[0], given["labels"]))
    )(variables["params"])
    np.testing.assert_allclose(float(optax.tree.norm(gradient)), float(io["basic/grad/global_norm"]), rtol=1e-4)
    # Behind the layer that is read nothing learns.
    layers = gradient["encoders_image"]["transformer"]["layers"]
    norms = np.linalg.norm(np.asarray(layers["mlp"]["up"]["kernel"]).reshape(3, -1), axis=1)
    assert model.encoders["image"].feature_layer == 2 and norms[2] == 0 < norms[1]


@fixture
def test_greedy(loaded):
    model, variables, io, _ = loaded
    call, _ = arguments(io, "greedy")
    found = generate(model, variables, call, max_new=24, eos_id=(), pad_id=0)
    np.testing.assert_array_equal(found, io["greedy/out/sequences"][:, call["tokens"].shape[1] :])


@fixture
def test_saved_as_it_was(loaded, tmp_path):
    from safetensors.numpy import load_file

    model, variables, _, _ = loaded
    huggingface.save(str(tmp_path), model, variables, image_token_index=IMAGE)
    before, after = load_file(FIXTURE / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (FIXTURE, tmp_path))
    for field in ("model_type", "architectures", "image_token_index", "vision_feature_layer", "projector_hidden_act"):
        assert new[field] == old[field]
    assert new["text_config"].items() >= {k: old["text_config"][k] for k in ("hidden_size", "head_dim")}.items()
    assert huggingface.load(str(tmp_path))[0] == model


@fixture
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' is not supported"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\] is not supported"),
        ({"vision_feature_layer": -4}, "vision_feature_layer=-4 is not supported, only one of its 3 layers"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "unknown model_type 'siglip_vision_model'"),
        ({"text_config": {"model_type": "gpt2"}}, "unknown model_type 'gpt2'.*Known: llama, mistral, qwen2"),
        ({"projector_hidden_act": "swoosh"}, "unknown activation 'swoosh'"),
    ],
)
def test_what_is_not_supported_is_one_line(tmp_path, changes, message):
    config = json.loads((FIXTURE / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((FIXTURE / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        huggingface.load(str(tmp_path))


def test_a_published_config_that_says_little():
    """As in the folders of LLaVA-1.5: the sizes of LLaMA 7B are the library's defaults."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    cfg = llava.FAMILIES["llava"].read({"text_config": text, "image_token_index": 32000}, "lm")
    assert (cfg["backbone"]["width"], cfg["backbone"]["depth"], cfg["backbone"]["max_len"]) == (4096, 32, 4096)
    image = cfg["encoders"]["image"]
    assert (image["image_size"], image["width"], image["depth"], image["feature_layer"]) == ((336, 336), 1024, 24, 23)
    assert cfg["input_projectors"]["image"]["activation"] == "gelu"


def test_arrange_images_and_their_places():
    tokens = np.asarray([[5, 9, 9, 6, 9, 9], [7, 7, 9, 9, 7, 7]])
    images = np.arange(3 * 2 * 2 * 1).reshape(3, 1, 2, 2)
    call = llava.arrange(tokens, images, 9, 2)
    np.testing.assert_array_equal(call["starts"]["image"], [[1, 4], [2, -1]])
    np.testing.assert_array_equal(call["inputs"]["image"][0, 1, :, :, 0], images[1, 0])
    np.testing.assert_array_equal(call["inputs"]["image"][1, 0, :, :, 0], images[2, 0])
    assert call["inputs"]["image"].shape == (2, 2, 2, 2, 1) and not call["inputs"]["image"][1, 1].any()
    with pytest.raises(UserError, match="have places for 3 images, but 2 are given"):
        llava.arrange(tokens, images[:2], 9, 2)
    with pytest.raises(UserError, match="row 0 has 4 tokens 9, which are not 3 in a row for each image"):
        llava.arrange(tokens, images, 9, 3)
    with pytest.raises(UserError, match="row 0 has 2 tokens 9, which are not 2 in a row"):
        llava.arrange(np.asarray([[9, 1, 9]]), images[:1], 9, 2)


LIVE = [pytest.param(name, marks=() if name == "llava" else pytest.mark.slow) for name in transformers_llava.MODELS]


@pytest.mark.parametrize("name", LIVE)
def test_equals_transformers_both_ways(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = transformers_llava.compare(name)
    assert found.forward < 1e-4 * max(1.0, found.scale) and found.round_trip < 1e-5
