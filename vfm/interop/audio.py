"""Whisper, a speech encoder with a decoder of text, and AST, an encoder of sounds with a head for labels.

Of the front ends preprocessor_config.json tells; where a folder has none, those of the published models are taken.
"""

from collections.abc import Mapping
from typing import Any

from vfm.encoders.audio import WHISPER
from vfm.errors import UserError
from vfm.interop.configs import activation, activation_name, num_labels, refuse
from vfm.interop.vit import AS_BATCH, CONV, dense, norm
from vfm.interop.weights import FLAT, LINEAR, LINEAR_OUT, Family, Form, Tensor
from vfm.layers.spectrogram import fbank_sizes

ENCODER = "encoders_audio/"
LAYERS = f"{ENCODER}transformer/layers/"
DECODER = "backbone/decoder/"
# torch.nn.Conv1d stores [out, in, time]; ours are [time, in, out].
CONV_TIME = Form(lambda tensor, shape: tensor.transpose(2, 1, 0), lambda array: array.transpose(2, 1, 0))
# What the library takes where the files say nothing.
_WHISPER = {
    "vocab_size": 51865, "num_mel_bins": 80, "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536, "decoder_layers": 4, "decoder_attention_heads": 6, "decoder_ffn_dim": 1536,
    "max_source_positions": 1500, "max_target_positions": 448, "activation_function": "gelu", "pad_token_id": 50256,
}  # fmt: skip
_AST = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "patch_size": 16, "qkv_bias": True, "frequency_stride": 10,
    "time_stride": 10, "max_length": 1024, "num_mel_bins": 128,
}  # fmt: skip
_FBANK = {"sampling_rate": 16_000, "do_normalize": True, "mean": -4.2677393, "std": 4.5689974}


def _read_whisper(c: Mapping[str, Any], head: str) -> dict[str, Any]:
    c = {**_WHISPER, **c}
    front = c.get("preprocessor_config", {})
    refuse(c, "whisper", scale_embedding=False, use_weighted_layer_sum=False)
    refuse(front, "whisper", sampling_rate=WHISPER["sample_rate"], feature_size=c["num_mel_bins"])
    act, width = activation(c["activation_function"], "whisper"), c["d_model"]
    front = {"n_fft": front.get("n_fft", WHISPER["n_fft"]), "hop": front.get("hop_length", WHISPER["hop"])}
    audio = {
        "name": "audio",
        **WHISPER,
        **front,
        "num_samples": c["max_source_positions"] * WHISPER["frames"] * front["hop"],
        "n_mels": c["num_mel_bins"],
        "width": width,
        "depth": c["encoder_layers"],
        "num_heads": c["encoder_attention_heads"],
        "mlp_dim": c["encoder_ffn_dim"],
        "activation": act,
    }
    backbone = {
        "name": "encoder_decoder",
        "encode": False,
        "width": width,
        "depth": c["decoder_layers"],
        "num_heads": c["decoder_attention_heads"],
        "mlp_dim": c["decoder_ffn_dim"],
        "max_len": c["max_target_positions"],
        "positions": "learned",
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
        "activation": act,
        "use_bias": True,
        "key_bias": False,
    }
    text = {"name": "text", "vocab_size": c["vocab_size"], "width": width, "pad_id": c["pad_token_id"]}
    decoder = {"name": "text", "vocab_size": c["vocab_size"], "tied": bool(c.get("tie_word_embeddings", True))}
    return {
        "centre": "text",
        "encoders": {"audio": audio, "text": text},
        "backbone": backbone,
        "decoders": {"text": decoder} if head == "lm" else {},
    }


