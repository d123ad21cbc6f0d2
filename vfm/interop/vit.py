"""ViT: image encoders with a class token, a pooler or a head for labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vfm.errors import UserError
from vfm.interop.configs import activation, activation_name, num_labels, refuse
from vfm.interop.weights import FLAT, LINEAR, LINEAR_OUT, SAME, Family, Form, Tensor

ENCODER = "encoders_image/"
LAYERS = f"{ENCODER}transformer/layers/"
# torch.nn.Conv2d stores [out, in, h, w]; ours are [h, w, in, out].
CONV = Form(lambda tensor, shape: tensor.transpose(2, 3, 1, 0), lambda array: array.transpose(3, 2, 0, 1))
# [D], [1, D] or [1, P, D] -> [P, D], and back with the number of dimensions that the library has.
AS_VECTOR = Form(lambda tensor, shape: tensor.reshape(shape), lambda array: array[0])
AS_BATCH = Form(lambda tensor, shape: tensor.reshape(shape), lambda array: np.asarray(array)[None])
# What the library takes where config.json says nothing.
DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True, "pooler_act": "tanh",
}  # fmt: skip


def image_fields(c: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Fields of a `ViT` that all families write alike, from config.json with its defaults filled in."""
    size, patch = c["image_size"], c["patch_size"]
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    if patch[0] != patch[1]:
        raise UserError(f"config.json: a {kind!r} model with patch_size={list(patch)} is not supported, only squares")
    return {
        "name": "vit",
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
        "channels": c["num_channels"],
        "patch_size": patch[0],
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "mlp_dim": c["intermediate_size"],
        "activation": activation(c["hidden_act"], kind),
        "norm_epsilon": c["layer_norm_eps"],
    }


def image_config(v: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `image_fields`."""
    size = tuple(v["image_size"])
    return {
        "image_size": size[0] if size[0] == size[1] else list(size),
        "num_channels": v["channels"],
        "patch_size": v["patch_size"],
        "hidden_size": v["width"],
        "num_hidden_layers": v["depth"],
        "num_attention_heads": v["num_heads"],
        "intermediate_size": v["mlp_dim"],
        "hidden_act": activation_name(v["activation"], "gelu_pytorch_tanh"),
        "layer_norm_eps": v["norm_epsilon"],
    }


def dense(name: str, path: str, kernel: Form = LINEAR, bias: Form | None = SAME) -> list[Tensor]:
    """Rows of a dense layer."""
    rows = [Tensor(f"{name}.weight", (f"{path}/kernel",), kernel)]
    return rows if bias is None else [*rows, Tensor(f"{name}.bias", (f"{path}/bias",), bias)]


def norm(name: str, path: str) -> list[Tensor]:
    """Rows of a LayerNorm."""
    return [Tensor(f"{name}.weight", (f"{path}/scale",)), Tensor(f"{name}.bias", (f"{path}/bias",))]


def _read(c: Mapping[str, Any], head: str) -> dict[str, Any]:
    c = {**DEFAULTS, **c}
    width = c["hidden_size"]
    refuse(c, "vit", pooler_output_size=width)
    image = {**image_fields(c, "vit"), "pooling": "class", "qkv_bias": c["qkv_bias"]}
    decoders = {}
    if head == "classification":
        decoders["label"] = {"name": "classifier", "num_classes": num_labels(c), "pooling": "first"}
    if head == "pooled":
        act = activation(c["pooler_act"], "vit")
        decoders["label"] = {"name": "classifier", "num_classes": None, "pooling": "first", "transform": act}
    return {"centre": "image", "encoders": {"image": image}, "backbone": None, "decoders": decoders}


def _write(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
    image, label = d["encoders"]["image"], d["decoders"].get("label", {})
    if image["name"] != "vit":
        return None
    c = {**image_config(image), "qkv_bias": image["qkv_bias"]}
    if head == "pooled":
        c["pooler_act"] = activation_name(label["transform"], "gelu_pytorch_tanh")
    if head == "classification":
        c["num_labels"] = label["num_classes"]
    return c


def _tensors(d: Mapping[str, Any]) -> list[Tensor]:
    image, label = d["encoders"]["image"], d["decoders"].get("label")
    rows = [
        Tensor("@embeddings.cls_token", (f"{ENCODER}class_token",), AS_BATCH),
        Tensor("@embeddings.position_embeddings", (f"{ENCODER}positions",), AS_BATCH),
        *dense("@embeddings.patch_embeddings.projection", f"{ENCODER}patch", CONV),
        *norm("@layernorm", f"{ENCODER}transformer/norm"),
    ]
    layer, bias = "@encoder.layer.{i}.", FLAT if image["qkv_bias"] else None
    for name in ("query", "key", "value"):
        rows += dense(f"{layer}attention.attention.{name}", f"{LAYERS}attention/{name}", LINEAR, bias)
    rows += dense(f"{layer}attention.output.dense", f"{LAYERS}attention/out", LINEAR_OUT)
    rows += norm(f"{layer}layernorm_before", f"{LAYERS}norm_attention")
    rows += norm(f"{layer}layernorm_after", f"{LAYERS}norm_mlp")
    rows += dense(f"{layer}intermediate.dense", f"{LAYERS}mlp/up") + dense(f"{layer}output.dense", f"{LAYERS}mlp/down")
    if label is not None and label["num_classes"] is None:
        rows += dense("@pooler.dense", "decoders_label/hidden")
    elif label is not None:
        rows += dense("classifier", "decoders_label/classes")
    return rows


HEADS = {"ViTForImageClassification": "classification", "ViTModel": "none"}
FAMILIES = {"vit": Family(_read, _write, _tensors, HEADS, "vit.", encoders=("image",))}
