"""Parity with `transformers` of models that read images: random ones, written there and read by us, and back."""

import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vfm.parity.transformers_models import Difference, with_random_weights

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
_TEXT = {**SIZES, "vocab_size": 96, "max_position_embeddings": 12, "num_hidden_layers": 3}
_TEXT |= {"pad_token_id": 1, "bos_token_id": 94, "eos_token_id": 95}
_NARROW = {"hidden_size": 24, "intermediate_size": 40}

# name -> (class of the model, fields of its config).
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "vit, pooler": ("ViTModel", _IMAGE),
    "vit, classification": ("ViTForImageClassification", {**_IMAGE, "num_labels": 5, "qkv_bias": False}),
    "vit, oblong, relu": (
        "ViTModel",
        {**_IMAGE, "image_size": [12, 20], "hidden_act": "relu", "pooler_act": "gelu", "num_channels": 2},
    ),
    "clip": ("CLIPModel", {"vision_config": _IMAGE, "text_config": {**_TEXT, **_NARROW}, "projection_dim": 20}),
    "clip, largest id": (
        "CLIPModel",
        {"vision_config": {**_IMAGE, "hidden_act": "gelu"}, "text_config": {**_TEXT, "eos_token_id": 2}},
    ),
    "siglip": ("SiglipModel", {"vision_config": _IMAGE, "text_config": _TEXT}),
    "siglip, texts of another width": (
        "SiglipModel",
        {"vision_config": _IMAGE, "text_config": {**_TEXT, **_NARROW, "projection_size": 32}},
    ),
}
OUTPUTS = ("logits", "pooler_output", "last_hidden_state", "logits_per_image", "image_embeds", "text_embeds")


def compare(name: str, seed: int = 0, save: bool = True) -> Difference:
    """The largest differences over all outputs of a batch of images, and of texts that end at different places."""
    import torch
    import transformers

    from vfm.interop import huggingface

    architecture, fields = MODELS[name]
    cls = getattr(transformers, architecture)
    theirs = with_random_weights(cls, cls.config_class(**fields), seed)
    vision = getattr(theirs.config, "vision_config", theirs.config)
    rng = np.random.default_rng(seed)
    size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else (vision.image_size,) * 2
    call = {"pixel_values": rng.normal(size=(3, vision.num_channels, *size)).astype(np.float32)}
    if hasattr(theirs.config, "text_config"):
        ids = rng.integers(3, 94, (4, 12))
        for row, end in enumerate((11, 4, 7, 1)):
            ids[row, end:] = 95
        call["input_ids"] = ids

    def output(model) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = model(**{key: torch.asarray(value) for key, value in call.items()})
        return {field: found[field].numpy() for field in OUTPUTS if field in found}

    wanted = output(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, variables = huggingface.load(folder)
    forward = _largest(_ours(model, variables, call), wanted)
    again = float("nan")
    if save:
        with tempfile.TemporaryDirectory() as folder:
            huggingface.save(folder, model, variables)
            written = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
            back = getattr(transformers, written["architectures"][0]).from_pretrained(folder).eval()
        again = _largest(output(back), wanted)
    return Difference(forward, again, max(float(np.abs(value).max()) for value in wanted.values()))


def _ours(model, variables, call: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our outputs under the names of the library."""
    inputs = {"image": call["pixel_values"].transpose(0, 2, 3, 1)[:, None]}
    if "input_ids" in call:
        inputs["text"] = call["input_ids"][:, None].astype(np.int32)
    logits, out = jax.jit(lambda v, inputs: model.apply(v, inputs=inputs, train=False))(variables, inputs)
    if "text" in out:
        image, text = (np.asarray(out[name]["embedding"])[:, 0] for name in ("image", "text"))
        products = out["logit_scale"] * image @ text.T + out.get("logit_bias", 0.0)
        return {"image_embeds": image, "text_embeds": text, "logits_per_image": np.asarray(products)}
    if logits is not None:
        return {"logits": np.asarray(logits)}
    item = out["image"]
    tokens = np.concatenate([item["encoder"]["class"][:, None], item["features"][:, 0]], axis=1)
    return {"last_hidden_state": tokens, "pooler_output": np.asarray(out["label"]["pooled"])}


def _largest(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """The largest absolute difference; each output of the library is compared."""
    return max(float(np.abs(found[name] - value).max()) for name, value in wanted.items())