def _write_whisper(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
    audio, text, b = d["encoders"]["audio"], d["encoders"]["text"], d["backbone"]
    if audio["name"] != "audio" or b is None or b["name"] != "encoder_decoder":
        return None
    return {
        "vocab_size": text["vocab_size"],
        "num_mel_bins": audio["n_mels"],
        "d_model": audio["width"],
        "encoder_layers": audio["depth"],
        "encoder_attention_heads": audio["num_heads"],
        "encoder_ffn_dim": audio["mlp_dim"],
        "decoder_layers": b["decoder_depth"],
        "decoder_attention_heads": b["decoder_num_heads"],
        "decoder_ffn_dim": b["decoder_mlp_dim"],
        "max_source_positions": audio["num_samples"] // (audio["hop"] * audio["frames"]),
        "max_target_positions": b["max_len"],
        "activation_function": activation_name(audio["activation"], "gelu_new"),
        "tie_word_embeddings": d["decoders"].get("text", {}).get("tied", True),
        "pad_token_id": text["pad_id"],
        "is_encoder_decoder": True,
        "preprocessor_config": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": audio["n_mels"],
            "sampling_rate": audio["sample_rate"],
            "n_fft": audio["n_fft"],
            "hop_length": audio["hop"],
            "chunk_length": audio["num_samples"] // audio["sample_rate"],
        },
    }


def _whisper_layers(layer: str, path: str, cross: bool) -> list[Tensor]:
    attentions = [("self_attn", "attention", "norm_attention")]
    attentions += [("encoder_attn", "cross_attention", "norm_cross")] if cross else []
    rows = []
    for theirs, ours, normed in attentions:
        for letter, name, bias in (("q", "query", FLAT), ("k", "key", None), ("v", "value", FLAT)):
            rows += dense(f"{layer}{theirs}.{letter}_proj", f"{path}{ours}/{name}", LINEAR, bias)
        rows += dense(f"{layer}{theirs}.out_proj", f"{path}{ours}/out", LINEAR_OUT)
        rows += norm(f"{layer}{theirs}_layer_norm", f"{path}{normed}")
    rows += dense(f"{layer}fc1", f"{path}mlp/up") + dense(f"{layer}fc2", f"{path}mlp/down")
    return rows + norm(f"{layer}final_layer_norm", f"{path}norm_mlp")


def _tensors_whisper(d: Mapping[str, Any]) -> list[Tensor]:
    rows = [
        *dense("@encoder.conv1", f"{ENCODER}frames_0", CONV_TIME),
        *dense("@encoder.conv2", f"{ENCODER}frames_1", CONV_TIME),
        *_whisper_layers("@encoder.layers.{i}.", LAYERS, cross=False),
        *norm("@encoder.layer_norm", f"{ENCODER}transformer/norm"),
        Tensor("@decoder.embed_tokens.weight", ("encoders_text/embedding/embedding",)),
        Tensor("@decoder.embed_positions.weight", (f"{DECODER}positions/embedding",)),
        *_whisper_layers("@decoder.layers.{i}.", f"{DECODER}transformer/layers/", cross=True),
        *norm("@decoder.layer_norm", f"{DECODER}transformer/norm"),
    ]
    if "text" in d["decoders"] and not d["decoders"]["text"]["tied"]:
        rows.append(Tensor("proj_out.weight", ("decoders_text/head/kernel",), LINEAR))
    return rows


def _read_ast(c: Mapping[str, Any], head: str) -> dict[str, Any]:
    kind = "audio-spectrogram-transformer"
    c = {**_AST, **c}
    front = {**_FBANK, **c.get("preprocessor_config", {})}
    refuse(front, kind, num_mel_bins=c["num_mel_bins"], max_length=c["max_length"])
    if not isinstance(c["patch_size"], int):
        what = f"patch_size={c['patch_size']!r}"
        raise UserError(f"config.json: a {kind!r} model with {what} is not supported, only a whole number")
    window, hop = fbank_sizes(front["sampling_rate"])
    audio = {
        "name": "ast",
        "num_samples": window + (c["max_length"] - 1) * hop,
        "sample_rate": front["sampling_rate"],
        "n_mels": c["num_mel_bins"],
        "num_frames": c["max_length"],
        "mean": front["mean"] if front["do_normalize"] else 0.0,
        "std": front["std"] if front["do_normalize"] else 0.5,
        "patch_size": c["patch_size"],
        "stride": (c["frequency_stride"], c["time_stride"]),
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "mlp_dim": c["intermediate_size"],
        "activation": activation(c["hidden_act"], kind),
        "qkv_bias": c["qkv_bias"],
        "norm_epsilon": c["layer_norm_eps"],
    }
    decoders = {}
    if head == "classification":
        label = {"num_classes": num_labels(c), "pooling": "first", "norm": c["layer_norm_eps"]}
        decoders["label"] = {"name": "classifier", **label}
    return {"centre": "audio", "encoders": {"audio": audio}, "backbone": None, "decoders": decoders}


