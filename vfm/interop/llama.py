"""LLaMA and its relatives: rotary decoder-only models."""

import math
from collections.abc import Mapping
from typing import Any

from vfm.errors import UserError
from vfm.interop.configs import (
    activation,
    activation_name,
    label_decoder,
    refuse,
    rope,
    rope_parameters,
    single,
    window,
    window_fields,
)
from vfm.interop.weights import FLAT, LINEAR, LINEAR_OUT, PLUS_ONE, SAME, Family, Tensor

EMBEDDING = "encoders_text/embedding/embedding"
LAYERS = "backbone/transformer/layers/"
FINAL_NORM = "backbone/transformer/norm/"

# What a type has that LLaMA has not: fields of the backbone.
STYLES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "qwen3_moe": {"qk_norm": "head"},
    "gemma": {},
    "gemma2": {"norm_position": "sandwich"},
    "gemma3_text": {"norm_position": "sandwich", "qk_norm": "head"},
    "olmo": {"norm": "layernorm_fixed", "norm_epsilon": 1e-5},
    "olmo2": {"norm_position": "branch", "qk_norm": "full"},
    "olmo3": {"norm_position": "branch", "qk_norm": "full"},
    "stablelm": {"norm": "layernorm", "norm_bias": True},
    "starcoder2": {"norm": "layernorm", "norm_bias": True, "gated": False},
    "cohere": {"norm": "layernorm", "arrangement": "parallel_one_norm", "rope_interleaved": True},
    "phi": {"norm": "layernorm", "arrangement": "parallel_one_norm", "gated": False, "use_bias": True},
    "phi3": {},
    "glm": {"rope_interleaved": True},
    "glm4": {"rope_interleaved": True, "norm_position": "sandwich"},
}
# Shares of a head that are rotated where config.json does not say.
FRACTIONS = {"phi": 0.5, "glm": 0.5, "glm4": 0.5, "stablelm": 0.25}
ACTIVATIONS = {"gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}
ACTIVATIONS |= {"starcoder2": "gelu_pytorch_tanh", "phi": "gelu_new"}
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "olmo": "Olmo",
    "olmo2": "Olmo2", "olmo3": "Olmo3", "stablelm": "StableLm", "starcoder2": "Starcoder2", "cohere": "Cohere",
    "phi": "Phi", "phi3": "Phi3", "glm": "Glm", "glm4": "Glm4",
}  # fmt: skip
# Padding ids where config.json does not say; the others have none.
PADS = {"gemma": 0, "gemma2": 0, "gemma3_text": 0, "olmo": 1, "olmo2": 1, "olmo3": 1, "cohere": 0, "phi3": 32000}
PADS |= {"glm": 151329, "glm4": 151329}
# What config.json need not say.
EPSILONS = dict.fromkeys(("mixtral", "olmo2", "olmo3", "stablelm", "starcoder2", "cohere", "phi", "phi3"), 1e-5)
EPSILONS |= dict.fromkeys(("glm", "glm4"), 1.5625e-07)
DEFAULTS = {
    "mistral": {"sliding_window": 4096},
    "mixtral": {"rope_theta": 1e6},
    "gemma2": {"sliding_window": 4096},
    "gemma3_text": {"sliding_window": 4096, "rope_theta": 1e6},
    "cohere": {"rope_theta": 5e5},
    "olmo3": {"sliding_window": 4096, "rope_theta": 5e5},
}
TIED = ("gemma", "gemma2", "gemma3_text", "cohere", "starcoder2")  # unless config.json says otherwise


