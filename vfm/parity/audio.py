"""Parity of the audio front ends with the feature extractors of `transformers`."""

import numpy as np

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