def _write_ast(d: Mapping[str, Any], head: str) -> dict[str, Any] | None:
    audio = d["encoders"]["audio"]
    if audio["name"] != "ast" or d["backbone"] is not None or audio["num_frames"] is None:
        return None
    c = {
        "hidden_size": audio["width"],
        "num_hidden_layers": audio["depth"],
        "num_attention_heads": audio["num_heads"],
        "intermediate_size": audio["mlp_dim"],
        "hidden_act": activation_name(audio["activation"], "gelu_pytorch_tanh"),
        "layer_norm_eps": audio["norm_epsilon"],
        "patch_size": audio["patch_size"],
        "qkv_bias": audio["qkv_bias"],
        "frequency_stride": audio["stride"][0],
        "time_stride": audio["stride"][1],
        "max_length": audio["num_frames"],
        "num_mel_bins": audio["n_mels"],
        "preprocessor_config": {
            "feature_extractor_type": "ASTFeatureExtractor",
            "num_mel_bins": audio["n_mels"],
            "max_length": audio["num_frames"],
            "sampling_rate": audio["sample_rate"],
            "mean": audio["mean"],
            "std": audio["std"],
        },
    }
    if head == "classification":
        c["num_labels"] = d["decoders"]["label"]["num_classes"]
    return c


def _tensors_ast(d: Mapping[str, Any]) -> list[Tensor]:
    layer, bias = "@encoder.layer.{i}.", FLAT if d["encoders"]["audio"]["qkv_bias"] else None
    rows = [
        Tensor("@embeddings.cls_token", (f"{ENCODER}class_token",), AS_BATCH),
        Tensor("@embeddings.distillation_token", (f"{ENCODER}distillation_token",), AS_BATCH),
        Tensor("@embeddings.position_embeddings", (f"{ENCODER}positions",), AS_BATCH),
        *dense("@embeddings.patch_embeddings.projection", f"{ENCODER}patch", CONV),
        *norm("@layernorm", f"{ENCODER}transformer/norm"),
        *norm(f"{layer}layernorm_before", f"{LAYERS}norm_attention"),
        *norm(f"{layer}layernorm_after", f"{LAYERS}norm_mlp"),
        *dense(f"{layer}attention.output.dense", f"{LAYERS}attention/out", LINEAR_OUT),
        *dense(f"{layer}intermediate.dense", f"{LAYERS}mlp/up"),
        *dense(f"{layer}output.dense", f"{LAYERS}mlp/down"),
    ]
    for name in ("query", "key", "value"):
        rows += dense(f"{layer}attention.attention.{name}", f"{LAYERS}attention/{name}", LINEAR, bias)
    if "label" in d["decoders"]:
        rows += norm("classifier.layernorm", "decoders_label/norm") + dense(
            "classifier.dense", "decoders_label/classes"
        )
    return rows


IGNORED = (r"(model\.)?encoder\.embed_positions\.weight", r"proj_out\.weight")  # fixed, and a copy of the tied table
FAMILIES = {
    "whisper": Family(
        _read_whisper,
        _write_whisper,
        _tensors_whisper,
        {"WhisperForConditionalGeneration": "lm", "WhisperModel": "none"},
        "model.",
        IGNORED,
        encoders=("audio", "text"),
    ),
    "audio-spectrogram-transformer": Family(
        _read_ast,
        _write_ast,
        _tensors_ast,
        {"ASTForAudioClassification": "classification", "ASTModel": "none"},
        "audio_spectrogram_transformer.",
        encoders=("audio",),
    ),
}
