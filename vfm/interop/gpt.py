"""GPT and its relatives: decoder-only models with learned, linear or rotary positions."""

from collections.abc import Mapping
from typing import Any

from vfm.interop.configs import activation, activation_name, label_decoder, refuse, rope, rope_parameters, single
from vfm.interop.weights import CONV1D, CONV1D_OUT, FLAT, LINEAR, LINEAR_OUT, SAME, Family, Tensor

EMBEDDING = "encoders_text/embedding/embedding"
LAYERS = "backbone/transformer/layers/"
ATTENTION, MLP = f"{LAYERS}attention/", f"{LAYERS}mlp/"
HEAD = "decoders_text/head"
QKV = tuple(f"{ATTENTION}{name}" for name in ("query", "key", "value"))


def _common(c: Mapping[str, Any], kind: str, **names: str) -> dict[str, Any]:
    """Fields of the backbone under the names that a family gives them in config.json."""
    get = lambda field: c[names[field]]
    width = get("width")
    return {
        "width": width,
        "depth": get("depth"),
        "num_heads": get("num_heads"),
        "num_kv_heads": get("num_heads"),
        "head_dim": width // get("num_heads"),
        "mlp_dim": c.get(names["mlp_dim"]) or 4 * width,
        "norm": "layernorm",
        "norm_epsilon": c.get(names["epsilon"], 1e-5),
        "gated": False,
        "use_bias": True,
    }


_GPT2 = {"width": "n_embd", "depth": "n_layer", "num_heads": "n_head", "mlp_dim": "n_inner"}
_GPT2 |= {"epsilon": "layer_norm_epsilon"}
_NEO = {"width": "hidden_size", "depth": "num_layers", "num_heads": "num_heads", "mlp_dim": "intermediate_size"}
_NEO |= {"epsilon": "layer_norm_epsilon"}
_NEOX = {**_NEO, "depth": "num_hidden_layers", "num_heads": "num_attention_heads", "epsilon": "layer_norm_eps"}
_OPT = {**_NEOX, "mlp_dim": "ffn_dim"}
_BLOOM = {**_GPT2, "width": "hidden_size"}
NAMES = {
    "gpt2": _GPT2, "openai-gpt": _GPT2, "gptj": _GPT2, "gpt_neo": _NEO, "gpt_neox": _NEOX, "opt": _OPT,
    "bloom": _BLOOM,
}  # fmt: skip
LONGEST = {"gpt2": "n_positions", "openai-gpt": "n_positions", "gptj": "n_positions"}
CLASSES = {
    "gpt2": "GPT2", "openai-gpt": "OpenAIGPT", "gptj": "GPTJ", "gpt_neo": "GPTNeo", "gpt_neox": "GPTNeoX",
    "opt": "OPT", "bloom": "Bloom",
}  # fmt: skip
UNBOUNDED = 2**20  # the longest sequence of a model whose positions have no table


