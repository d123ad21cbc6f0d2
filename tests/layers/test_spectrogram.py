import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.errors import UserError
from vfm.layers.spectrogram import (
    cut,
    decibels,
    fbank,
    hz_to_mel,
    log_mel,
    mask_spectrogram,
    mel_filterbank,
    mel_power,
    mel_to_hz,
    power_spectrogram,
)
from vfm.parity import transformers_audio as audio

FUNCTIONS = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions"
FIXTURE = FUNCTIONS / "mel_spectrogram" / "io.npz"
needs_fixture = pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
RATE = 8000


@needs_fixture
@pytest.mark.parametrize("library, edges", [("torch", "reflect"), ("librosa", "constant")])
def test_spectrogram_equals_the_reference_libraries(library, edges):
    io = np.load(FIXTURE)
    found = jax.jit(lambda wave: power_spectrogram(wave, 256, 80, edges))(io["in/wave"][None])
    np.testing.assert_allclose(found[0].T, np.abs(io[f"out/{library}_stft"]) ** 2, rtol=1e-3, atol=1e-4)


@needs_fixture
def test_filters_equal_the_reference_libraries():
    io = np.load(FIXTURE)
    found = {"librosa_mel_filters_slaney": mel_filterbank(20, 256, RATE).T,
             "librosa_mel_filters_htk_nonorm": mel_filterbank(20, 256, RATE, scale="htk", unit_area=False).T,
             "whisper_mel_filters": mel_filterbank(20, 200, RATE, max_frequency=8000)}  # fmt: skip
    for name, filters in found.items():
        np.testing.assert_allclose(filters, io[f"out/{name}"], atol=1e-7, err_msg=name)


@needs_fixture
def test_mel_power_and_decibels_equal_the_reference_library():
    io = np.load(FIXTURE)
    power = power_spectrogram(io["in/wave"][None], 256, 80, "constant")
    mel = mel_power(power, mel_filterbank(20, 256, RATE))
    np.testing.assert_allclose(mel[0].T, io["out/librosa_melspectrogram"], rtol=1e-3, atol=1e-4)
    level = io["out/librosa_power_to_db"]
    np.testing.assert_allclose(decibels(mel)[0].T - decibels(mel).max(), level - level.max(), rtol=1e-3, atol=1e-4)


@needs_fixture
def test_log_mel_equals_the_reference_library():
    """It pads the sound to its chunk, of one second here, and its filters end at 8 kHz whatever the rate."""
    io = np.load(FIXTURE)
    wave = np.pad(io["in/wave"], (0, RATE - len(io["in/wave"])))[None]
    options = dict(sample_rate=RATE, n_fft=200, hop=80, n_mels=20, max_frequency=8000)
    found = jax.jit(lambda wave: log_mel(wave, **options))(wave)
    assert found.shape == (1, 100, 20)
    np.testing.assert_allclose(found[0].T, io["out/whisper_log_mel"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("front_end", [audio.whisper_log_mel, audio.ast_fbank])
def test_front_ends_equal_those_of_the_published_models(front_end):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    assert front_end() < 1e-4


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_mel_scale(scale):
    hz = np.array([0.0, 440.0, 999.0, 1000.0, 1001.0, 3999.0])
    np.testing.assert_allclose(mel_to_hz(hz_to_mel(hz, scale), scale), hz, rtol=1e-12)
    filters = mel_filterbank(40, 512, RATE, scale=scale)
    assert (filters >= 0).all() and (filters.max(axis=0) > 0).all()
    np.testing.assert_allclose(filters.sum(axis=0) * RATE / 512, 1, atol=0.12)  # unit area
    if scale == "slaney":
        assert hz_to_mel(1000.0) == 15 and hz_to_mel(200.0) == 3
        assert hz_to_mel(6400.0) == pytest.approx(42)  # 27 steps for a factor of 6.4
    else:
        assert hz_to_mel(700.0, "htk") == pytest.approx(2595 * np.log10(2))
    with pytest.raises(UserError, match="unknown scale 'bark'.*slaney"):
        mel_filterbank(40, 512, RATE, scale="bark")


def test_a_tone_peaks_in_its_mel_bin():
    n_mels = 32
    tones = mel_to_hz(np.linspace(0, hz_to_mel(RATE / 2), n_mels + 2))[1:-1]
    waves = np.sin(2 * np.pi * tones[:, None] * np.arange(2048) / RATE)
    found = log_mel(jnp.asarray(waves), sample_rate=RATE, n_fft=512, hop=128, n_mels=n_mels)
    assert found.shape == (n_mels, 16, n_mels)
    np.testing.assert_array_equal(found[:, 8].argmax(axis=-1), np.arange(n_mels))
    assert float((found.max(axis=(1, 2)) - found.min(axis=(1, 2))).max()) <= 2.0 + 1e-6  # 8 decades / 4


def test_louder_is_only_brighter():
    wave = jax.random.normal(jax.random.key(0), (1, 2048)) * 0.01
    options = dict(sample_rate=RATE, n_fft=256, hop=128, n_mels=16)
    soft, loud = log_mel(wave, **options), log_mel(10 * wave, **options)
    np.testing.assert_allclose(loud - soft, jnp.full_like(loud, 0.5), atol=1e-4)  # 20 dB: two decades / 4


@pytest.mark.parametrize(
    "front_end",
    [
        lambda wave: log_mel(wave, sample_rate=RATE, n_fft=256, hop=128, n_mels=16),
        lambda wave: fbank(wave, sample_rate=RATE, n_mels=16),
    ],
    ids=["log_mel", "fbank"],
)
def test_silence_is_finite(front_end):
    wave = jnp.zeros((1, 1024))
    value, gradient = jax.value_and_grad(lambda wave: front_end(wave).sum())(wave)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_frames_are_cut_within_the_sound():
    frames = cut(jnp.arange(10.0)[None], 4, 3)
    np.testing.assert_array_equal(frames[0], [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])


def test_masks_hide_bands_of_time_and_of_frequency():
    B, T, F = 512, 40, 20
    spectrogram = jax.random.normal(jax.random.key(0), (B, T, F)) + 3
    mean = spectrogram.mean(axis=(1, 2), keepdims=True)
    widths = {}
    for name, axis in (("time", 2), ("mel", 1)):
        found = mask_spectrogram(jax.random.key(1), spectrogram, **{name: 0.25}, count=1)
        hidden = np.asarray(found != spectrogram)
        np.testing.assert_allclose(jnp.where(hidden, found, mean), jnp.broadcast_to(mean, found.shape), rtol=1e-6)
        band = hidden.any(axis=axis)
        np.testing.assert_array_equal(hidden, np.broadcast_to(np.expand_dims(band, axis), hidden.shape))
        widths[name] = band.sum(axis=1)
        size, starts = band.shape[1], band.argmax(axis=1)
        for row, width, start in zip(band, widths[name], starts):  # one band each
            assert row[start : start + width].all()
        assert widths[name].max() == size // 4 and widths[name].min() == 0
        assert band.any(axis=0).all()  # anywhere
    both = mask_spectrogram(jax.random.key(2), spectrogram, time=0.25, mel=0.25, count=3)
    assert 0.2 < float((both != spectrogram).mean()) < 0.7
    np.testing.assert_array_equal(mask_spectrogram(jax.random.key(2), spectrogram), spectrogram)
