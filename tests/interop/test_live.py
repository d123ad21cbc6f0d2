"""Every family against `transformers`, both ways; skipped without the extra `parity`."""

import json

import jax
import numpy as np
import pytest

from vfm import sharding
from vfm.backbones import TwoStream
from vfm.errors import UserError
from vfm.interop import huggingface, llama
from vfm.parity import transformers_models

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# One for each layout of weights; the others are slow tests, and all are in `experiments.certify`.
QUICK = (
    "gpt2", "gptj", "gpt_neo (GPT-3's alternating layers)", "gpt_neox", "bloom (ALiBi)", "mistral (sliding window)",
    "qwen3_moe", "gemma2", "glm4", "bert, pretraining", "roberta", "distilbert", "mt5 (gated, untied)", "pegasus",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in transformers_models.MODELS],
)
def test_equals_transformers_both_ways(name):
    found = transformers_models.compare(name)
    assert found.forward < 1e-4 * max(1.0, found.scale)
    assert found.round_trip < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA in several files, with bf16 tensors."""
    import torch

    path = tmp_path_factory.mktemp("llama")
    model = transformers_models.random_model("llama").to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def copy(folder, to, **changes):
    """A copy whose config.json has other fields; None takes one out."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(to)


def test_onto_a_mesh_piece_by_piece(folder):
    _, whole = huggingface.load(str(folder))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, placed = huggingface.load(str(folder), mesh=mesh)
    kernel = placed["params"]["backbone"]["transformer"]["layers"]["mlp"]["up"]["kernel"]
    assert not kernel.is_fully_replicated and len(kernel.sharding.device_set) == 8
    for found, wanted in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_bf16_files_and_bf16_parameters(folder):
    _, variables = huggingface.load(str(folder), param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"bfloat16"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llamma"}, "unknown model_type 'llamma'.*did you mean 'llama'.*Known: .*gpt2"),
        ({"architectures": ["LlamaForTokens"]}, "unknown architecture 'LlamaForTokens'.*LlamaForCausalLM"),
        ({"hidden_act": "swoosh"}, "unknown activation 'swoosh' in config.json"),
        ({"hidden_size": None}, "the field 'hidden_size' of a 'llama' model is missing"),
        ({"vocab_size": 97}, r"tensor model.embed_tokens.weight has shape \(96, 32\), which does not fit.*\(97, 32\)"),
        ({"num_hidden_layers": 2}, "have no place in a 'llama' model.*model.layers.2"),
        ({"num_hidden_layers": 4}, "the tensor model.layers.3.self_attn.q_proj.weight is missing"),
        (
            {"rope_parameters": {"rope_type": "spiral", "factor": 2.0}},
            "unknown rope_type .spiral.*Known: default, dynamic",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        huggingface.load(copy(folder, tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "config.json").unlink(), "config.json does not exist"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda p: next(p.glob("*-00002-*")).unlink(), "does not exist; the index names it"),
        (lambda p: next(p.glob("*-00002-*")).write_bytes(b"x" * 50), "is not a safetensors file"),
        (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "index.json is damaged"),
        (lambda p: [f.unlink() for f in p.glob("*.safetensors*")], "has no .*safetensors file"),
    ],
)
def test_damaged_folders_are_one_line(folder, tmp_path, damage, message):
    path = copy(folder, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        huggingface.load(path)


def test_a_tensor_of_another_layout_is_refused(folder, tmp_path):
    """Also one that has as many numbers."""
    from safetensors.numpy import load_file, save_file

    path, name = copy(folder, tmp_path), "model.layers.1.mlp.up_proj.weight"
    file = next(f for f in tmp_path.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    save_file({**tensors, name: np.ascontiguousarray(tensors[name].T)}, file)
    with pytest.raises(UserError, match=f"the tensor {name} has shape .* which does not fit"):
        huggingface.load(path)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_norms_of_gemma_in_bf16(name, tmp_path):
    import torch

    model = transformers_models.random_model(next(n for n in transformers_models.MODELS if n.startswith(name[:6])))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    _, variables = huggingface.load(str(tmp_path))
    found = variables["params"]["backbone"]["transformer"]["norm"]["scale"]
    wanted = 1 + model.model.norm.weight.detach().float().numpy()
    np.testing.assert_array_equal(found, wanted)


def test_a_pretrained_bert_of_which_one_head_is_taken(tmp_path):
    model = transformers_models.random_model("bert, pretraining")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    model, _ = huggingface.load(str(tmp_path))
    assert "text" in model.decoders and "label" not in model.decoders


# Fields of config.json that files need not have, with the library's own value where they are missing.
@pytest.mark.parametrize("kind", sorted(llama.CLASSES))
def test_what_a_config_does_not_say_is_as_in_the_library(kind):
    config = transformers.AutoConfig.for_model(kind)
    whole = {name: value for name, value in config.to_dict().items() if value is not None}
    whole |= {"num_hidden_layers": 6, "head_dim": 64, "num_key_value_heads": whole["num_attention_heads"]}
    whole.pop("layer_types", None)
    epsilons = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
    read = lambda c: huggingface.FAMILIES[kind].read(c, "lm")["backbone"]
    full = read(whole)
    for fields in (epsilons, ("sliding_window",), ("rope_theta", "rope_parameters", "rope_scaling")):
        short = read({name: value for name, value in whole.items() if name not in fields})
        for name in ("norm_epsilon", "window", "rope_theta"):
            assert short[name] == full[name], (kind, name)


def test_the_pattern_of_local_layers(tmp_path):
    c = transformers.AutoConfig.for_model("gemma3_text").to_dict()
    c |= {"num_hidden_layers": 6, "layer_types": None, "sliding_window_pattern": 3}
    local = huggingface.FAMILIES["gemma3_text"].read(c, "lm")["backbone"]["local_layers"]
    assert local == (True, True, False) * 2


def test_older_names_of_bloom():
    c = transformers.AutoConfig.for_model("bloom", hidden_size=64, n_layer=2, n_head=4).to_dict()
    wanted = huggingface.FAMILIES["bloom"].read(c, "lm")
    older = {name: value for name, value in c.items() if name not in ("hidden_size", "n_head")}
    assert huggingface.FAMILIES["bloom"].read({**older, "n_embed": 64, "num_attention_heads": 4}, "lm") == wanted


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        huggingface.load(str(tmp_path / "nothing"))


def test_a_model_that_no_family_can_express(tmp_path):
    from vfm import model as model_lib

    text = {"vocab_size": 96, "width": 32}
    model = model_lib.build(
        {
            "centre": "text",
            "encoders": {"text": {"name": "text", **text}},
            "backbone": {"name": "decoder_only", "positions": "none"},
            "decoders": {"text": {"name": "text", "vocab_size": 96}},
        }
    )
    with pytest.raises(UserError, match="no family can express this model"):
        huggingface.save(str(tmp_path), model, {"params": {}})
    model = model.clone(backbone=TwoStream())
    with pytest.raises(UserError, match="model.backbone.name='two_stream' is one that no published family has"):
        huggingface.save(str(tmp_path), model, {"params": {}})