def _local(c: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-Neo's list of (pattern, repetitions), such as [[["global", "local"], 12]]."""
    kinds = [kind for pattern, times in c.get("attention_types") or [] for kind in list(pattern) * times]
    local = tuple(kind == "local" for kind in kinds)
    if not any(local):
        return {"window": None, "local_layers": (True,)}
    return {"window": c.get("window_size", 256), "local_layers": (True,) if all(local) else local}


def _read(kind: str):
    def read(c: Mapping[str, Any], head: str) -> dict[str, Any]:
        if kind == "bloom":  # older files have other names
            older = {"hidden_size": c.get("n_embed"), "n_head": c.get("num_attention_heads")}
            c = {**{name: value for name, value in older.items() if value is not None}, **c}
        b = _common(c, kind, **NAMES[kind])
        b["positions"] = "learned"
        b["max_len"] = c.get(LONGEST.get(kind, "max_position_embeddings"), UNBOUNDED)
        decoder: dict[str, Any] = {"tied": bool(c.get("tie_word_embeddings", kind not in ("gptj", "gpt_neox")))}
        if kind == "openai-gpt":
            # This family's "gelu" is the tanh form.
            act = {"gelu": "gelu_new"}.get(c.get("afn", "gelu"), c.get("afn", "gelu"))
            b |= {"activation": activation(act, kind), "norm_position": "post"}
        elif kind == "bloom":
            refuse(c, kind, apply_residual_connection_post_layernorm=False)
            b |= {"activation": "gelu_tanh", "positions": "alibi", "embedding_norm": True}
        else:
            name = "hidden_act" if kind == "gpt_neox" else "activation_function"
            default = {"gpt_neox": "gelu", "opt": "relu"}.get(kind, "gelu_new")
            b["activation"] = activation(c.get(name, default), kind)
        if kind == "gpt2":
            refuse(c, kind, scale_attn_weights=True, add_cross_attention=False)
            b["inverse_layer_scale"] = bool(c.get("scale_attn_by_inverse_layer_idx", False))
        if kind == "gpt_neo":
            b |= {"attention_scale": 1.0, "qkv_bias": False, **_local(c)}
        if kind == "gptj":
            rotary = c.get("rotary_dim") or b["head_dim"]
            b |= {
                "positions": "rope",
                "rope_theta": 10_000.0,
                "rope_fraction": rotary / b["head_dim"],
                "rope_interleaved": True,
                "arrangement": "parallel_one_norm",
                "qkv_bias": False,
                "out_bias": False,
            }
            decoder["use_bias"] = True
        if kind == "gpt_neox":
            older = {"rope_theta": c.get("rotary_emb_base", 10_000), **c}
            b |= rope(older, c.get("rotary_pct", 0.25))
            parallel = c.get("use_parallel_residual", True)
            b["arrangement"] = "parallel" if parallel else "sequential"
            b |= {"qkv_bias": bool(c.get("attention_bias", True)), "out_bias": bool(c.get("attention_bias", True))}
        if kind == "opt":
            refuse(c, kind, _remove_final_layer_norm=False, enable_bias=True, layer_norm_elementwise_affine=True)
            refuse(c, kind, word_embed_proj_dim=c["hidden_size"])
            b |= {"position_offset": 2, "norm_epsilon": 1e-5}
            b["norm_position"] = "pre" if c.get("do_layer_norm_before", True) else "post"
        pad = c.get("pad_token_id", 1) if kind == "opt" else None
        return single("decoder_only", c, b, {}, decoder if head == "lm" else None, label_decoder(c, head), pad)

    return read


def _write(kind: str):
    def write(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
        b, decoder = d["backbone"], d["decoders"].get("text", {})
        positions = {"bloom": "alibi", "gptj": "rope", "gpt_neox": "rope"}.get(kind, "learned")
        if b["name"] != "decoder_only" or b["positions"] != positions:
            return None
        names = NAMES[kind]
        c = {names[field]: b[field] for field in ("width", "depth", "num_heads", "mlp_dim")}
        c |= {
            names["epsilon"]: b["norm_epsilon"],
            "vocab_size": d["encoders"]["text"]["vocab_size"],
            "tie_word_embeddings": decoder.get("tied", True),
        }
        if kind != "bloom":
            c[LONGEST.get(kind, "max_position_embeddings")] = b["max_len"]
        if kind == "openai-gpt":
            c["afn"] = {"gelu_tanh": "gelu"}.get(b["activation"], b["activation"])
            c.pop("n_inner")  # always four times the width
        elif kind != "bloom":
            name = "hidden_act" if kind == "gpt_neox" else "activation_function"
            c[name] = activation_name(b["activation"], "gelu_new")
        if kind == "gpt2":
            c["scale_attn_by_inverse_layer_idx"] = b["inverse_layer_scale"]
        if kind == "gpt_neo":
            pattern = ["global", "local"]
            local = [bool(b["window"]) and b["local_layers"][i % len(b["local_layers"])] for i in range(b["depth"])]
            c |= {"attention_types": [[[pattern[x]], 1] for x in local], "window_size": b["window"] or 256}
            c["attention_layers"] = [pattern[x] for x in local]
        if kind == "gptj":
            c["rotary_dim"] = round(b["head_dim"] * b["rope_fraction"])
        if kind == "gpt_neox":
            c |= {
                **rope_parameters(b, kind),
                "rotary_pct": b["rope_fraction"],
                "rotary_emb_base": b["rope_theta"],
                "use_parallel_residual": b["arrangement"] == "parallel",
                "attention_bias": b["qkv_bias"],
            }
        if kind == "opt":
            c |= {"do_layer_norm_before": b["norm_position"] == "pre", "word_embed_proj_dim": b["width"]}
            c["pad_token_id"] = d["encoders"]["text"]["pad_id"]
        if head == "classification":
            c["num_labels"] = d["decoders"]["label"]["num_classes"]
        return c

    return write


# Names in the checkpoint: embedding, positions, layer, (qkv …), attention output, mlp up and down, norms, final norm.
_STANDARD = {"embedding": "wte", "positions": "wpe", "layer": "h.{i}.", "final": "ln_f"}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **_STANDARD, "fused": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj",
        "norms": ("ln_1", "ln_2"), "conv1d": True, "columns": "columns",
    },
    "openai-gpt": {
        **_STANDARD, "embedding": "tokens_embed", "positions": "positions_embed", "fused": "attn.c_attn",
        "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "norms": ("ln_1", "ln_2"), "final": None,
        "conv1d": True, "columns": "columns",
    },
    "gptj": {
        **_STANDARD, "qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "out": "attn.out_proj", "up": "mlp.fc_in",
        "down": "mlp.fc_out", "norms": ("ln_1", None),
    },
    "gpt_neo": {
        **_STANDARD, "qkv": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        "out": "attn.attention.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "norms": ("ln_1", "ln_2"),
    },
    "gpt_neox": {
        "embedding": "embed_in", "layer": "layers.{i}.", "fused": "attention.query_key_value",
        "out": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
        "norms": ("input_layernorm", "post_attention_layernorm"), "final": "final_layer_norm", "columns": "heads",
        "head": "embed_out",
    },
    "opt": {
        "embedding": "decoder.embed_tokens", "positions": "decoder.embed_positions", "layer": "decoder.layers.{i}.",
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "out": "self_attn.out_proj",
        "up": "fc1", "down": "fc2", "norms": ("self_attn_layer_norm", "final_layer_norm"),
        "final": "decoder.final_layer_norm",
    },
    "bloom": {
        "embedding": "word_embeddings", "embedding_norm": "word_embeddings_layernorm", "layer": "h.{i}.",
        "fused": "self_attention.query_key_value", "out": "self_attention.dense", "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h", "norms": ("input_layernorm", "post_attention_layernorm"), "final": "ln_f",
        "columns": "heads",
    },
}  # fmt: skip