def _read(kind: str):
    def read(c: Mapping[str, Any], head: str) -> dict[str, Any]:
        style, c = STYLES[kind], {**DEFAULTS.get(kind, {}), **c}
        width, heads = c["hidden_size"], c["num_attention_heads"]
        epsilon = c.get("rms_norm_eps", c.get("layer_norm_eps", c.get("norm_epsilon", c.get("layer_norm_epsilon"))))
        bias = bool(c.get("attention_bias", False)) and kind not in ("qwen2", "stablelm")
        refuse(c, kind, clip_qkv=None, qk_layernorm=False, use_qk_norm=False, use_bidirectional_attention=None)
        backbone = {
            "width": width,
            "depth": c["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": c.get("num_key_value_heads") or heads,
            "head_dim": c.get("head_dim") or width // heads,
            "mlp_dim": c["intermediate_size"],
            "max_len": c["max_position_embeddings"],
            "norm": "rmsnorm",
            "norm_epsilon": EPSILONS.get(kind, 1e-6) if epsilon is None else epsilon,
            "activation": activation(
                c.get("hidden_activation") or c.get("hidden_act", ACTIVATIONS.get(kind, "silu")), kind
            ),
            "gated": True,
            "use_bias": False,
            "qkv_bias": bias,
            "out_bias": bias and kind not in ("glm", "glm4"),
            "mlp_bias": bool(c.get("mlp_bias", False)),
            **rope(c, FRACTIONS.get(kind, 1.0)),
            **window(c, kind),
        }
        text, decoder = {"scale": 1.0}, {}
        if kind in ("mixtral", "qwen3_moe"):
            refuse(c, kind, mlp_only_layers=[], decoder_sparse_step=1, router_jitter_noise=0.0)
            backbone |= {
                "num_experts": c.get("num_local_experts", c.get("num_experts", 8)),
                "experts_per_token": c["num_experts_per_tok"],
                "mlp_dim": c.get("moe_intermediate_size", c["intermediate_size"]),
                "normalise_weights": bool(c.get("norm_topk_prob", kind == "mixtral")),
            }
        if kind.startswith("gemma"):
            text["scale"] = math.sqrt(width)
        if kind in ("gemma2", "gemma3_text"):
            backbone |= {
                "attention_scale": c.get("query_pre_attn_scalar", 256) ** -0.5,
                "attention_softcap": c.get("attn_logit_softcapping", 50.0 if kind == "gemma2" else None),
            }
            decoder["softcap"] = c.get("final_logit_softcapping", 30.0 if kind == "gemma2" else None)
        if kind == "stablelm":
            backbone["qkv_bias"] = bool(c.get("use_qkv_bias", False))
            if c.get("use_parallel_residual", False):
                backbone["arrangement"] = "parallel_one_norm"
        if kind == "starcoder2":
            backbone |= {name: bool(c.get("use_bias", True)) for name in ("qkv_bias", "out_bias", "mlp_bias")}
        if kind == "phi":
            backbone |= {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
            decoder["use_bias"] = True
        if kind == "cohere":
            decoder["scale"] = c.get("logit_scale", 0.0625)
        tied = bool(c.get("tie_word_embeddings", kind in TIED))
        decoder["tied"] = tied
        decoder, label = decoder if head == "lm" else None, label_decoder(c, head)
        return single(
            "decoder_only", c, {**backbone, **style}, text, decoder, label, c.get("pad_token_id", PADS.get(kind))
        )

    return read


def _write(kind: str):
    def write(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
        b, decoder = d["backbone"], d["decoders"].get("text", {})
        if b["name"] != "decoder_only" or b["positions"] != "rope" or b["head_dim"] is None:
            return None
        c = {
            "vocab_size": d["encoders"]["text"]["vocab_size"],
            "hidden_size": b["width"],
            "num_hidden_layers": b["depth"],
            "num_attention_heads": b["num_heads"],
            "num_key_value_heads": b["num_kv_heads"],
            "head_dim": b["head_dim"],
            "intermediate_size": b["mlp_dim"],
            "max_position_embeddings": b["max_len"],
            "hidden_act": activation_name(b["activation"], "gelu_pytorch_tanh" if kind != "phi" else "gelu_new"),
            "attention_bias": b["qkv_bias"],
            "mlp_bias": b["mlp_bias"],
            "tie_word_embeddings": decoder.get("tied", True),
            "pad_token_id": d["encoders"]["text"]["pad_id"],
            **rope_parameters(b, kind),
            **window_fields(b, kind),
        }
        epsilon = {"stablelm": "layer_norm_eps", "phi": "layer_norm_eps", "cohere": "layer_norm_eps"}
        epsilon |= {"starcoder2": "norm_epsilon"}
        c[epsilon.get(kind, "rms_norm_eps")] = b["norm_epsilon"]
        if kind in ("gemma2", "gemma3_text"):
            c |= {
                "hidden_activation": c.pop("hidden_act"),
                "query_pre_attn_scalar": round(b["attention_scale"] ** -2, 6) if b["attention_scale"] else None,
                "attn_logit_softcapping": b["attention_softcap"],
                "final_logit_softcapping": decoder.get("softcap"),
            }
            if c["query_pre_attn_scalar"] is None:
                return None
            if float(c["query_pre_attn_scalar"]).is_integer():
                c["query_pre_attn_scalar"] = int(c["query_pre_attn_scalar"])
        if kind == "mixtral":
            c |= {"num_local_experts": b["num_experts"], "num_experts_per_tok": b["experts_per_token"]}
        if kind == "qwen3_moe":
            c |= {
                "num_experts": b["num_experts"],
                "num_experts_per_tok": b["experts_per_token"],
                "moe_intermediate_size": b["mlp_dim"],
                "norm_topk_prob": b["normalise_weights"],
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        if kind in ("mixtral", "qwen3_moe") and b["num_experts"] is None:
            return None
        if kind == "stablelm":
            c |= {"use_qkv_bias": b["qkv_bias"], "use_parallel_residual": b["arrangement"] != "sequential"}
        if kind == "starcoder2":
            c["use_bias"] = b["mlp_bias"]
        if kind == "cohere":
            c["logit_scale"] = decoder.get("scale", 1.0)
        if head == "classification":
            c["num_labels"] = d["decoders"]["label"]["num_classes"]
        return c

    return write


def _tensors(kind: str):
    def tensors(d: Mapping[str, Any]) -> list[Tensor]:
        b, decoders = d["backbone"], d["decoders"]
        attention, mlp = f"{LAYERS}attention/", f"{LAYERS}mlp/"
        out = {"phi": "dense"}.get(kind, "o_proj")
        norm = PLUS_ONE if kind.startswith("gemma") else SAME
        rows = [Tensor("@embed_tokens.weight", (EMBEDDING,))]

        def linear(name, paths, bias, form=LINEAR, bias_form=SAME):
            rows.append(Tensor(f"{name}.weight", tuple(f"{path}/kernel" for path in paths), form))
            if bias:
                rows.append(Tensor(f"{name}.bias", tuple(f"{path}/bias" for path in paths), bias_form))

        def norms(name, path):
            if b["norm"] != "layernorm_fixed":
                rows.append(Tensor(f"{name}.weight", (f"{path}scale",), norm))
            if b["norm"] == "layernorm" and b["norm_bias"]:
                rows.append(Tensor(f"{name}.bias", (f"{path}bias",)))

        layer = "@layers.{i}."
        if kind == "phi3":
            qkv = [f"{attention}{name}" for name in ("query", "key", "value")]
            linear(f"{layer}self_attn.qkv_proj", qkv, False)
        else:
            for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
                linear(f"{layer}self_attn.{theirs}_proj", [f"{attention}{ours}"], b["qkv_bias"], LINEAR, FLAT)
        linear(f"{layer}self_attn.{out}", [f"{attention}out"], b["out_bias"], LINEAR_OUT)
        if b["qk_norm"] != "none":
            for theirs, ours in (("q", "query"), ("k", "key")):
                rows.append(Tensor(f"{layer}self_attn.{theirs}_norm.weight", (f"{attention}norm_{ours}/scale",), norm))
        if kind == "mixtral":
            experts, router, names = "block_sparse_moe.experts.{e}.", "block_sparse_moe.gate", ("w1", "w3", "w2")
        else:
            experts, router, names = "mlp.experts.{e}.", "mlp.gate", ("gate_proj", "up_proj", "down_proj")
        if b["num_experts"] is not None:
            linear(f"{layer}{router}", [f"{mlp}router"], False)
            for theirs, ours in zip(names, ("gate", "up", "down")):
                rows.append(Tensor(f"{layer}{experts}{theirs}.weight", (f"{mlp}experts_{ours}",), LINEAR))
        elif kind in ("phi3", "glm", "glm4"):
            linear(f"{layer}mlp.gate_up_proj", [f"{mlp}gate", f"{mlp}up"], False)
            linear(f"{layer}mlp.down_proj", [f"{mlp}down"], False)
        else:
            plain = {"starcoder2": ("c_fc", "c_proj"), "phi": ("fc1", "fc2")}
            pairs = zip(plain.get(kind, ("up_proj", "down_proj")), ("up", "down"))
            for theirs, ours in (*pairs, *((("gate_proj", "gate"),) if b["gated"] else ())):
                linear(f"{layer}mlp.{theirs}", [f"{mlp}{ours}"], b["mlp_bias"])
        places = {
            "pre": {"input_layernorm": "norm_attention", "post_attention_layernorm": "norm_mlp"},
            "branch": {
                "post_attention_layernorm": "norm_attention_out",
                "post_feedforward_layernorm": "norm_mlp_out",
            },
            "sandwich": {
                "input_layernorm": "norm_attention",
                "post_attention_layernorm": "norm_attention_out",
                "pre_feedforward_layernorm": "norm_mlp",
                "post_feedforward_layernorm": "norm_mlp_out",
            },
        }[b["norm_position"]]
        if kind == "glm4":
            places = {
                "input_layernorm": "norm_attention",
                "post_self_attn_layernorm": "norm_attention_out",
                "post_attention_layernorm": "norm_mlp",
                "post_mlp_layernorm": "norm_mlp_out",
            }
        if b["arrangement"] == "parallel_one_norm":
            places = {"input_layernorm": "norm_attention"}
        for theirs, ours in places.items():
            norms(f"{layer}{theirs}", f"{LAYERS}{ours}/")
        norms("@final_layernorm" if kind == "phi" else "@norm", FINAL_NORM)
        if "text" in decoders:
            if not decoders["text"]["tied"]:
                linear("lm_head", ["decoders_text/head"], decoders["text"]["use_bias"])
            elif decoders["text"]["use_bias"]:
                raise UserError(f"interop: a tied head with a bias is not part of {kind!r}")
        if "label" in decoders:
            linear("score", ["decoders_label/classes"], False)
        return rows

    return tensors


def _heads(kind: str) -> dict[str, str]:
    name = CLASSES[kind]
    text = "TextModel" if kind == "gemma3_text" else "Model"
    classification = "TextForSequenceClassification" if kind == "gemma3_text" else "ForSequenceClassification"
    return {f"{name}ForCausalLM": "lm", f"{name}{text}": "none", f"{name}{classification}": "classification"}


FAMILIES = {
    kind: Family(_read(kind), _write(kind), _tensors(kind), _heads(kind), "model.", (r".*rotary_emb\.inv_freq",))
    for kind in STYLES
}
