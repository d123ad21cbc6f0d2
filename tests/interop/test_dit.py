"""DiT checkpoints in the layout of `diffusers`: forward passes, gradients, guided sampling, and the way back."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny
from vfm import model as model_lib
from vfm import tree
from vfm.diffusion import guide
from vfm.errors import UserError
from vfm.interop import diffusers, huggingface

FIXTURES = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "fixtures"
FILE = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.skipif(not (FIXTURES / "dit").is_dir(), reason="needs the reference outputs of DiT")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def loaded():
    model, variables = huggingface.load(str(FIXTURES / "dit"))
    return model, variables, np.load(FIXTURES / "dit" / "io.npz")


def last(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def network(module, x, t, labels):
    """What the network gives for a class, or for the null condition at the class behind the last."""
    decoder = module.decoders["image"]
    known = module.encoders["label"].num_classes
    condition, _ = module.encoders["label"](jnp.minimum(labels, known - 1), train=False)
    condition = decoder.unconditional(condition, labels == known)
    return decoder.denoiser(x, t, condition, train=False)[0]


def run(model, variables, *arguments):
    return jax.jit(lambda v: model.apply(v, *arguments, method=network))(variables)


@pytest.mark.parametrize("case", ["basic", "noninteger_timestep"])
def test_outputs_are_those_of_the_reference(loaded, case):
    model, variables, io = loaded
    given = [jnp.asarray(io[f"{case}/in/{name}"]) for name in ("timestep", "class_labels")]
    found = run(model, variables, last(io[f"{case}/in/hidden_states"]), *given)
    np.testing.assert_allclose(found, last(io[f"{case}/out/sample"]), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_reference(loaded):
    """The norm of the gradient of each tensor."""
    model, variables, io = loaded
    x, cotangent = last(io["basic/in/hidden_states"]), last(io["basic/in/cotangent"])
    t, labels = (jnp.asarray(io[f"basic/in/{name}"]) for name in ("timestep", "class_labels"))

    def loss(params):
        return (model.apply({"params": params}, x, t, labels, method=network) * cotangent).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    np.testing.assert_allclose(value, io["basic/out/cotangent_loss"], rtol=1e-4)
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(gradient).items()}
    norms = dict(zip(io["basic/grad/names"], io["basic/grad/l2"], strict=True))
    # The condition's kernel is the table of classes; its bias is none of their parameters.
    for i in range(2):
        found = np.linalg.norm(flat["decoders_image/denoiser/embedders/layers/condition/kernel"][i])
        name = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        np.testing.assert_allclose(found, norms.pop(name), rtol=1e-3)
    named = diffusers.FAMILIES["DiTTransformer2DModel"].tensors(model, flat)
    for name, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(named[name]), norm, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm_learned"])
def test_guided_sampling_is_that_of_the_reference(loaded, scheduler):
    model, variables, _ = loaded
    folder = FIXTURES / "functions" / "dit_sampling"
    params, io = json.loads((folder / "meta.json").read_text())["params"], np.load(folder / "io.npz")
    process = model.bind(variables).decoders["image"].dynamics
    timesteps = process.spaced(params["steps"], "leading")
    np.testing.assert_array_equal(timesteps, io[f"out/{scheduler}/timesteps"])
    previous = timesteps - process.timesteps // params["steps"] if scheduler == "ddim" else None
    steps = process.steps(timesteps, None if previous is None else np.maximum(previous, -1))
    labels = jnp.asarray(params["labels"])
    both = jnp.concatenate([labels, jnp.full(labels.shape, params["null"])])
    denoise = jax.jit(lambda x, t: model.apply(variables, jnp.concatenate([x, x]), t, both, method=network))
    x, draws = last(io["in/start"]), iter(io["in/step_noise"])
    for n, t in enumerate(timesteps):
        given, free = jnp.split(denoise(x, jnp.full(len(both), t)), 2)
        output = jnp.concatenate([guide(given[..., :4], free[..., :4], params["guidance"]), given[..., 4:]], axis=-1)
        step = type(steps)(*(a[n] for a in steps))
        if scheduler == "ddim":
            x = process.ddim_step(output, x, step, jnp.zeros_like(x))
        else:
            x = process.ddpm_step(output, x, step, last(next(draws)) if t else jnp.zeros_like(x))
        expected = last(io[f"out/{scheduler}"][n])
        # These weights lead to latents of hundreds, and rounding is as large as the largest.
        np.testing.assert_allclose(x, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)
        x = expected


def test_the_decoder_draws_with_guidance(loaded):
    model, variables, _ = loaded

    @jax.jit
    def draw(variables):
        _, out = model.apply(variables, inputs={"label": jnp.array([[3], [7]])}, train=False)
        settings = {"rng": jax.random.key(0), "steps": 2, "guidance": 2.5, "clip": False}
        return model.apply(variables, "image", out, **settings, method="sample")

    assert draw(variables).shape == (2, 1, 8, 8, 4) and bool(jnp.isfinite(draw(variables)).all())


def test_saved_folder_is_the_loaded_one(loaded, tmp_path):
    model, variables, _ = loaded
    diffusers.save(str(tmp_path), model, variables)
    before, after = load_file(FIXTURES / "dit" / FILE), load_file(tmp_path / FILE)
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((FIXTURES / "dit" / "config.json").read_text())
    assert {**theirs, **ours} == theirs and set(theirs) - set(ours) == {"_diffusers_version"}


def test_equal_embeddings_of_all_blocks_are_one(loaded, tmp_path):
    model, _, io = loaded
    tensors = load_file(FIXTURES / "dit" / FILE)
    for name in [name for name in tensors if name.startswith("transformer_blocks.0.norm1.emb.")]:
        tensors[name.replace("blocks.0", "blocks.1")] = tensors[name]
    save_file(tensors, tmp_path / FILE)
    shutil.copy(FIXTURES / "dit" / "config.json", tmp_path)
    one, variables = diffusers.load(str(tmp_path))
    assert one.decoders["image"].network["embedders"] == "shared"
    assert "embedder" in variables["params"]["decoders_image"]["denoiser"]
    diffusers.save(str(tmp_path / "again"), one, variables)
    for name, tensor in load_file(tmp_path / "again" / FILE).items():
        np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize(
    "config, tensor, words",
    [
        ({"norm_type": "layer_norm"}, None, "norm_type='layer_norm' is not supported"),
        ({"out_channels": 5}, None, "out_channels=5 is neither in_channels=4 nor twice that"),
        ({"_class_name": "UNet2DModel"}, None, "unknown _class_name 'UNet2DModel'.*DiTTransformer2DModel"),
        ({"patch_size": 4}, None, "denoiser/patch/kernel has shape"),
        ({}, "proj_out_2.bias", "the tensor proj_out_2.bias is missing"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, config, tensor, words):
    c = json.loads((FIXTURES / "dit" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**c, **config}))
    tensors = load_file(FIXTURES / "dit" / FILE)
    tensors.pop(tensor, None)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(UserError, match=words):
        huggingface.load(str(tmp_path))


def test_a_model_of_another_kind_cannot_be_saved(tmp_path):
    vit = {"name": "vit", "depth": 1}
    model = model_lib.build({"centre": "image", "backbone": None, "encoders": {"image": vit}})
    with pytest.raises(UserError, match="none of .*DiTTransformer2DModel.* can express this model"):
        diffusers.save(str(tmp_path), model, {"params": {}})
