"""Language models of the reference fixtures: logits, hidden states, losses and gradient norms."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm.interop import huggingface

FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "fixtures"
CLASSES = ("Llama", "Mixtral", "GPT2", "Bert", "T5For", "Bart")


def _models():
    for meta in sorted(FIXTURES.glob("*/meta.json")):
        about = json.loads(meta.read_text(encoding="utf-8"))
        if about["class"].startswith(CLASSES):
            yield meta.parent.name


def _cases():
    for name in _models():
        cases = json.loads((FIXTURES / name / "meta.json").read_text(encoding="utf-8"))["cases"]
        yield from ((name, case) for case, about in cases.items() if about.get("method", "forward") == "forward")


pytestmark = pytest.mark.skipif(not FIXTURES.exists(), reason="no reference files")
NAMES = {
    "input_ids": "tokens", "attention_mask": "input_mask", "position_ids": "positions",
    "token_type_ids": "token_types", "decoder_input_ids": "decoder_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    """name -> (model, variables, arrays, forward pass), each loaded once."""
    found = {}

    def get(name):
        if name not in found:
            model, variables = huggingface.load(str(FIXTURES / name))
            run = jax.jit(lambda variables, call: model.apply(variables, **call, train=False))
            found[name] = (model, variables, np.load(FIXTURES / name / "io.npz"), run)
        return found[name]

    return get


def arguments(io, case, model):
    """Our arguments of the library's call."""
    given = {key.split("/")[-1]: io[key] for key in io.files if key.startswith(f"{case}/in/")}
    call = {ours: jnp.asarray(given[theirs]) for theirs, ours in NAMES.items() if theirs in given}
    if "decoder_attention_mask" in given:
        call["decoder_mask"] = jnp.asarray(given["decoder_attention_mask"])
    if "labels" in given and model.backbone.kind == "encoder_decoder" and "decoder_tokens" not in call:
        start = model_start(io, model)
        labels = np.where(given["labels"] < 0, start[1], given["labels"])
        shifted = np.concatenate([np.full((len(labels), 1), start[0]), labels[:, :-1]], axis=1)
        call["decoder_tokens"] = jnp.asarray(shifted)
    for name in ("input_mask", "decoder_mask"):
        if name in call:
            call[name] = call[name].astype(bool)
    return {name: v if v.dtype == bool else v.astype(jnp.int32) for name, v in call.items()}, given


def model_start(io, model):
    """(id that starts the decoder, id in place of ignored labels)."""
    return (2, 1) if model.backbone.positions == "learned" else (0, 0)


def losses(model, given, logits, out):
    """The library's loss of the case."""

    def mean(logits, labels):
        kept = labels >= 0
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(kept, labels, 0))
        return (nll * kept).sum() / kept.sum()

    total, labels = 0.0, jnp.asarray(given["labels"])
    if model.backbone.kind == "decoder_only" and labels.ndim == 2:
        total = mean(logits[:, :-1], labels[:, 1:])
    else:
        total = mean(logits, labels)
    if "next_sentence_label" in given:
        total += mean(out["label"]["logits"], jnp.asarray(given["next_sentence_label"]).reshape(-1))
    return total


def close(found, wanted, mask, **tolerance):
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted)
    if mask is not None and found.ndim == 3:
        keep = np.asarray(mask, bool)[:, :, None]
        found, wanted = np.where(keep, found, 0), np.where(keep, wanted, 0)
    np.testing.assert_allclose(found, wanted, **tolerance)


@pytest.mark.parametrize("name, case", list(_cases()), ids=lambda value: value)
def test_forward(loaded, name, case):
    model, variables, io, run = loaded(name)
    call, given = arguments(io, case, model)
    logits, out = run(variables, call)
    wanted = {key[len(case) + 5 :]: io[key] for key in io.files if key.startswith(f"{case}/out/")}
    coder = model.backbone.kind == "encoder_decoder"
    mask = call.get("decoder_mask" if coder else "input_mask")
    if logits is not None:
        close(logits, wanted.get("logits", wanted.get("prediction_logits")), mask, atol=1e-4, rtol=1e-4)
    if "seq_relationship_logits" in wanted:
        close(out["label"]["logits"], wanted["seq_relationship_logits"], None, atol=1e-4, rtol=1e-4)
    if "pooler_output" in wanted:
        close(out["label"]["pooled"], wanted["pooler_output"], None, atol=1e-4, rtol=1e-4)
        close(out["output"], wanted["last_hidden_state"], mask, atol=1e-4, rtol=1e-4)
    depth = out["backbone"]["layers"].shape[0]
    for layer in range(depth + 1):
        states = wanted.get(f"{'decoder_' if coder else ''}hidden_states.{layer}")
        if states is not None:
            last = layer == depth and model.backbone.norm_position != "post"
            ours = out["backbone"]["layers"][layer - 1] if layer else out["backbone"]["input"]
            close(out["output"] if last else ours, states, mask, atol=1e-4, rtol=1e-4)
    if "router_logits.0" in wanted:
        for layer in range(depth):
            theirs = wanted[f"router_logits.{layer}"].reshape(out["backbone"]["router_logits"][layer].shape)
            close(out["backbone"]["router_logits"][layer], theirs, mask, atol=1e-4, rtol=1e-4)
    if "loss" in wanted and "aux_loss" not in wanted:
        found = float(losses(model, given, logits, out))
        assert abs(found - float(wanted["loss"])) < 1e-5


def _with_gradients():
    """Models with the gradient of a loss; those whose blocks another one has as well are slow tests."""
    quick = ("gpt2",)
    for name in _models():
        files = np.load(FIXTURES / name / "io.npz").files
        if "basic/out/loss" in files and "basic/out/aux_loss" not in files and "basic/grad/global_norm" in files:
            yield pytest.param(name, marks=() if name in quick else pytest.mark.slow)


@pytest.mark.parametrize("name", list(_with_gradients()))
def test_gradient_norm(loaded, name):
    model, variables, io, _ = loaded(name)
    call, given = arguments(io, "basic", model)

    @jax.jit
    def loss(params):
        logits, out = model.apply({**variables, "params": params}, **call, train=False)
        return losses(model, given, logits, out)

    norm = float(optax.tree.norm(jax.grad(loss)(variables["params"])))
    np.testing.assert_allclose(norm, float(io["basic/grad/global_norm"]), rtol=1e-4)