def _tensors(kind: str):
    def tensors(d: Mapping[str, Any]) -> list[Tensor]:
        b, decoders, names = d["backbone"], d["decoders"], _LAYOUTS[kind]
        kernel, kernel_out = (CONV1D, CONV1D_OUT) if names.get("conv1d") else (LINEAR, LINEAR_OUT)
        layer = f"@{names['layer']}"
        rows = [Tensor(f"@{names['embedding']}.weight", (EMBEDDING,))]
        if b["positions"] == "learned":
            rows.append(Tensor(f"@{names['positions']}.weight", ("backbone/positions/embedding",)))

        def add(name, paths, form, bias, bias_form=SAME, fused="rows"):
            rows.append(Tensor(f"{name}.weight", tuple(f"{path}/kernel" for path in paths), form, fused))
            if bias:
                fused = "rows" if fused == "columns" else fused
                rows.append(Tensor(f"{name}.bias", tuple(f"{path}/bias" for path in paths), bias_form, fused))

        def norm(name, path):
            for theirs, ours in (("weight", "scale"), ("bias", "bias")):
                rows.append(Tensor(f"{name}.{theirs}", (f"{path}/{ours}",)))

        if "fused" in names:
            add(f"{layer}{names['fused']}", QKV, kernel, b["qkv_bias"], FLAT, names["columns"])
        else:
            for theirs, ours in zip(names["qkv"], QKV):
                add(f"{layer}{theirs}", (ours,), kernel, b["qkv_bias"], FLAT)
        add(f"{layer}{names['out']}", (f"{ATTENTION}out",), kernel_out, b["out_bias"])
        add(f"{layer}{names['up']}", (f"{MLP}up",), kernel, b["mlp_bias"])
        add(f"{layer}{names['down']}", (f"{MLP}down",), kernel, b["mlp_bias"])
        for theirs, ours in zip(names["norms"], ("norm_attention", "norm_mlp")):
            if theirs:
                norm(f"{layer}{theirs}", f"{LAYERS}{ours}")
        if b["norm_position"] != "post":
            norm(f"@{names['final']}", "backbone/transformer/norm")
        if b["embedding_norm"]:
            norm(f"@{names['embedding_norm']}", "backbone/embedding_norm")
        if "text" in decoders and not decoders["text"]["tied"]:
            add(names.get("head", "lm_head"), (HEAD,), LINEAR, decoders["text"]["use_bias"])
        if "label" in decoders:
            add("score", ("decoders_label/classes",), LINEAR, False)
        return rows

    return tensors


def _heads(kind: str) -> dict[str, str]:
    name = CLASSES[kind]
    lm = f"{name}LMHeadModel" if kind in ("gpt2", "openai-gpt") else f"{name}ForCausalLM"
    return {lm: "lm", f"{name}Model": "none", f"{name}ForSequenceClassification": "classification"}


PREFIXES = {"gpt_neox": "gpt_neox.", "opt": "model."}
IGNORED = (r".*attn\.(masked_)?bias", r".*attention\.(masked_)?bias", r".*rotary_emb\.inv_freq")
FAMILIES = {
    kind: Family(_read(kind), _write(kind), _tensors(kind), _heads(kind), PREFIXES.get(kind, "transformer."), IGNORED)
    for kind in NAMES
}
