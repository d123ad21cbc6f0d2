"""BART and its relatives: encoder–decoders with absolute positions."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vfm.interop.configs import activation, activation_name, single
from vfm.interop.weights import FLAT, LINEAR, LINEAR_OUT, SAME, Family, Form, Tensor

EMBEDDING = "encoders_text/embedding/embedding"
CLASSES = {"bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus", "marian": "Marian"}
PRE_NORM = ("mbart", "pegasus")
SINUSOIDAL = ("pegasus", "marian")
# [1, V] in the checkpoint.
ROW = Form(lambda tensor, shape: tensor.reshape(shape), lambda array: np.asarray(array)[None])


def _read(kind: str):
    def read(c: Mapping[str, Any], head: str) -> dict[str, Any]:
        width, heads = c["d_model"], c["encoder_attention_heads"]
        backbone = {
            "width": width,
            "depth": c["encoder_layers"],
            "num_heads": heads,
            "mlp_dim": c["encoder_ffn_dim"],
            "decoder_depth": c["decoder_layers"],
            "decoder_num_heads": c["decoder_attention_heads"],
            "decoder_mlp_dim": c["decoder_ffn_dim"],
            "max_len": c["max_position_embeddings"],
            "positions": "sinusoidal" if kind in SINUSOIDAL else "learned",
            "position_offset": 0 if kind in SINUSOIDAL else 2,
            "embedding_norm": kind not in SINUSOIDAL,
            "norm": "layernorm",
            "norm_epsilon": 1e-5,
            "norm_position": "pre" if kind in PRE_NORM else "post",
            "activation": activation(c.get("activation_function", "gelu"), kind),
            "gated": False,
            "use_bias": True,
        }
        text = {"scale": math.sqrt(width) if c.get("scale_embedding", False) else 1.0}
        decoder = {"tied": bool(c.get("tie_word_embeddings", True)), "fixed_bias": True}
        pad = c.get("pad_token_id", {"pegasus": 0, "marian": 58100}.get(kind, 1))
        return single("encoder_decoder", c, backbone, text, decoder if head == "lm" else None, None, pad)

    return read


def _write(kind: str):
    def write(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
        b = d["backbone"]
        positions = "sinusoidal" if kind in SINUSOIDAL else "learned"
        if b["name"] != "encoder_decoder" or b["positions"] != positions:
            return None
        return {
            "vocab_size": d["encoders"]["text"]["vocab_size"],
            "d_model": b["width"],
            "encoder_layers": b["depth"],
            "encoder_attention_heads": b["num_heads"],
            "encoder_ffn_dim": b["mlp_dim"],
            "decoder_layers": b["decoder_depth"],
            "decoder_attention_heads": b["decoder_num_heads"],
            "decoder_ffn_dim": b["decoder_mlp_dim"],
            "max_position_embeddings": b["max_len"],
            "activation_function": activation_name(b["activation"], "gelu_new"),
            "scale_embedding": d["encoders"]["text"]["scale"] != 1,
            "tie_word_embeddings": d["decoders"].get("text", {}).get("tied", True),
            "pad_token_id": d["encoders"]["text"]["pad_id"],
            "is_encoder_decoder": True,
        }

    return write


def _tensors(kind: str):
    def tensors(d: Mapping[str, Any]) -> list[Tensor]:
        b = d["backbone"]
        rows = [Tensor("@shared.weight", (EMBEDDING,))]

        def add(name, path, kernel=LINEAR, bias=SAME):
            rows.append(Tensor(f"{name}.weight", (f"{path}/kernel",), kernel))
            rows.append(Tensor(f"{name}.bias", (f"{path}/bias",), bias))

        def norm(name, path):
            rows.extend([Tensor(f"{name}.weight", (f"{path}/scale",)), Tensor(f"{name}.bias", (f"{path}/bias",))])

        for side in ("encoder", "decoder"):
            stack, layer = f"backbone/{side}/", f"@{side}.layers." + "{i}."
            layers = f"{stack}transformer/layers/"
            attentions = [("self_attn", "attention", "norm_attention")]
            if side == "decoder":
                attentions.append(("encoder_attn", "cross_attention", "norm_cross"))
            for theirs, ours, normed in attentions:
                for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
                    add(f"{layer}{theirs}.{letter}_proj", f"{layers}{ours}/{name}", LINEAR, FLAT)
                add(f"{layer}{theirs}.out_proj", f"{layers}{ours}/out", LINEAR_OUT)
                norm(f"{layer}{theirs}_layer_norm", f"{layers}{normed}")
            add(f"{layer}fc1", f"{layers}mlp/up")
            add(f"{layer}fc2", f"{layers}mlp/down")
            norm(f"{layer}final_layer_norm", f"{layers}norm_mlp")
            if b["positions"] == "learned":
                rows.append(Tensor(f"@{side}.embed_positions.weight", (f"{stack}positions/embedding",)))
            if b["embedding_norm"]:
                norm(f"@{side}.layernorm_embedding", f"{stack}embedding_norm")
            if b["norm_position"] == "pre":
                norm(f"@{side}.layer_norm", f"{stack}transformer/norm")
        if "text" in d["decoders"]:
            tied = d["decoders"]["text"]["tied"]
            rows.append(Tensor("final_logits_bias", ("constants/decoders_text/bias",), ROW))
            if not tied:
                rows.append(Tensor("lm_head.weight", ("decoders_text/head/kernel",), LINEAR))
        return rows

    return tensors


# Copies of the shared table, and fixed sinusoidal positions.
IGNORED = (r"(model\.)?(encoder|decoder)\.embed_tokens\.weight",)
FIXED = (r"(model\.)?(encoder|decoder)\.embed_positions\.weight",)
FAMILIES = {
    kind: Family(
        _read(kind),
        _write(kind),
        _tensors(kind),
        {
            f"{name}{'MTModel' if kind == 'marian' else 'ForConditionalGeneration'}": "lm",
            f"{name}Model": "none",
        },
        "model.",
        IGNORED + (FIXED if kind in SINUSOIDAL else ()),
    )
    for kind, name in CLASSES.items()
}
