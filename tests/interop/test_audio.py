"""Whisper of the reference fixtures, and Whisper and AST against `transformers` both ways."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm import tree
from vfm.errors import UserError
from vfm.generate import generate
from vfm.interop import huggingface
from vfm.parity import transformers_audio as audio

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "whisper"
needs_fixture = pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def whisper():
    model, variables = huggingface.load(str(FIXTURE))
    return model, variables, np.load(FIXTURE / "io.npz")


def arguments(io, case, model):
    """Our arguments of a case; without ids for the decoder they are the labels, shifted right."""
    call = {key.split("/")[-1]: io[key] for key in io.files if key.startswith(f"{case}/in/")}
    labels = call.pop("labels", None)
    if labels is not None:
        c = json.loads((FIXTURE / "config.json").read_text())
        start = np.full((len(labels), 1), c["decoder_start_token_id"])
        filled = np.where(labels < 0, c["pad_token_id"], labels)
        call["decoder_input_ids"] = np.concatenate([start, filled[:, :-1]], axis=1)
    return audio.arguments(call, model), labels


def loss_of(logits, labels):
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return (nll * (labels >= 0)).sum() / (labels >= 0).sum()


@needs_fixture
def test_whisper(whisper):
    model, variables, io = whisper
    call, labels = arguments(io, "basic", model)
    run = jax.jit(lambda variables, call: model.apply(variables, **call, train=False))
    logits, out = run(variables, call)
    np.testing.assert_allclose(logits, io["basic/out/logits"], **CLOSE)
    assert abs(float(loss_of(logits, labels)) - float(io["basic/out/loss"])) < 1e-5
    encoder, decoder = out["audio"]["encoder"], out["backbone"]
    np.testing.assert_allclose(out["audio"]["features"][:, 0], io["basic/out/encoder_last_hidden_state"], **CLOSE)
    np.testing.assert_allclose(out["audio"]["features"][:, 0], io["basic/out/encoder_hidden_states.2"], **CLOSE)
    np.testing.assert_allclose(decoder["encoder"]["output"], io["basic/out/encoder_last_hidden_state"], **CLOSE)
    for number, states in enumerate((encoder["input"], encoder["layers"][0])):
        np.testing.assert_allclose(states, io[f"basic/out/encoder_hidden_states.{number}"], **CLOSE)
    for number, states in enumerate((decoder["input"], decoder["layers"][0], out["output"])):
        np.testing.assert_allclose(states, io[f"basic/out/decoder_hidden_states.{number}"], **CLOSE)
    call, _ = arguments(io, "decoder_given", model)
    np.testing.assert_allclose(run(variables, call)[0], io["decoder_given/out/logits"], **CLOSE)


@pytest.mark.slow
@needs_fixture
def test_gradient_norm_of_whisper(whisper):
    model, variables, io = whisper
    call, labels = arguments(io, "basic", model)
    loss = lambda params: loss_of(model.apply({"params": params}, **call, train=False)[0], labels)
    norm = float(optax.tree.norm(jax.jit(jax.grad(loss))(variables["params"])))
    np.testing.assert_allclose(norm, float(io["basic/grad/global_norm"]), rtol=1e-4)


@needs_fixture
def test_whisper_writes_what_the_library_writes(whisper):
    model, variables, io = whisper
    call, _ = arguments(io, "greedy", model)
    wanted = io["greedy/out/sequences"]
    about = json.loads((FIXTURE / "meta.json").read_text())["cases"]["greedy"]
    found = generate(
        model, variables, call, max_new=about["new_tokens"], start_id=about["start_token"], eos_id=(), pad_id=199
    )
    np.testing.assert_array_equal(found, wanted[:, 1:])


@needs_fixture
def test_whisper_hears_waveforms(whisper):
    """Of 80 frames of 10 ms: the front end is the usual one, for the folder says nothing of it."""
    model, variables, io = whisper
    call, _ = arguments(io, "decoder_given", model)
    B = len(call["decoder_tokens"])
    assert model.encoders["audio"].item_shape == (12_800,)
    call["inputs"] = {"audio": np.zeros((B, 1, 12_800), np.float32)}
    logits, out = jax.eval_shape(lambda call: model.apply(variables, **call, train=False), call)
    assert logits.shape == io["decoder_given/out/logits"].shape
    assert out["audio"]["encoder"]["log_mel"].shape == (B, 80, 20)


@needs_fixture
def test_load_save_load(whisper, tmp_path):
    from safetensors.numpy import load_file

    model, variables, _ = whisper
    huggingface.save(str(tmp_path), model, variables)
    written, read = (load_file(folder / "model.safetensors") for folder in (tmp_path, FIXTURE))
    assert set(read) - set(written) == {"model.encoder.embed_positions.weight"}  # fixed
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, read[key])
    again, same = huggingface.load(str(tmp_path))
    assert again == model
    for path, leaf in tree.flatten(same).items():
        np.testing.assert_array_equal(leaf, tree.flatten(variables)[path])


# The others are slow tests, and all are in `experiments.certify`.
QUICK = ("ast, classification",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in audio.MODELS])
def test_equals_transformers_both_ways(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = audio.compare(name)
    assert found.forward < 1e-4 * max(1.0, found.scale)
    assert found.round_trip < 1e-5


@pytest.fixture(scope="module")
def ast(tmp_path_factory):
    """A folder of a small AST with the front end of another data set than AudioSet."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("ast")
    transformers.ASTModel(transformers.ASTConfig(**audio._AST)).save_pretrained(folder)
    front_end = transformers.ASTFeatureExtractor(max_length=41, num_mel_bins=24, mean=-6.8, std=5.6)
    front_end.save_pretrained(folder)
    return folder, front_end


