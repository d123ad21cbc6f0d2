"""CLIP and SigLIP: a ViT and a text Transformer with one space, trained by contrast."""

from collections.abc import Mapping
from typing import Any

from vfm.errors import UserError
from vfm.interop.configs import activation, activation_name, refuse
from vfm.interop.vit import AS_BATCH, AS_VECTOR, CONV, dense, image_config, image_fields, norm
from vfm.interop.weights import FLAT, LINEAR, LINEAR_OUT, SAME, Family, Form, Tensor

IMAGE, TEXT = "encoders_image/", "encoders_text/"
AS_SCALAR = Form(lambda tensor, shape: tensor.reshape(shape), lambda array: array.reshape(1))
# What the library takes where config.json says nothing; published SigLIP folders say little.
_TOWER = {"num_hidden_layers": 12, "num_channels": 3, "image_size": 224}
_VISION = {**_TOWER, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
DEFAULTS = {
    "clip": {
        "vision": {**_VISION, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        "text": {
            **_TOWER, "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
            "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407,
        },
    },
    "siglip": {
        "vision": {
            **_VISION, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
            "vision_use_head": True,
        },
        "text": {
            **_TOWER, "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
            "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        },
    },
}  # fmt: skip
OLD_END = 2  # an end id of the first CLIP folders that was wrong: there the largest id ends a text


def _part(c: Mapping[str, Any], kind: str, part: str) -> dict[str, Any]:
    """The fields of one tower; older files have them twice, and then the second ones count."""
    return {**DEFAULTS[kind][part], **(c.get(f"{part}_config") or {}), **(c.get(f"{part}_config_dict") or {})}


def _text(c: Mapping[str, Any], kind: str, backbone: str) -> dict[str, Any]:
    """Fields of a `TextTransformer`; each text has all positions, and none of them is masked as padding."""
    width, heads, length = c["hidden_size"], c["num_attention_heads"], c["max_position_embeddings"]
    fields = {
        "name": backbone, "width": width, "max_len": length, "positions": "learned", "depth": c["num_hidden_layers"],
        "num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads, "mlp_dim": c["intermediate_size"],
        "activation": activation(c["hidden_act"], kind), "norm": "layernorm", "norm_epsilon": c["layer_norm_eps"],
        "norm_position": "pre", "embedding_norm": False, "gated": False, "use_bias": True,
    }  # fmt: skip
    return {
        "name": "text_transformer",
        "vocab_size": c["vocab_size"],
        "length": length,
        "width": width,
        "backbone": fields,
    }


def _text_config(t: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_text`."""
    b = t["backbone"]
    return {
        "vocab_size": t["vocab_size"],
        "max_position_embeddings": t["length"],
        "hidden_size": t["width"],
        "num_hidden_layers": b["depth"],
        "num_attention_heads": b["num_heads"],
        "intermediate_size": b["mlp_dim"],
        "hidden_act": activation_name(b["activation"], "gelu_pytorch_tanh"),
        "layer_norm_eps": b["norm_epsilon"],
    }


def _read_clip(c: Mapping[str, Any], head: str) -> dict[str, Any]:
    vision, text, width = _part(c, "clip", "vision"), _part(c, "clip", "text"), c.get("projection_dim", 512)
    end = text["eos_token_id"]
    if not isinstance(end, int):
        raise UserError(f"config.json: a 'clip' model with eos_token_id={end!r} is not supported, only one id")
    pooling = {"pooling": "largest"} if end == OLD_END else {"pooling": "end", "end_id": end}
    image = {"pooling": "class", "embedding_norm": True, "patch_bias": False}
    project = {"name": "linear", "width": width, "use_bias": False}
    return {
        "centre": "image",
        "encoders": {
            "image": {**image_fields(vision, "clip"), **image},
            "text": {**_text(text, "clip", "decoder_only"), **pooling},
        },
        "input_projectors": {"image": project, "text": project},
        "alignment": {"max_scale": 100.0},
    }


def _read_siglip(c: Mapping[str, Any], head: str) -> dict[str, Any]:
    vision, text = _part(c, "siglip", "vision"), _part(c, "siglip", "text")
    refuse(vision, "siglip", vision_use_head=True)
    width = text.get("projection_size") or text["hidden_size"]
    return {
        "centre": "image",
        "encoders": {
            "image": {**image_fields(vision, "siglip"), "pooling": "map"},
            "text": {**_text(text, "siglip", "encoder_only"), "pooling": "last"},
        },
        "input_projectors": {"text": {"name": "linear", "width": width, "use_bias": True}},
        # The published factors are near 100, on both sides of it.
        "alignment": {"max_scale": float("inf"), "bias": -10.0},
    }


def _writer(kind: str):
    def write(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
        image, text, projector = d["encoders"]["image"], d["encoders"]["text"], d["input_projectors"].get("text")
        if (image["name"], text["name"]) != ("vit", "text_transformer") or projector is None:
            return None
        vision, read = image_config(image), _text_config(text)
        if kind == "siglip":
            read["projection_size"] = projector["width"]
            return {"vision_config": vision, "text_config": read}
        if text["pooling"] == "end" and text["end_id"] != OLD_END:
            read["eos_token_id"] = text["end_id"]
        elif text["pooling"] == "largest":
            read["eos_token_id"] = OLD_END
        else:
            return None
        return {"vision_config": vision, "text_config": read, "projection_dim": projector["width"]}

    return write


def _layers(theirs: str, ours: str) -> list[Tensor]:
    """Rows of a stack of blocks."""
    layer, ours, rows = f"{theirs}encoder.layers.{{i}}.", f"{ours}transformer/layers/", []
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        rows += dense(f"{layer}self_attn.{letter}_proj", f"{ours}attention/{name}", LINEAR, FLAT)
    rows += dense(f"{layer}self_attn.out_proj", f"{ours}attention/out", LINEAR_OUT)
    rows += norm(f"{layer}layer_norm1", f"{ours}norm_attention") + norm(f"{layer}layer_norm2", f"{ours}norm_mlp")
    return rows + dense(f"{layer}mlp.fc1", f"{ours}mlp/up") + dense(f"{layer}mlp.fc2", f"{ours}mlp/down")


def image_tower(kind: str, theirs: str = "vision_model.", ours: str = IMAGE) -> list[Tensor]:
    """Rows of the image encoder of a "clip" or a "siglip" model."""
    clip = kind == "clip"
    rows = dense(f"{theirs}embeddings.patch_embedding", f"{ours}patch", CONV, None if clip else SAME)
    rows.append(Tensor(f"{theirs}embeddings.position_embedding.weight", (f"{ours}positions",)))
    rows += _layers(theirs, ours) + norm(f"{theirs}post_layernorm", f"{ours}transformer/norm")
    if clip:
        rows.append(Tensor(f"{theirs}embeddings.class_embedding", (f"{ours}class_token",), AS_VECTOR))
        return rows + norm(f"{theirs}pre_layrnorm", f"{ours}embedding_norm")  # spelt so in the files
    head, pooling = f"{theirs}head.", f"{ours}pooling/"
    qkv = [f"{pooling}attention/{name}" for name in ("query", "key", "value")]
    rows += [
        Tensor(f"{head}probe", (f"{pooling}queries",), AS_BATCH),
        Tensor(f"{head}attention.in_proj_weight", tuple(f"{path}/kernel" for path in qkv), LINEAR),
        Tensor(f"{head}attention.in_proj_bias", tuple(f"{path}/bias" for path in qkv), FLAT),
    ]
    rows += dense(f"{head}attention.out_proj", f"{pooling}attention/out", LINEAR_OUT)
    rows += norm(f"{head}layernorm", f"{pooling}norm")
    return rows + dense(f"{head}mlp.fc1", f"{pooling}mlp/up") + dense(f"{head}mlp.fc2", f"{pooling}mlp/down")


def _tensors(kind: str):
    def tensors(d: Mapping[str, Any]) -> list[Tensor]:
        reader = f"{TEXT}reader/"
        rows = [
            *image_tower(kind),
            Tensor("text_model.embeddings.token_embedding.weight", (f"{TEXT}embedding/embedding/embedding",)),
            Tensor("text_model.embeddings.position_embedding.weight", (f"{reader}positions/embedding",)),
            *_layers("text_model.", reader),
            *norm("text_model.final_layer_norm", f"{reader}transformer/norm"),
        ]
        text, image = "input_projectors_text/projection", "input_projectors_image/projection"
        if kind == "clip":
            rows += dense("text_projection", text, LINEAR, None) + dense("visual_projection", image, LINEAR, None)
            return [*rows, Tensor("logit_scale", ("logit_scale",))]
        rows += dense("text_model.head", text)
        return [*rows, *(Tensor(name, (name,), AS_SCALAR) for name in ("logit_scale", "logit_bias"))]

    return tensors


# Positions that are stored as numbers 0, 1, ….
IGNORED = (r"(text|vision)_model\.embeddings\.position_ids",)
_HEADS = {"clip": {"CLIPModel": "none"}, "siglip": {"SiglipModel": "none"}}
_READ = {"clip": _read_clip, "siglip": _read_siglip}
FAMILIES = {
    kind: Family(_READ[kind], _writer(kind), _tensors(kind), heads, "", IGNORED, encoders=("image", "text"))
    for kind, heads in _HEADS.items()
}
