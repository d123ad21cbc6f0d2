"""Autoencoders in the layout of `diffusers`: outputs, gradients, and the way back."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vfm import model as model_lib
from vfm import tree
from vfm.errors import UserError
from vfm.interop import autoencoder as autoencoders
from vfm.interop import diffusers, huggingface

FIXTURES = pathlib.Path(__file__).resolve().parents[3] / "shared" / "fixtures"
FILE = "diffusion_pytorch_model.safetensors"
NAMES = ("autoencoder_kl", "vq_model")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
fixtures = pytest.mark.skipif(not (FIXTURES / NAMES[0]).is_dir(), reason="no reference files")


@pytest.fixture(scope="module")
def loaded():
    """name -> (model, variables, arrays, out of the model), each made once."""
    found = {}

    def get(name):
        if name not in found:
            model, variables = huggingface.load(str(FIXTURES / name))
            io = np.load(FIXTURES / name / "io.npz")
            run = jax.jit(lambda v, x: model.apply(v, inputs={"image": x}, train=False)[1]["image"])
            found[name] = model, variables, io, run(variables, last(io["basic/in/sample"])[:, None])
        return found[name]

    return get


def last(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def flat(x):
    """[B, C, H, W] of the library as our latents [B, P, C]."""
    return last(x).reshape(len(x), -1, x.shape[1])


def decode(model, variables, z):
    """The item that our features, latents times the scaling factor, give."""
    half = lambda m, z: m.decoders["image"](z * m.encoders["image"].scaling_factor, train=False)[0]
    return jax.jit(lambda v, z: model.apply(v, z, method=half))(variables, z)


@fixtures
@pytest.mark.parametrize("name", NAMES)
def test_the_item_of_an_item(loaded, name):
    model, _, io, out = loaded(name)
    np.testing.assert_allclose(out["reconstructed"][:, 0], last(io["basic/out/sample"]), **CLOSE)
    assert model.encoders["image"].scaling_factor == 0.18215


@fixtures
def test_the_posterior(loaded):
    _, _, io, out = loaded("autoencoder_kl")
    found = out["encoder"]
    np.testing.assert_array_equal(io["encode/in/x"], io["basic/in/sample"])
    np.testing.assert_allclose(found["mean"], flat(io["encode/out/latent_dist.mean"]), **CLOSE)
    np.testing.assert_allclose(found["logvar"], flat(io["encode/out/latent_dist.logvar"]), **CLOSE)
    np.testing.assert_allclose(found["rate"], io["kl/out/kl"], **CLOSE)
    np.testing.assert_allclose(out["features"][:, 0], 0.18215 * found["mean"], **CLOSE)


@fixtures
def test_the_codes(loaded):
    _, _, io, out = loaded("vq_model")
    found = out["encoder"]
    np.testing.assert_allclose(found["latents"], flat(io["encode/out/latents"]), **CLOSE)
    np.testing.assert_array_equal(found["codes"], io["codes/out/indices"].reshape(2, -1))
    np.testing.assert_allclose(found["quantized"], flat(io["codes/out/z_q"]), **CLOSE)
    # The library's sum of both errors, the second with its weight of 0.25.
    error = found["codebook_error"] + 0.25 * found["commitment_error"]
    np.testing.assert_allclose(error.mean(), io["basic/out/commit_loss"], **CLOSE)


@fixtures
def test_decoding(loaded):
    model, variables, io, _ = loaded("autoencoder_kl")
    found = decode(model, variables, flat(io["decode/in/z"]))
    np.testing.assert_allclose(found, last(io["decode/out/sample"]), **CLOSE)
    model, variables, io, _ = loaded("vq_model")
    found = decode(model, variables, flat(io["decode_without_quantising/in/h"]))
    np.testing.assert_allclose(found, last(io["decode_without_quantising/out/sample"]), **CLOSE)
    look_up = lambda m, z: m.encoders["image"].quantizer(z, train=False)[0]
    quantized = jax.jit(lambda v, z: model.apply(v, z, method=look_up))(variables, flat(io["decode/in/h"]))
    np.testing.assert_allclose(decode(model, variables, quantized), last(io["decode/out/sample"]), **CLOSE)


@fixtures
@pytest.mark.parametrize("name", NAMES)
def test_gradients(loaded, name):
    """The norm of the gradient of each tensor; that of a codebook is zero, for the straight-through passes it by."""
    model, variables, io, _ = loaded(name)
    x, cotangent = last(io["basic/in/sample"])[:, None], last(io["basic/in/cotangent"])[:, None]

    def loss(params):
        return (
            model.apply({"params": params}, inputs={"image": x}, train=False)[1]["image"]["reconstructed"] * cotangent
        ).sum()

    found = tree.flatten(jax.jit(jax.grad(loss))(variables["params"]))
    family = diffusers.FAMILIES[json.loads((FIXTURES / name / "config.json").read_text())["_class_name"]]
    by_name = family.tensors(model, {path: np.asarray(g) for path, g in found.items()})
    reference = dict(zip(io["basic/grad/names"].tolist(), io["basic/grad/l2"]))
    total = float(io["basic/grad/global_norm"])
    assert len(reference) > 100 and set(reference) <= set(by_name)
    for tensor, norm in reference.items():
        np.testing.assert_allclose(np.linalg.norm(by_name[tensor]), norm, rtol=1e-3, atol=1e-6 * total, err_msg=tensor)


@fixtures
@pytest.mark.parametrize("name", NAMES)
def test_saved_as_it_was(loaded, name, tmp_path):
    model, variables, _, _ = loaded(name)
    diffusers.save(str(tmp_path), model, variables)
    before, after = (load_file(folder / FILE) for folder in (FIXTURES / name, tmp_path))
    assert set(before) == set(after)
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor], err_msg=tensor)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (FIXTURES / name, tmp_path))
    assert {key: value for key, value in new.items() if old[key] != value} == {}
    again, found = huggingface.load(str(tmp_path))
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, found, variables)


@fixtures
def test_fields_and_older_names(loaded, tmp_path):
    model, variables, io, _ = loaded("autoencoder_kl")
    shutil.copy(FIXTURES / "autoencoder_kl" / "config.json", tmp_path)
    older = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = load_file(FIXTURES / "autoencoder_kl" / FILE)
    for new, old in older.items():
        tensors = {name.replace(new, old): x for name, x in tensors.items()}
    save_file(tensors, tmp_path / FILE)
    large, found = huggingface.load(str(tmp_path), image_size=(32, 16), centred=True)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert large.encoders["image"].item_shape == (32, 16, 3) and large.decoders["image"].centred
    with pytest.raises(UserError, match="no block of this model has a field 'remat'"):
        huggingface.load(str(tmp_path), remat="full")


CONFIG = {
    "_class_name": "VQModel", "block_out_channels": [4, 8], "norm_num_groups": 2, "sample_size": 8, "in_channels": 1,
    "out_channels": 1, "num_vq_embeddings": 5, "vq_embed_dim": 3, "latent_channels": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_type": "spatial"}, "a 'VQModel' model with norm_type='spatial' is not supported"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "is not supported, only DownEncoderBlock2D and Attn"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "attention at other levels"),
        ({"in_channels": 3}, "in_channels=3 and out_channels=1 differ"),
        ({"_class_name": "AutoencoderKL", "use_quant_conv": False}, "use_quant_conv and use_post_quant_conv differ"),
        ({"_class_name": "AutoencoderKL", "shift_factor": 0.1}, "with shift_factor=0.1 is not supported"),
        ({}, "the tensor .* is missing"),
    ],
    ids=["norm", "levels", "attention", "channels", "quant_conv", "shift", "tensor"],
)
def test_refuses(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / FILE)
    with pytest.raises(UserError, match=message):
        huggingface.load(str(tmp_path))


def autoencoder(bottleneck, attention=(False, True), **fields):
    both = {"name": "latent", "image_size": (8, 8), "widths": (4, 8), "groups": 2, "attention": attention, **fields}
    halves = {"encoders": {"image": {**both, "bottleneck": bottleneck}}, "decoders": {"image": both}}
    return model_lib.build({"centre": "image", "backbone": None, **halves})


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_trained_codebook_is_saved_where_it_stands(update, tmp_path):
    """The codes are the parameter and what it was moved by, or averages; and attention has its place in the blocks."""
    neck = {"name": "vq", "codebook_size": 5, "update": update, "restart": 3}
    model = autoencoder(neck, embed_dim=3)
    shapes, rng = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), 1)), np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    diffusers.save(str(tmp_path), model, variables)
    again, found = huggingface.load(str(tmp_path))
    codes = lambda model, v: model.apply(v, method=lambda m: m.encoders["image"].quantizer.codebook.codes())
    np.testing.assert_array_equal(codes(again, found), codes(model, variables))
    ours, theirs = tree.flatten(variables["params"]), tree.flatten(found["params"])
    if update == "gradient":
        assert (theirs.pop(autoencoders.CODEBOOK) != ours.pop(autoencoders.CODEBOOK)).all()
    else:
        theirs.pop(autoencoders.CODEBOOK)
    assert set(ours) == set(theirs) and any("down_1_attention_0" in path for path in ours)
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path])


@pytest.mark.parametrize(
    "make",
    [
        lambda: autoencoder({"name": "none"}),
        lambda: autoencoder({"name": "vq", "normalize": True}, embed_dim=3),
        lambda: autoencoder({"name": "gaussian"}, embed_dim=3),
        lambda: autoencoder({"name": "gaussian"}, centred=True),
    ],
    ids=["plain", "cosine", "other width", "centred"],
)
def test_refuses_to_save_what_the_layout_cannot_say(make, tmp_path):
    with pytest.raises(UserError, match="can express this model"):
        diffusers.save(str(tmp_path), make(), {"params": {}})
