"""T5 and its relatives: encoder–decoders with relative positions."""

from collections.abc import Mapping
from typing import Any

from vfm.interop.configs import activation, activation_name, single
from vfm.interop.gpt import UNBOUNDED
from vfm.interop.weights import LINEAR, LINEAR_OUT, Family, Tensor

EMBEDDING = "encoders_text/embedding/embedding"
CLASSES = {"t5": "T5", "mt5": "MT5"}


def _read(kind: str):
    def read(c: Mapping[str, Any], head: str) -> dict[str, Any]:
        form = c.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
        gated, act = form.startswith("gated-"), form.removeprefix("gated-")
        act = "gelu_new" if form == "gated-gelu" else act  # the library's own exception
        tied = bool(c.get("tie_word_embeddings", kind == "t5"))
        scaled = c.get("scale_decoder_outputs", tied and kind == "t5")
        backbone = {
            "width": c["d_model"],
            "depth": c["num_layers"],
            "decoder_depth": c.get("num_decoder_layers") or c["num_layers"],
            "num_heads": c["num_heads"],
            "num_kv_heads": c["num_heads"],
            "head_dim": c["d_kv"],
            "mlp_dim": c["d_ff"],
            "max_len": UNBOUNDED,
            "positions": "relative",
            "relative_buckets": c.get("relative_attention_num_buckets", 32),
            "relative_max_distance": c.get("relative_attention_max_distance", 128),
            "attention_scale": 1.0,
            "norm": "rmsnorm",
            "norm_epsilon": c.get("layer_norm_epsilon", 1e-6),
            "activation": activation(act, kind),
            "gated": gated,
            "use_bias": False,
        }
        decoder = {"tied": tied, "scale": c["d_model"] ** -0.5 if scaled else 1.0}
        return single("encoder_decoder", c, backbone, {}, decoder if head == "lm" else None, None)

    return read


def _write(kind: str):
    def write(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
        b, decoder = d["backbone"], d["decoders"].get("text", {})
        if b["name"] != "encoder_decoder" or b["positions"] != "relative":
            return None
        act = activation_name(b["activation"], "gelu_new")
        act = f"gated-{'gelu' if act == 'gelu_new' else act}" if b["gated"] else act
        return {
            "vocab_size": d["encoders"]["text"]["vocab_size"],
            "d_model": b["width"],
            "num_layers": b["depth"],
            "num_decoder_layers": b["decoder_depth"],
            "num_heads": b["num_heads"],
            "d_kv": b["head_dim"],
            "d_ff": b["mlp_dim"],
            "relative_attention_num_buckets": b["relative_buckets"],
            "relative_attention_max_distance": b["relative_max_distance"],
            "layer_norm_epsilon": b["norm_epsilon"],
            "feed_forward_proj": act,
            "tie_word_embeddings": decoder.get("tied", True),
            "decoder_start_token_id": 0,
            "is_encoder_decoder": True,
        }

    return write


def tensors(d: Mapping[str, Any]) -> list[Tensor]:
    """The weight map."""
    rows = [Tensor("shared.weight", (EMBEDDING,))]
    gated = d["backbone"]["gated"]
    mlp = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
    for side in ("encoder", "decoder"):
        stack, block = f"backbone/{side}/", f"{side}.block." + "{i}.layer."
        layers = f"{stack}transformer/layers/"
        attentions = [("0.SelfAttention", "attention")]
        if side == "decoder":
            attentions.append(("1.EncDecAttention", "cross_attention"))
        for theirs, ours in attentions:
            for letter, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
                form = LINEAR_OUT if letter == "o" else LINEAR
                rows.append(Tensor(f"{block}{theirs}.{letter}.weight", (f"{layers}{ours}/{name}/kernel",), form))
            norm = "norm_" + ours.removesuffix("_attention")
            rows.append(Tensor(f"{block}{theirs[0]}.layer_norm.weight", (f"{layers}{norm}/scale",)))
        last = len(attentions)
        for theirs, ours in mlp.items():
            rows.append(
                Tensor(f"{block}{last}.DenseReluDense.{theirs}.weight", (f"{layers}mlp/{ours}/kernel",), LINEAR)
            )
        rows.append(Tensor(f"{block}{last}.layer_norm.weight", (f"{layers}norm_mlp/scale",)))
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows.append(Tensor(bias, (f"{stack}relative_bias/embedding",)))
        rows.append(Tensor(f"{side}.final_layer_norm.weight", (f"{stack}transformer/norm/scale",)))
    if "text" in d["decoders"] and not d["decoders"]["text"]["tied"]:
        rows.append(Tensor("lm_head.weight", ("decoders_text/head/kernel",), LINEAR))
    return rows


# Copies of the shared table; and a bias that cross-attention has in old files and never used.
IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
FAMILIES = {
    kind: Family(
        _read(kind),
        _write(kind),
        tensors,
        {f"{name}ForConditionalGeneration": "lm", f"{name}Model": "none"},
        "",
        IGNORED,
    )
    for kind, name in CLASSES.items()
}
