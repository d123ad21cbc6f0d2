"""Spectrograms back to sounds: exact where there is an inverse, never worse where there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.signal

from vfm.errors import UserError
from vfm.layers.griffin_lim import griffin_lim, istft, log_mel_to_waveform, mel_to_power
from vfm.layers.spectrogram import log_mel, mel_filterbank, mel_power, power_spectrogram, stft

RATE, FFT, HOP = 8000, 256, 64


def sound(length=1000, rows=2, seed=0):
    """Tones that glide, with some noise."""
    rng, time = np.random.default_rng(seed), np.arange(length) / RATE
    glide = [np.sin(2 * np.pi * (300 * (r + 1) * time + 400 * time**2)) for r in range(rows)]
    return jnp.asarray(np.stack(glide) + 0.1 * rng.normal(size=(rows, length)), jnp.float32)


@pytest.mark.parametrize("length, hop, edges", [(1000, 64, "reflect"), (1024, 64, "constant"), (1000, 100, "reflect")])
def test_the_inverse_gives_back_the_sound(length, hop, edges):
    x = sound(length)
    found = jax.jit(lambda x: istft(stft(x, FFT, hop, edges), hop, length))(x)
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_the_inverse_equals_that_of_scipy_on_any_spectrum():
    rng = np.random.default_rng(1)
    spectrum = (rng.normal(size=(2, 17, FFT // 2 + 1)) + 1j * rng.normal(size=(2, 17, FFT // 2 + 1))).astype(
        np.complex64
    )
    found = istft(jnp.asarray(spectrum), HOP)
    window = scipy.signal.get_window("hann", FFT)
    # It divides its STFT by the sum of the window.
    _, wanted = scipy.signal.istft(
        spectrum / window.sum(), RATE, window, FFT, FFT - HOP, time_axis=1, freq_axis=2, boundary=True
    )
    np.testing.assert_allclose(found, wanted[:, : found.shape[1]], atol=1e-5)
    assert found.shape == (2, 16 * HOP)


def test_frames_that_do_not_cover_the_sound_are_refused():
    spectrum = stft(sound(), FFT, HOP)
    with pytest.raises(UserError, match="hop of at most 128"):
        istft(spectrum, 256)
    with pytest.raises(UserError, match="do not cover 5000 samples"):
        istft(spectrum, HOP, 5000)
    with pytest.raises(UserError, match="17 frames every 64, not 16"):
        griffin_lim(jnp.abs(spectrum), hop=HOP, rng=jax.random.key(0), length=1024)


def test_the_plain_variant_never_gets_worse_and_the_fast_one_gets_further():
    x = sound(1024)
    magnitude = jnp.abs(stft(x, FFT, HOP, "constant"))
    errors = {}
    for momentum in (0.0, 0.99):
        run = jax.jit(functools.partial(griffin_lim, hop=HOP, steps=60, momentum=momentum, edges="constant"))
        found, out = run(magnitude, rng=jax.random.key(0))
        errors[momentum] = np.asarray(out["error"])
        final = jnp.abs(stft(found, FFT, HOP, "constant"))
        assert found.shape == x.shape
        assert np.linalg.norm(final - magnitude) / np.linalg.norm(magnitude) < errors[momentum][0].max() / 2
    assert (np.diff(errors[0.0], axis=0) <= 1e-6).all()
    assert (errors[0.0][-1] < errors[0.0][0] / 2).all()
    assert (errors[0.99][-1] < 0.8 * errors[0.0][-1]).all()


def test_silence_stays_silent():
    x = jnp.zeros((1, 1024))
    run = jax.jit(lambda x: griffin_lim(jnp.abs(stft(x, FFT, HOP)), hop=HOP, rng=jax.random.key(0), steps=2))
    found, out = run(x)
    assert not np.asarray(found).any() and np.isfinite(out["error"]).all()


def test_powers_of_mels_are_those_of_non_negative_least_squares():
    filters = mel_filterbank(12, 64, RATE)
    mel = np.random.default_rng(0).gamma(0.5, size=(1, 4, 12)).astype(np.float32)  # no sound has such powers
    left = {}
    for method in ("pseudo_inverse", "nnls"):
        power = np.asarray(mel_to_power(jnp.asarray(mel), filters, method, steps=500))
        assert (power >= 0).all()
        left[method] = np.linalg.norm(power[0] @ filters - mel[0], axis=-1)
    best = [scipy.optimize.nnls(filters.T.astype(np.float64), frame)[1] for frame in mel[0]]
    np.testing.assert_allclose(left["nnls"], best, atol=1e-3)
    assert (left["pseudo_inverse"] > left["nnls"] + 1e-3).all()


@pytest.mark.parametrize("method, within", [("nnls", 0.01), ("pseudo_inverse", 0.15)])
def test_mel_powers_of_a_sound_are_found_again(method, within):
    filters = mel_filterbank(40, FFT, RATE)
    mel = mel_power(power_spectrogram(sound(), FFT, HOP), filters)
    again = mel_power(mel_to_power(mel, filters, method), filters)
    assert np.linalg.norm(again - mel) < within * np.linalg.norm(mel)


@pytest.mark.parametrize("frequency", [440.0, 1234.0])
def test_a_tone_keeps_its_frequency(frequency):
    """Through a log-mel spectrogram: within one bin of the STFT, and at its level."""
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(2048) / RATE)[None].astype(np.float32)
    fields = dict(sample_rate=RATE, n_fft=FFT, hop=HOP)
    back = jax.jit(functools.partial(log_mel_to_waveform, **fields))(
        log_mel(jnp.asarray(wave), n_mels=40, **fields), rng=jax.random.key(0)
    )
    assert back.shape == wave.shape
    middle = np.asarray(back[0, 256:-256])
    peak = np.abs(np.fft.rfft(middle * np.hanning(len(middle)))).argmax() * RATE / len(middle)
    assert abs(peak - frequency) < RATE / FFT
    assert 0.5 < np.sqrt(np.mean(middle**2)) / np.sqrt(np.mean(wave**2)) < 1.5


def test_unknown_methods_are_refused():
    with pytest.raises(UserError, match="pseudo_inverse"):
        mel_to_power(jnp.ones((1, 2, 12)), mel_filterbank(12, 64, RATE), "exact")
    with pytest.raises(UserError, match="momentum=1.0"):
        griffin_lim(jnp.ones((1, 2, 9)), hop=8, rng=jax.random.key(0), momentum=1.0)
