"""Spectrograms back to sounds: inverse STFT, Griffin–Lim, and magnitudes from mel powers."""

import jax
import jax.numpy as jnp
import numpy as np

from vfm.errors import UserError, unknown
from vfm.layers.spectrogram import hann, mel_filterbank, stft

METHODS = ("nnls", "pseudo_inverse")


def istft(spectrum: jax.Array, hop: int, length: int | None = None) -> jax.Array:
    """Inverse of `stft`: complex64[B, T, n_fft / 2 + 1] -> float32[B, length], by default (T - 1) · hop samples.

    Of a spectrum that is no STFT of a sound it gives the sound with the nearest STFT in the squared error (Griffin &
    Lim 1984, eq. 6). Raises `UserError` for a hop or a length that leaves samples without a frame.
    """
    B, T, F = spectrum.shape
    n_fft = 2 * (F - 1)
    length = (T - 1) * hop if length is None else length
    window = hann(n_fft)
    frames = jnp.fft.irfft(spectrum, n_fft) * window[None, None]
    kept = slice(n_fft // 2, n_fft // 2 + length)
    weight = _overlap_add(np.broadcast_to(np.square(window), (1, T, n_fft)), hop, np)[:, kept]
    if weight.shape[1] < length or weight.min(initial=1.0) < 1e-6:
        raise UserError(
            f"istft: {T} frames of {n_fft} samples every {hop} do not cover {length} samples; take a hop of at most "
            f"{n_fft // 2}, and a length of at most {(T - 1) * hop + min(hop, n_fft // 2)}"
        )
    return _overlap_add(frames, hop, jnp)[:, kept] / weight


def _overlap_add(frames, hop: int, lib):
    """Frames [B, T, n] added up, one every `hop` samples: [B, at least (T - 1) · hop + n]."""
    B, T, n = frames.shape
    parts = -(-n // hop)
    pieces = lib.pad(frames, ((0, 0), (0, 0), (0, parts * hop - n))).reshape(B, T, parts, hop)
    # Part p of frame t belongs to block t + p; sums of shifted arrays are quicker than a scatter.
    blocks = sum(lib.pad(pieces[:, :, p], ((0, 0), (p, parts - 1 - p), (0, 0))) for p in range(parts))
    return blocks.reshape(B, (T + parts - 1) * hop)


def griffin_lim(
    magnitude: jax.Array,
    *,
    hop: int,
    rng: jax.Array,
    steps: int = 32,
    momentum: float = 0.99,
    length: int | None = None,
    edges: str = "reflect",
) -> tuple[jax.Array, dict]:
    """A sound whose |STFT| is near the magnitudes float[B, T, n_fft / 2 + 1]: (float32[B, length], out).

    The phases start at random and are those of the nearest sound after each of the `steps`. momentum: 0 is Griffin &
    Lim (1984); more is the fast variant (Perraudin et al. 2013, algorithm 2), whose error may rise for a while.
    length, edges: see `istft` and `stft`. out["error"] float32[steps, B]: ‖|STFT| - magnitude‖ / ‖magnitude‖ (spectral
    convergence) of the sound before each step. With edges="constant" and no momentum it never rises.
    """
    if steps < 1 or not 0 <= momentum < 1:
        raise UserError(f"griffin_lim: steps={steps} must be at least 1, and momentum={momentum} from 0 to below 1")
    magnitude = magnitude.astype(jnp.float32)
    B, T, F = magnitude.shape
    n_fft = 2 * (F - 1)
    length = (T - 1) * hop if length is None else length
    if 1 + length // hop != T:
        raise UserError(f"griffin_lim: {length} samples have {1 + length // hop} frames every {hop}, not {T}")
    # All bins but the first and the last stand for two of the whole spectrum.
    twice = np.full((1, 1, F), 2.0, np.float32)
    twice[..., [0, -1]] = 1.0
    norm = lambda x: jnp.sqrt((twice * jnp.square(x)).sum(axis=(1, 2)))

    def with_magnitude(c):
        size = jnp.abs(c)
        return magnitude * jnp.where(size > 0, c / jnp.where(size > 0, size, 1.0), 1.0)

    def step(carry, _):
        c, before = carry
        consistent = stft(istft(with_magnitude(c), hop, length), n_fft, hop, edges)
        error = norm(jnp.abs(consistent) - magnitude) / jnp.maximum(norm(magnitude), 1e-12)
        return (consistent + momentum * (consistent - before), consistent), error

    phase = jax.random.uniform(rng, magnitude.shape, maxval=2 * np.pi)
    start = jax.lax.complex(jnp.cos(phase), jnp.sin(phase))
    consistent = stft(istft(with_magnitude(start), hop, length), n_fft, hop, edges)
    (c, _), error = jax.lax.scan(step, (consistent, consistent), length=steps)
    return istft(with_magnitude(c), hop, length), {"error": error}


def mel_to_power(mel: jax.Array, filters: np.ndarray, method: str = "nnls", steps: int = 100) -> jax.Array:
    """Powers of the bins whose power in each filter is given: float[B, T, n_mels] -> float32[B, T, n_fft / 2 + 1].

    filters: float[n_fft / 2 + 1, n_mels] (see `mel_filterbank`). "pseudo_inverse": the solution of least norm, and zero
    where it is negative. "nnls": from there so many steps of accelerated projected gradient towards non-negative least
    squares (Beck & Teboulle 2009), which fits the given powers more closely.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS, "mel_to_power")
    mel = mel.astype(jnp.float32)
    wide = np.asarray(filters, np.float64)
    x = jnp.maximum(jnp.einsum("btm,mf->btf", mel, np.linalg.pinv(wide).astype(np.float32)), 0.0)
    if method == "pseudo_inverse":
        return x
    rate = np.float32(1.0 / np.linalg.norm(wide, 2) ** 2)

    def step(carry, k):
        x, y = carry
        residual = jnp.einsum("btf,fm->btm", y, filters) - mel
        new = jnp.maximum(y - rate * jnp.einsum("btm,fm->btf", residual, filters), 0.0)
        return (new, new + k / (k + 3.0) * (new - x)), None

    return jax.lax.scan(step, (x, x), jnp.arange(steps, dtype=jnp.float32))[0][0]


def log_mel_to_waveform(
    spectrogram: jax.Array,
    *,
    sample_rate: int,
    n_fft: int,
    hop: int,
    rng: jax.Array,
    max_frequency: float | None = None,
    method: str = "nnls",
    steps: int = 32,
    momentum: float = 0.99,
) -> jax.Array:
    """Inverse of `log_mel`, as far as there is one: float[B, T, n_mels] -> float32[B, T · hop].

    The arguments are those of `log_mel`, `mel_to_power` and `griffin_lim`. Phases, and what the filters do not tell
    apart, are made up; levels that `log_mel` cut are at its floor.
    """
    filters = mel_filterbank(spectrogram.shape[2], n_fft, sample_rate, max_frequency)
    mel = 10.0 ** (4.0 * spectrogram.astype(jnp.float32) - 4.0)
    # `log_mel` drops the frame at the very end of the sound.
    mel = jnp.concatenate([mel, mel[:, -1:]], axis=1)
    magnitude = jnp.sqrt(mel_to_power(mel, filters, method))
    return griffin_lim(magnitude, hop=hop, rng=rng, steps=steps, momentum=momentum)[0]
