"""Audio Transformer on log-mel spectrograms that are computed on the accelerator."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vfm.encoders import check_item
from vfm.layers.transformer import Transformer


def hz_to_mel(frequency: np.ndarray) -> np.ndarray:
    """Slaney's mel scale (Auditory Toolbox 1998): linear below 1 kHz, logarithmic above."""
    frequency = np.asarray(frequency, np.float64)
    linear = frequency / (200 / 3)
    return np.where(frequency < 1000, linear, 15 + np.log(np.maximum(frequency, 1e-9) / 1000) * 27 / np.log(6.4))


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Inverse of `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def mel_filterbank(n_mels: int, n_fft: int, sample_rate: int, max_frequency: float | None = None) -> np.ndarray:
    """Triangular filters of unit area, float32[n_fft / 2 + 1, n_mels], from 0 Hz to `max_frequency` (None: half the
    sample rate)."""
    max_frequency = sample_rate / 2 if max_frequency is None else max_frequency
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]
    edges = mel_to_hz(np.linspace(hz_to_mel(0), hz_to_mel(max_frequency), n_mels + 2))
    low, mid, high = edges[None, :-2], edges[None, 1:-1], edges[None, 2:]
    triangle = np.maximum(0, np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)))
    return (triangle * 2 / (high - low)).astype(np.float32)


def power_spectrogram(waveform: jax.Array, n_fft: int, hop: int) -> jax.Array:
    """|STFT|² with a periodic Hann window and reflected edges, float[B, S] -> float[B, 1 + S / hop, n_fft / 2 + 1]."""
    padded = jnp.pad(waveform.astype(jnp.float32), ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    frames = 1 + waveform.shape[1] // hop
    index = np.arange(frames)[:, None] * hop + np.arange(n_fft)[None, :]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    spectrum = jnp.fft.rfft(padded[:, index] * window[None, None].astype(np.float32))
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def log_mel(
    waveform: jax.Array, *, sample_rate: int, n_fft: int, hop: int, n_mels: int, max_frequency: float | None = None
) -> jax.Array:
    """Log-mel spectrogram as Whisper takes it (Radford et al. 2022): float[B, S] -> float32[B, S / hop, n_mels].

    log10 of the mel power, cut 8 decades below the loudest bin of the item, then (x + 4) / 4: about [-1, 1]. The last
    frame is dropped.
    """
    power = power_spectrogram(waveform, n_fft, hop)[:, :-1]
    mel = jnp.einsum("btf,fm->btm", power, mel_filterbank(n_mels, n_fft, sample_rate, max_frequency))
    level = jnp.log10(jnp.maximum(mel, 1e-10))
    level = jnp.maximum(level, jnp.max(level, axis=(1, 2), keepdims=True) - 8.0)
    return (level + 4.0) / 4.0


class AudioTransformer(nn.Module):
    """Transformer on log-mel frames: waveform float[B, S] in [-1, 1] -> (float[B, T, D], out).

    T = S / hop / frames tokens: each takes `frames` spectrogram frames (a strided convolution over time). `item_shape`
    is (num_samples,); another length raises `UserError`. out["log_mel"]: float[B, S / hop, n_mels]; out["layers"].
    """

    num_samples: int = 1024
    sample_rate: int = 8000
    n_fft: int = 256
    hop: int = 128
    n_mels: int = 32
    frames: int = 2
    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int]:
        return (self.num_samples,)

    @property
    def num_tokens(self) -> int:
        return self.num_samples // self.hop // self.frames

    @nn.compact
    def __call__(self, waveform: jax.Array, *, train: bool):
        check_item(self, waveform)
        spectrogram = log_mel(
            waveform, sample_rate=self.sample_rate, n_fft=self.n_fft, hop=self.hop, n_mels=self.n_mels
        )
        x = spectrogram[:, : self.num_tokens * self.frames].astype(jnp.dtype(self.dtype))
        x = nn.Conv(
            self.width, (self.frames,), strides=(self.frames,), padding="VALID", dtype=self.dtype, name="frames"
        )(x)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.num_tokens, self.width))
        x = x + positions[None].astype(x.dtype)
        x, out = Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(x, train=train)
        return x, {**out, "log_mel": spectrogram}
