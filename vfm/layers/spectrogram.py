"""Spectrograms of sounds, computed on the accelerator, and their augmentation."""

import jax
import jax.numpy as jnp
import numpy as np

from vfm.errors import unknown

SCALES = ("slaney", "htk")
EDGES = ("reflect", "constant")
# The largest power below which a filter of Kaldi's is cut: the step of float32 at one.
_FLOOR = float(np.finfo(np.float32).eps)


def hz_to_mel(frequency: np.ndarray, scale: str = "slaney") -> np.ndarray:
    """Mels of frequencies in Hz.

    "slaney": linear below 1 kHz, logarithmic above (Auditory Toolbox 1998). "htk": 2595 log10(1 + f / 700)
    (O'Shaughnessy 1987; HTK, Kaldi).
    """
    frequency = np.asarray(frequency, np.float64)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if scale == "htk":
        return 2595 * np.log10(1 + frequency / 700)
    linear = frequency / (200 / 3)
    return np.where(frequency < 1000, linear, 15 + np.log(np.maximum(frequency, 1e-9) / 1000) * 27 / np.log(6.4))


def mel_to_hz(mel: np.ndarray, scale: str = "slaney") -> np.ndarray:
    """Inverse of `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def mel_filterbank(
    n_mels: int,
    n_fft: int,
    sample_rate: int,
    max_frequency: float | None = None,
    min_frequency: float = 0.0,
    scale: str = "slaney",
    unit_area: bool = True,
    straight_in_mels: bool = False,
) -> np.ndarray:
    """Triangular filters float32[n_fft / 2 + 1, n_mels] between two frequencies (None: half the sample rate).

    unit_area: the area of each is one, else its peak. straight_in_mels: the sides of the triangles are straight on the
    mel scale (Kaldi), else in Hz.
    """
    max_frequency = sample_rate / 2 if max_frequency is None else max_frequency
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]
    mels = np.linspace(hz_to_mel(min_frequency, scale), hz_to_mel(max_frequency, scale), n_mels + 2)
    edges = mel_to_hz(mels, scale)
    at, corners = (hz_to_mel(bins, scale), mels) if straight_in_mels else (bins, edges)
    low, mid, high = corners[None, :-2], corners[None, 1:-1], corners[None, 2:]
    triangle = np.maximum(0, np.minimum((at - low) / (mid - low), (high - at) / (high - mid)))
    return (triangle * 2 / (edges[2:] - edges[:-2]) if unit_area else triangle).astype(np.float32)


def cut(x: jax.Array, size: int, hop: int) -> jax.Array:
    """Frames of `size` samples, one every `hop`: float[B, S] -> float[B, 1 + (S - size) / hop, size]."""
    frames = 1 + (x.shape[1] - size) // hop
    return x[:, np.arange(frames)[:, None] * hop + np.arange(size)[None, :]]


def hann(n_fft: int) -> np.ndarray:
    """The periodic Hann window, float32[n_fft]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)


