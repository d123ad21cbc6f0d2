"""LLaVA: CLIP's image encoder, a projector, and a rotary decoder-only backbone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vfm.errors import UserError, unknown
from vfm.interop import clip, llama
from vfm.interop.configs import activation, activation_name, refuse
from vfm.interop.vit import dense, image_config, image_fields
from vfm.interop.weights import LINEAR, SAME, Family, Tensor

# What the library takes where config.json says nothing; published folders say little of the backbone.
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


def arrange(tokens, images, image_token: int, num_tokens: int) -> dict[str, Any]:
    """Arguments of `VFM` for what the library's processor gives: {"tokens", "inputs", "starts"}.

    tokens: int[B, T], in which `num_tokens` ids `image_token` in a row stand for each image. images: float[I, C, H, W],
    normalised, in the order of their places, row by row. Raises `UserError` if numbers and places do not fit.
    """
    tokens, images = np.asarray(tokens), np.asarray(images, np.float32)
    rows = [np.flatnonzero(row == image_token) for row in tokens]
    starts = [places[::num_tokens] for places in rows]
    for row, (places, first) in enumerate(zip(rows, starts)):
        if not np.array_equal(places, (first[:, None] + np.arange(num_tokens)).reshape(-1)):
            raise UserError(
                f"row {row} has {len(places)} tokens {image_token}, which are not {num_tokens} in a row for each image"
            )
    if sum(map(len, starts)) != len(images):
        raise UserError(f"the rows have places for {sum(map(len, starts))} images, but {len(images)} are given")
    B, N = len(tokens), max(map(len, starts), default=0)
    items = np.zeros((B, N, *images.shape[2:], images.shape[1]), np.float32)
    begin, at = np.full((B, N), -1, np.int32), 0
    for row, first in enumerate(starts):
        begin[row, : len(first)] = first
        items[row, : len(first)] = images[at : at + len(first)].transpose(0, 2, 3, 1)
        at += len(first)
    return {"tokens": tokens.astype(np.int32), "inputs": {"image": items}, "starts": {"image": begin}}


def _read(c: Mapping[str, Any], head: str) -> dict[str, Any]:
    refuse(c, "llava", vision_feature_select_strategy="default")
    given, text = dict(c.get("vision_config") or {}), dict(c.get("text_config") or {})
    tower, kind = given.get("model_type", "clip_vision_model"), text.get("model_type", "llama")
    if tower != "clip_vision_model":
        raise unknown("model_type", tower, ("clip_vision_model",), "config.json, vision_config of a 'llava' model")
    if kind not in LANGUAGES:
        raise unknown("model_type", kind, LANGUAGES, "config.json, text_config of a 'llava' model")
    vision = {**clip.DEFAULTS["clip"]["vision"], **(given or _VISION)}
    depth, layer = vision["num_hidden_layers"], c.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -depth <= layer <= depth or layer == 0:
        raise UserError(
            f"config.json: a 'llava' model with vision_feature_layer={layer!r} is not supported, only one of its "
            f"{depth} layers"
        )
    if "tie_word_embeddings" in c:
        text.setdefault("tie_word_embeddings", c["tie_word_embeddings"])
    cfg = llama.FAMILIES[kind].read({**(_LLAMA if kind == "llama" else {}), **text}, "lm")
    cfg["encoders"]["image"] = {
        **image_fields(vision, "llava"),
        "pooling": "class",
        "embedding_norm": True,
        "patch_bias": False,
        "feature_layer": layer if layer > 0 else depth + 1 + layer,  # theirs counts the input of the first layer as 0
    }
    cfg["input_projectors"] = {
        "image": {
            "name": "mlp",
            "width": cfg["backbone"]["width"],
            "hidden": cfg["backbone"]["width"],
            "activation": activation(c.get("projector_hidden_act", "gelu"), "llava"),
            "use_bias": bool(c.get("multimodal_projector_bias", True)),
        }
    }
    return cfg


def _write(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
    b, image, projector = d["backbone"], d["encoders"]["image"], d["input_projectors"].get("image", {})
    if b is None or image["name"] != "vit" or image["feature_layer"] is None or projector.get("name") != "mlp":
        return None
    kind = "qwen2" if b["qkv_bias"] and not b["out_bias"] else "mistral" if b["window"] else "llama"
    text = llama.FAMILIES[kind].write(d, head)
    if text is None:
        return None
    sides = [side // image["patch_size"] for side in image["image_size"]]
    return {
        "text_config": {"model_type": kind, **text},
        "vision_config": {"model_type": "clip_vision_model", **image_config(image)},
        "vision_feature_layer": image["feature_layer"] - image["depth"] - 1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": activation_name(projector["activation"], "gelu_pytorch_tanh"),
        "multimodal_projector_bias": projector["use_bias"],
        "image_seq_length": sides[0] * sides[1],
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _tensors(d: Mapping[str, Any]) -> list[Tensor]:
    rows = clip.image_tower("clip", "vision_tower.@")
    bias = SAME if d["input_projectors"]["image"]["use_bias"] else None
    for theirs, ours in (("linear_1", "hidden"), ("linear_2", "projection")):
        rows += dense(f"multi_modal_projector.{theirs}", f"input_projectors_image/{ours}", LINEAR, bias)
    for row in llama.FAMILIES["llama"].tensors(d):
        name = row.name.replace("@", "model.")
        rows.append(row._replace(name=f"language_model.{name}"))
    return rows


LANGUAGES = ("llama", "mistral", "qwen2")  # whose files are laid out alike
IGNORED = (r".*position_ids", r".*rotary_emb\.inv_freq", r"language_model\.lm_head\.weight")
FAMILIES = {
    "llava": Family(
        _read,
        _write,
        _tensors,
        {"LlavaForConditionalGeneration": "lm"},
        "vision_model.",  # newer files leave it out
        IGNORED,
        encoders=("image", "text"),
    )
}