def test_the_front_end_is_that_of_the_folder(ast, tmp_path):
    folder, front_end = ast
    model, variables = huggingface.load(str(folder))
    sound = np.random.default_rng(0).normal(size=model.encoders["audio"].item_shape).astype(np.float32) * 0.1
    run = jax.jit(lambda variables, sound: model.apply(variables, inputs={"audio": sound}, train=False)[1])
    wanted = front_end(sound, sampling_rate=16_000)["input_values"][0]
    out = run(variables, sound[None, None])
    np.testing.assert_allclose(out["audio"]["encoder"]["fbank"][0], wanted, atol=1e-4)
    huggingface.save(str(tmp_path), model, variables)
    again, _ = huggingface.load(str(tmp_path))
    assert again == model
    longer, _ = huggingface.load(str(folder), num_samples=9000, mask_time=0.2)
    assert longer.encoders["audio"].item_shape == (9000,) and longer.encoders["audio"].num_frames == 41


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("config", {"architectures": ["ASTForMasking"]}, "unknown architecture 'ASTForMasking'.*ASTModel"),
        ("config", {"patch_size": [8, 8]}, r"patch_size=\[8, 8\] is not supported, only a whole number"),
        ("config", {"num_mel_bins": 30}, "num_mel_bins=24 is not supported, only 30"),
        ("preprocessor_config", {"max_length": 99}, "max_length=99 is not supported, only 41"),
    ],
)
def test_what_is_not_supported_is_one_line(ast, file, changes, message, tmp_path):
    for path in ast[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message) as error:
        huggingface.load(str(tmp_path))
    assert "\n" not in str(error.value)


@needs_fixture
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["WhisperForAudioClassification"]}, "unknown architecture.*WhisperForConditionalGeneration"),
        ({"scale_embedding": True}, "a 'whisper' model with scale_embedding=True is not supported"),
        ({"max_target_positions": 40}, r"embed_positions.weight has shape \(48, 40\), which does not fit"),
    ],
)
def test_other_whispers_are_one_line(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((FIXTURE / "config.json").read_text()) | changes))
    (tmp_path / "model.safetensors").symlink_to(FIXTURE / "model.safetensors")
    with pytest.raises(UserError, match=message):
        huggingface.load(str(tmp_path))