def _power(spectrum: jax.Array) -> jax.Array:
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def stft(waveform: jax.Array, n_fft: int, hop: int, edges: str = "reflect") -> jax.Array:
    """Short-time Fourier transform with a Hann window, float[B, S] -> complex64[B, 1 + S / hop, n_fft / 2 + 1].

    Frame t is centred on sample t · hop; beyond its ends the sound is reflected (torch), or zero: "constant" (librosa).
    """
    if edges not in EDGES:
        raise unknown("edges", edges, EDGES)
    padded = jnp.pad(waveform.astype(jnp.float32), ((0, 0), (n_fft // 2, n_fft // 2)), mode=edges)
    return jnp.fft.rfft(cut(padded, n_fft, hop) * hann(n_fft)[None, None], n_fft)


def power_spectrogram(waveform: jax.Array, n_fft: int, hop: int, edges: str = "reflect") -> jax.Array:
    """|STFT|² (see `stft`), float[B, S] -> float32[B, 1 + S / hop, n_fft / 2 + 1]."""
    return _power(stft(waveform, n_fft, hop, edges))


def mel_power(power: jax.Array, filters: np.ndarray) -> jax.Array:
    """Power in each filter: float[B, T, n_fft / 2 + 1] -> float[B, T, n_mels]."""
    return jnp.einsum("btf,fm->btm", power, filters)


def decibels(power: jax.Array, top: float = 80.0) -> jax.Array:
    """10 log10 of a power float[B, T, F], cut `top` dB below the loudest bin of the item."""
    level = 10 * jnp.log10(jnp.maximum(power, 1e-10))
    return jnp.maximum(level, jnp.max(level, axis=(1, 2), keepdims=True) - top)


def log_mel(
    waveform: jax.Array, *, sample_rate: int, n_fft: int, hop: int, n_mels: int, max_frequency: float | None = None
) -> jax.Array:
    """Log-mel spectrogram as Whisper takes it (Radford et al. 2022): float[B, S] -> float32[B, S / hop, n_mels].

    log10 of the mel power, cut 8 decades below the loudest bin of the item, then (x + 4) / 4: about [-1, 1]. The last
    frame is dropped.
    """
    power = power_spectrogram(waveform, n_fft, hop)[:, :-1]
    mel = mel_power(power, mel_filterbank(n_mels, n_fft, sample_rate, max_frequency))
    return (decibels(mel) / 10 + 4.0) / 4.0


def fbank_sizes(sample_rate: int) -> tuple[int, int]:
    """Samples of a window (25 ms), and from one to the next (10 ms), of `fbank`."""
    return sample_rate * 25 // 1000, sample_rate // 100


def fbank(waveform: jax.Array, *, sample_rate: int, n_mels: int) -> jax.Array:
    """Kaldi's filter bank as AST takes it (Gong et al. 2021): float[B, S] -> float32[B, T, n_mels].

    Windows of 25 ms every 10 ms, that lie within the sound, T = 1 + (S - window) / hop; from each its mean is taken,
    then 0.97 of the sample before (pre-emphasis); symmetric Hann window; FFT of the next power of two; the natural
    logarithm of the power in filters from 20 Hz to half the sample rate, and of 2^-23 where there is less.
    """
    size, hop = fbank_sizes(sample_rate)
    n_fft = 1 << (size - 1).bit_length()
    frames = cut(waveform.astype(jnp.float32), size, hop)
    frames = frames - frames.mean(axis=-1, keepdims=True)
    frames = frames - 0.97 * jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))
    filters = mel_filterbank(
        n_mels, n_fft, sample_rate, min_frequency=20.0, scale="htk", unit_area=False, straight_in_mels=True
    )
    spectrum = jnp.fft.rfft(frames * window[None, None].astype(np.float32), n_fft)
    power = mel_power(_power(spectrum), filters)
    return jnp.log(jnp.maximum(power, _FLOOR))


def mask_spectrogram(
    key: jax.Array, spectrogram: jax.Array, *, time: float = 0.0, mel: float = 0.0, count: int = 2
) -> jax.Array:
    """Hides bands of time and of frequency behind the mean of the item (SpecAugment, Park et al. 2019, section 2).

    spectrogram: float[B, T, F]. `count` bands of either kind, which may overlap; the width of each is uniform from 0 to
    the share `time` of the frames, or `mel` of the bins, and so is its place. 0: no bands of that kind.
    """
    B, T, F = spectrogram.shape
    hidden = jnp.zeros((B, T, F), bool)
    for axis, (share, size) in enumerate(((time, T), (mel, F))):
        if not share:
            continue
        of_width, of_place = jax.random.split(jax.random.fold_in(key, axis))
        width = jax.random.randint(of_width, (B, count, 1), 0, int(share * size) + 1)
        start = jnp.floor(jax.random.uniform(of_place, (B, count, 1)) * (size - width + 1))
        index = jnp.arange(size)[None, None]
        band = ((index >= start) & (index < start + width)).any(axis=1)
        hidden = hidden | (band[:, :, None] if axis == 0 else band[:, None, :])
    return jnp.where(hidden, spectrogram.mean(axis=(1, 2), keepdims=True), spectrogram)
