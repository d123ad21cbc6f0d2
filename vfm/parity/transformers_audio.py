"""Parity of audio with `transformers`: front ends with its feature extractors, Whisper and AST both ways."""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from vfm.parity.transformers_models import Difference, with_random_weights

SAMPLE_RATE = 16_000


def _sounds(seconds: float) -> np.ndarray:
    """A chirp in noise, noise, a loud click in soft noise, and silence: float32[4, samples]."""
    rng, count = np.random.default_rng(0), int(seconds * SAMPLE_RATE)
    time = np.arange(count) / SAMPLE_RATE
    noise = rng.normal(size=(3, count))
    chirp = 0.5 * np.sin(2 * np.pi * (100 + 3000 * time) * time) + 0.01 * noise[0]
    click = 1e-3 * noise[2]
    click[count // 3] = 0.9
    return np.stack([chirp, 0.1 * noise[1], click, np.zeros(count)]).astype(np.float32)


def whisper_log_mel() -> float:
    """`log_mel` with Whisper's sizes, of a whole chunk of a second."""
    import jax
    from transformers import WhisperFeatureExtractor

    from vfm.layers.spectrogram import log_mel

    sounds = _sounds(1.0)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    wanted = extractor(list(sounds), sampling_rate=SAMPLE_RATE, return_tensors="np").input_features
    sizes = dict(sample_rate=SAMPLE_RATE, n_fft=400, hop=160, n_mels=80)
    found = jax.jit(lambda wave: log_mel(wave, **sizes))(sounds)
    return float(np.abs(np.asarray(found) - wanted.transpose(0, 2, 1)).max())


def ast_fbank() -> float:
    """The filter bank of `AST`, longer than the sound, shifted and scaled."""
    import jax
    from transformers import ASTFeatureExtractor

    from vfm.encoders.audio import AST

    sounds = _sounds(0.5)
    wanted = ASTFeatureExtractor(max_length=64, num_mel_bins=64)(list(sounds), sampling_rate=SAMPLE_RATE)
    model = AST(num_samples=sounds.shape[1], sample_rate=SAMPLE_RATE, n_mels=64, num_frames=64, patch_size=16, depth=1)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), sounds)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    _, out = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, sounds)
    return float(np.abs(np.asarray(out["fbank"]) - np.stack(wanted["input_values"])).max())


_AST = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_AST |= {"max_length": 41, "num_mel_bins": 24, "patch_size": 8, "frequency_stride": 6, "time_stride": 5}
_WHISPER = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48}
_WHISPER |= {"decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 2, "num_mel_bins": 16}
_WHISPER |= {"max_source_positions": 20, "max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1}
_WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None}
# name -> (class of the model, fields of its config).
MODELS = {
    "whisper": ("WhisperForConditionalGeneration", _WHISPER),
    "whisper, no head": ("WhisperModel", _WHISPER),
    "ast": ("ASTModel", _AST),
    "ast, classification": ("ASTForAudioClassification", {**_AST, "num_labels": 5, "qkv_bias": False}),
}


def compare(name: str, seed: int = 0) -> Difference:
    """The largest differences over all outputs, for spectrograms as the library's feature extractor gives them."""
    import torch
    import transformers

    from vfm.interop import huggingface

    architecture, fields = MODELS[name]
    cls = getattr(transformers, architecture)
    theirs = with_random_weights(cls, cls.config_class(**fields), seed)
    rng, c = np.random.default_rng(seed), theirs.config
    if c.is_encoder_decoder:
        call = {"input_features": rng.normal(size=(2, c.num_mel_bins, 2 * c.max_source_positions)).astype(np.float32)}
        call["decoder_input_ids"] = rng.integers(3, 96, (2, 9))
    else:
        call = {"input_values": rng.normal(size=(2, c.max_length, c.num_mel_bins)).astype(np.float32)}

    def output(model) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = model(**{key: torch.asarray(value) for key, value in call.items()})
        outputs = ("logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state")
        return {field: found[field].numpy() for field in outputs if field in found}

    wanted = output(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, variables = huggingface.load(folder)
    found = _ours(model, variables, call)
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(folder, model, variables)
        written = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
        again = output(getattr(transformers, written["architectures"][0]).from_pretrained(folder).eval())
    largest = lambda found: max(float(np.abs(found[field] - value).max()) for field, value in wanted.items())
    return Difference(largest(found), largest(again), max(float(np.abs(value).max()) for value in wanted.values()))


def arguments(call: dict[str, np.ndarray], model) -> dict[str, Any]:
    """Our arguments of a call of the library's Whisper or AST."""
    if "input_values" in call:
        return {"inputs": {"audio": call["input_values"][:, None]}}
    found = {"inputs": {"audio": call["input_features"].transpose(0, 2, 1)[:, None]}}
    B = len(call["input_features"])
    found["starts"] = {"audio": np.zeros((B, 1), np.int32)}
    found["input_mask"] = np.ones((B, model.encoders["audio"].num_tokens), bool)
    if "decoder_input_ids" in call:
        found["decoder_tokens"] = call["decoder_input_ids"].astype(np.int32)
    return found


def _ours(model, variables, call) -> dict[str, np.ndarray]:
    """Our outputs under the names of the library."""
    import jax

    run = jax.jit(lambda variables, call: model.apply(variables, **call, train=False))
    logits, out = run(variables, arguments(call, model))
    features = out["audio"]["features"][:, 0]
    if "input_values" in call:
        found = {"last_hidden_state": features, "pooler_output": out["audio"]["encoder"]["pooled"]}
    else:
        found = {"last_hidden_state": out["output"], "encoder_last_hidden_state": features}
    return jax.device_get(found if logits is None else {**found, "logits": logits})
