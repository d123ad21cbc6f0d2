"""Parity with `transformers`: small random models of every family, written by the library and read by us, and back."""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# What all of these have, under the names of most families.
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 2}
_GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
_GPT |= {"eos_token_id": 2}
_GPT_NEO = {"vocab_size": 96, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64}
_GPT_NEO |= {"attention_types": [[["global", "local"], 2]], "window_size": 4, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}
_T5 |= {"num_heads": 4, "decoder_start_token_id": 0, "relative_attention_max_distance": 12}
_T5 |= {"relative_attention_num_buckets": 8}
_BART = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48}
_BART |= {"decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
_BART |= {"max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": None}
_DISTIL = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64}


def _rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **fields}}


# name -> (class of the model, fields of its config).
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt2, logits scaled by layer, untied": (
        "GPT2LMHeadModel",
        {**_GPT, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "n_inner": 40},
    ),
    "gpt2, classification": ("GPT2ForSequenceClassification", {**_GPT, "pad_token_id": 0, "num_labels": 3}),
    "gpt2, no head": ("GPT2Model", _GPT),
    "openai-gpt": ("OpenAIGPTLMHeadModel", _GPT),
    "gpt_neo (GPT-3's alternating layers)": ("GPTNeoForCausalLM", _GPT_NEO),
    "gptj": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SIZES, **_rope(partial_rotary_factor=0.5)}),
    "gpt_neox, sequential": ("GPTNeoXForCausalLM", {**SIZES, "use_parallel_residual": False}),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom (ALiBi)": ("BloomForCausalLM", {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "llama": ("LlamaForCausalLM", GQA),
    "llama, tied, biases": (
        "LlamaForCausalLM",
        {**GQA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "llama, classification": ("LlamaForSequenceClassification", {**GQA, "num_labels": 5}),
    "llama, linear": ("LlamaForCausalLM", {**GQA, **_rope(rope_type="linear", factor=2.0)}),
    "llama, dynamic": (
        "LlamaForCausalLM",
        {**GQA, "max_position_embeddings": 8, **_rope(rope_type="dynamic", factor=4.0)},
    ),
    "llama, yarn": (
        "LlamaForCausalLM",
        {**GQA, **_rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=8)},
    ),
    "llama, llama3": (
        "LlamaForCausalLM",
        {
            **GQA,
            **_rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        },
    ),
    "mistral (sliding window)": ("MistralForCausalLM", {**GQA, "sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", GQA),
    "qwen2, window in the upper layers": (
        "Qwen2ForCausalLM",
        {**GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**GQA, "head_dim": 12}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
         "head_dim": 8},
    ),
    "gemma": ("GemmaForCausalLM", {**GQA, "head_dim": 12}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**GQA, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 1.0},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {**GQA, "num_hidden_layers": 7, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 24},
    ),
    "olmo": ("OlmoForCausalLM", GQA),
    "olmo2": ("Olmo2ForCausalLM", GQA),
    "olmo3": ("Olmo3ForCausalLM", {**GQA, "num_hidden_layers": 5, "sliding_window": 4}),
    "stablelm": ("StableLmForCausalLM", {**GQA, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2ForCausalLM", {**GQA, "sliding_window": 4}),
    "cohere": ("CohereForCausalLM", GQA),
    "phi": ("PhiForCausalLM", GQA),
    "phi3": ("Phi3ForCausalLM", {**GQA, "sliding_window": 6}),
    "glm": ("GlmForCausalLM", {**GQA, "head_dim": 8, "attention_bias": True}),
    "glm4": ("Glm4ForCausalLM", {**GQA, "head_dim": 8, "attention_bias": True}),
    "bert, masked tokens": ("BertForMaskedLM", SIZES),
    "bert, pretraining": ("BertForPreTraining", SIZES),
    "bert, classification": ("BertForSequenceClassification", {**SIZES, "num_labels": 3}),
    "bert, no head": ("BertModel", SIZES),
    "roberta": ("RobertaForMaskedLM", {**SIZES, "pad_token_id": 1, "type_vocab_size": 1}),
    "roberta, classification": (
        "RobertaForSequenceClassification",
        {**SIZES, "pad_token_id": 1, "type_vocab_size": 1, "num_labels": 3},
    ),
    "distilbert": ("DistilBertForMaskedLM", _DISTIL),
    "distilbert, classification": ("DistilBertForSequenceClassification", {**_DISTIL, "num_labels": 3}),
    "t5": ("T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "relu"}),
    "mt5 (gated, untied)": (
        "MT5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", _BART),
    "mbart": ("MBartForConditionalGeneration", {**_BART, "scale_embedding": True}),
    "pegasus": ("PegasusForConditionalGeneration", {**_BART, "pad_token_id": 0, "scale_embedding": True}),
    "marian": ("MarianMTModel", {**_BART, "pad_token_id": 0, "scale_embedding": True}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest absolute differences of the outputs: of ours to the library's on a padded batch, and of the library's
    after our `save` to its own. `scale`: the largest absolute output."""

    forward: float
    round_trip: float
    scale: float


def random_model(name: str, seed: int = 0):
    """A model of `MODELS` with no trivial parameter, in evaluation mode."""
    import transformers

    architecture, fields = MODELS[name]
    cls = getattr(transformers, architecture)
    return with_random_weights(cls, cls.config_class(**fields), seed)


def with_random_weights(cls, config, seed: int = 0):
    """A model of a class of `transformers` with no trivial parameter, in evaluation mode."""
    import torch

    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # fixed sinusoidal positions are not
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for path, buffer in model.named_buffers():
            if path == "final_logits_bias":
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model


def compare(name: str, seed: int = 0, save: bool = True) -> Difference:
    """Writes a random model with `transformers`, reads it, runs both on one batch; writes ours, reads it there."""
    import torch
    import transformers

    from vfm.interop import huggingface

    theirs = random_model(name, seed)
    rng = np.random.default_rng(seed)
    B, T, U = 2, 14, 9
    ids = rng.integers(3, 96, (B, T))
    mask = np.ones((B, T), np.int64)
    mask[1, 10:] = 0
    ids[mask == 0] = theirs.config.pad_token_id or 0
    call = {"input_ids": ids, "attention_mask": mask}
    names = {"input_ids": "tokens", "attention_mask": "input_mask"}
    if theirs.config.is_encoder_decoder:
        call["decoder_input_ids"] = rng.integers(3, 96, (B, U))
        names["decoder_input_ids"] = "decoder_tokens"
    if theirs.config.model_type == "bert":
        call["token_type_ids"] = np.tile(np.arange(T) >= T // 2, (B, 1)).astype(np.int64)
        names["token_type_ids"] = "token_types"

    def output(model):
        with torch.no_grad():
            found = model(**{key: torch.asarray(value) for key, value in call.items()})
        for field in ("logits", "prediction_logits", "last_hidden_state"):
            if field in found:
                return found[field].numpy()
        raise ValueError(f"{type(model).__name__} gives {sorted(found)}")

    wanted = output(theirs)
    real = mask[:, :, None].astype(bool) if wanted.ndim == 3 and wanted.shape[1] == T else np.True_
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, variables = huggingface.load(folder)
        inputs = {
            ours: np.asarray(call[key], bool if ours == "input_mask" else np.int32) for key, ours in names.items()
        }
        logits, out = jax.jit(lambda v, inputs: model.apply(v, **inputs, train=False))(variables, inputs)
        found = np.asarray(out["output"] if logits is None else logits)
        forward = float(np.abs(np.where(real, found - wanted, 0)).max())
    again = float("nan")
    if save:
        with tempfile.TemporaryDirectory() as folder:
            pad = {"pad_token_id": theirs.config.pad_token_id} if theirs.config.pad_token_id is not None else {}
            huggingface.save(folder, model, variables, **pad)
            written = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
            back = getattr(transformers, written["architectures"][0]).from_pretrained(folder).eval()
            again = float(np.abs(np.where(real, output(back) - wanted, 0)).max())
    return Difference(forward, again, float(np.abs(wanted).max()))
