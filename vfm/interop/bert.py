"""BERT and its relatives: encoder-only models with a head for masked tokens, for sentence pairs, or for labels."""

from collections.abc import Mapping
from typing import Any

from vfm.interop.configs import activation, activation_name, num_labels, refuse, single
from vfm.interop.weights import FLAT, LINEAR, LINEAR_OUT, SAME, Family, Tensor

EMBEDDING = "encoders_text/embedding/embedding"
LAYERS = "backbone/transformer/layers/"
POOLED = ("pooled", "classification", "pretraining", "next_sentence")  # heads that stand on the first token
CLASSES = {
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert",
    "distilbert": "DistilBert",
}  # fmt: skip
_BERT = {"width": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
_BERT |= {"mlp_dim": "intermediate_size", "activation": "hidden_act"}
_DISTIL = {"width": "dim", "depth": "n_layers", "num_heads": "n_heads", "mlp_dim": "hidden_dim"}
_DISTIL |= {"activation": "activation"}


def _names(kind: str) -> dict[str, str]:
    return _DISTIL if kind == "distilbert" else _BERT


def _is_roberta(kind: str) -> bool:
    return kind not in ("bert", "distilbert")


def _read(kind: str):
    def read(c: Mapping[str, Any], head: str) -> dict[str, Any]:
        names = _names(kind)
        refuse(c, kind, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
        width, heads, epsilon = c[names["width"]], c[names["num_heads"]], c.get("layer_norm_eps", 1e-12)
        act = activation(c.get(names["activation"], "gelu"), kind)
        # RoBERTa counts positions from the row behind that of the padding token.
        offset = c.get("pad_token_id", 1) + 1 if _is_roberta(kind) else 0
        backbone = {
            "width": width,
            "depth": c[names["depth"]],
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": width // heads,
            "mlp_dim": c[names["mlp_dim"]],
            "max_len": c["max_position_embeddings"] - offset,
            "position_offset": offset,
            "positions": "learned",
            "norm": "layernorm",
            "norm_epsilon": epsilon,
            "norm_position": "post",
            "embedding_norm": True,
            "num_token_types": 0 if kind == "distilbert" else c.get("type_vocab_size", 2),
            "activation": act,
            "gated": False,
            "use_bias": True,
        }
        decoder = label = None
        if head in ("mlm", "pretraining"):
            transform = "gelu" if _is_roberta(kind) else act
            decoder = {
                "tied": bool(c.get("tie_word_embeddings", True)),
                "use_bias": True,
                "transform": transform,
                "norm_epsilon": 1e-12 if kind == "distilbert" else epsilon,
            }
        if head in POOLED:
            classes = {"pooled": None, "classification": num_labels(c)}.get(head, 2)
            label = {"num_classes": classes, "pooling": "first", "transform": "tanh"}
            if kind == "distilbert":
                label["transform"] = "relu"
        pad = c.get("pad_token_id", 1 if _is_roberta(kind) else 0)
        return single("encoder_only", c, backbone, {}, decoder, label, pad)

    return read


def _write(kind: str):
    def write(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
        b, names = d["backbone"], _names(kind)
        if (
            b["name"] != "encoder_only"
            or b["positions"] != "learned"
            or (kind != "distilbert") != bool(b["num_token_types"])
        ):
            return None
        c = {theirs: b[ours] for ours, theirs in names.items() if ours != "activation"}
        c |= {
            names["activation"]: activation_name(b["activation"], "gelu_new"),
            "vocab_size": d["encoders"]["text"]["vocab_size"],
            "max_position_embeddings": b["max_len"] + b["position_offset"],
            "tie_word_embeddings": d["decoders"].get("text", {}).get("tied", True),
        }
        if kind != "distilbert":
            c |= {"layer_norm_eps": b["norm_epsilon"], "type_vocab_size": b["num_token_types"]}
        c["pad_token_id"] = d["encoders"]["text"]["pad_id"]
        if _is_roberta(kind) and c["pad_token_id"] != b["position_offset"] - 1:
            return None
        if head == "classification":
            c["num_labels"] = d["decoders"]["label"]["num_classes"]
        return c

    return write


def _tensors(kind: str):
    def tensors(d: Mapping[str, Any]) -> list[Tensor]:
        distil, roberta, decoders = kind == "distilbert", _is_roberta(kind), d["decoders"]
        rows: list[Tensor] = []

        def add(name, path, kernel=LINEAR, bias=SAME):
            rows.append(Tensor(f"{name}.weight", (f"{path}/kernel",), kernel))
            if bias is not None:
                rows.append(Tensor(f"{name}.bias", (f"{path}/bias",), bias))

        def norm(name, path):
            rows.extend([Tensor(f"{name}.weight", (f"{path}/scale",)), Tensor(f"{name}.bias", (f"{path}/bias",))])

        rows.append(Tensor("@embeddings.word_embeddings.weight", (EMBEDDING,)))
        rows.append(Tensor("@embeddings.position_embeddings.weight", ("backbone/positions/embedding",)))
        if d["backbone"]["num_token_types"]:
            rows.append(Tensor("@embeddings.token_type_embeddings.weight", ("backbone/token_types/embedding",)))
        norm("@embeddings.LayerNorm", "backbone/embedding_norm")
        layer = "@transformer.layer.{i}." if distil else "@encoder.layer.{i}."
        qkv = ("attention.q_lin", "attention.k_lin", "attention.v_lin")
        rest = ("attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
        if not distil:
            qkv = ("attention.self.query", "attention.self.key", "attention.self.value")
            rest = ("attention.output.dense", "attention.output.LayerNorm")
            rest += ("intermediate.dense", "output.dense", "output.LayerNorm")
        for theirs, ours in zip(qkv, ("query", "key", "value")):
            add(f"{layer}{theirs}", f"{LAYERS}attention/{ours}", LINEAR, FLAT)
        out, after_attention, up, down, after_mlp = (f"{layer}{name}" for name in rest)
        add(out, f"{LAYERS}attention/out", LINEAR_OUT)
        norm(after_attention, f"{LAYERS}norm_attention")
        add(up, f"{LAYERS}mlp/up")
        add(down, f"{LAYERS}mlp/down")
        norm(after_mlp, f"{LAYERS}norm_mlp")
        if "text" in decoders:
            dense, normed, bias, head = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
                                         "cls.predictions.bias", "cls.predictions.decoder")  # fmt: skip
            if roberta:
                dense, normed, bias, head = "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"
            if distil:
                dense, normed, bias = "vocab_transform", "vocab_layer_norm", "vocab_projector.bias"
                head = "vocab_projector"
            add(dense, "decoders_text/hidden")
            norm(normed, "decoders_text/norm")
            tied = decoders["text"]["tied"]
            rows.append(Tensor(bias, ("decoders_text/bias" if tied else "decoders_text/head/bias",)))
            if not tied:
                add(head, "decoders_text/head", bias=None)
        if "label" in decoders:
            classes = decoders["label"]["num_classes"]
            if roberta and classes is not None:
                pooler, head = "classifier.dense", "classifier.out_proj"
            elif distil:
                pooler, head = "pre_classifier", "classifier"
            else:
                pooler, head = "@pooler.dense", "cls.seq_relationship" if "text" in decoders else "classifier"
            add(pooler, "decoders_label/hidden")
            if classes is not None:
                add(head, "decoders_label/classes")
        return rows

    return tensors


def _heads(kind: str) -> dict[str, str]:
    name = CLASSES[kind]
    heads = {f"{name}ForMaskedLM": "mlm", f"{name}Model": "none"}
    heads[f"{name}ForSequenceClassification"] = "classification"
    return {**heads, "BertForPreTraining": "pretraining"} if kind == "bert" else heads


# Which tensors may be left over: copies of tied ones, and positions that are stored as numbers 0, 1, ….
IGNORED = (
    r"(.*\.)?embeddings\.position_ids",
    r"cls\.predictions\.decoder\.(weight|bias)",
    r"lm_head\.decoder\.(weight|bias)",
    r"vocab_projector\.weight",
    # Of pretraining, beside the head that config.json names.
    r"(bert\.)?pooler\..*",
    r"cls\.seq_relationship\..*",
)
PREFIXES = {"bert": "bert.", "distilbert": "distilbert."}
FAMILIES = {
    kind: Family(_read(kind), _write(kind), _tensors(kind), _heads(kind), PREFIXES.get(kind, "roberta."), IGNORED)
    for kind in CLASSES
}
