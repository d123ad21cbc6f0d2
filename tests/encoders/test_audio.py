import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import tree
from vfm.encoders import AudioTransformer
from vfm.encoders.audio import hz_to_mel, log_mel, mel_filterbank, mel_to_hz, power_spectrogram
from vfm.errors import UserError

FUNCTIONS = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions"
FIXTURE = FUNCTIONS / "mel_spectrogram" / "io.npz"
needs_fixture = pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
RATE = 8000


@needs_fixture
def test_spectrogram_equals_the_reference_library():
    io = np.load(FIXTURE)
    found = jax.jit(lambda wave: power_spectrogram(wave, 256, 80))(io["in/wave"][None])
    np.testing.assert_allclose(found[0].T, np.abs(io["out/torch_stft"]) ** 2, rtol=1e-3, atol=1e-4)


@needs_fixture
def test_filters_equal_the_reference_libraries():
    io = np.load(FIXTURE)
    found = {"librosa_mel_filters_slaney": mel_filterbank(20, 256, RATE).T,
             "whisper_mel_filters": mel_filterbank(20, 200, RATE, max_frequency=8000)}  # fmt: skip
    for name, filters in found.items():
        np.testing.assert_allclose(filters, io[f"out/{name}"], atol=1e-7, err_msg=name)


@needs_fixture
def test_log_mel_equals_the_reference_library():
    """It pads the sound to its chunk, of one second here, and its filters end at 8 kHz whatever the rate."""
    io = np.load(FIXTURE)
    wave = np.pad(io["in/wave"], (0, RATE - len(io["in/wave"])))[None]
    options = dict(sample_rate=RATE, n_fft=200, hop=80, n_mels=20, max_frequency=8000)
    found = jax.jit(lambda wave: log_mel(wave, **options))(wave)
    assert found.shape == (1, 100, 20)
    np.testing.assert_allclose(found[0].T, io["out/whisper_log_mel"], rtol=1e-3, atol=1e-4)


def test_mel_scale():
    hz = np.array([0.0, 440.0, 999.0, 1000.0, 1001.0, 3999.0])
    np.testing.assert_allclose(mel_to_hz(hz_to_mel(hz)), hz, rtol=1e-12)
    assert hz_to_mel(1000.0) == 15 and hz_to_mel(200.0) == 3
    assert hz_to_mel(6400.0) == pytest.approx(42)  # 27 steps for a factor of 6.4
    filters = mel_filterbank(40, 512, RATE)
    assert (filters >= 0).all() and (filters.max(axis=0) > 0).all()
    np.testing.assert_allclose(filters.sum(axis=0) * RATE / 512, 1, atol=0.12)  # unit area


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


def test_tokens_stand_in_the_order_of_time():
    model = AudioTransformer(num_samples=2048, n_fft=128, hop=128, frames=4, depth=1)
    assert (model.item_shape, model.num_tokens) == ((2048,), 4)
    wave = 0.01 * jax.random.normal(jax.random.key(0), (1, 2048))
    params = jax.jit(lambda key: model.init(key, wave, train=False)["params"])(jax.random.key(1))
    bare = tree.unflatten({path: 0 * leaf if path.endswith(("out/kernel", "down/kernel")) else leaf
                           for path, leaf in tree.flatten(params).items()})  # fmt: skip
    run = jax.jit(lambda wave: model.apply({"params": bare}, wave, train=False))
    # A click at sample 1280 lies in the spectrogram's frame 10, of the third token, and in no other token's.
    (y, out), (loud, after) = run(wave), run(wave.at[:, 1280].add(0.05))
    assert y.shape == (1, 4, 32) and out["log_mel"].shape == (1, 16, 32)
    assert int(jnp.abs(after["log_mel"] - out["log_mel"]).max(axis=(0, 2)).argmax()) == 10
    np.testing.assert_array_equal(np.flatnonzero(jnp.abs(loud - y).max(axis=(0, 2))), [2])


def test_wrong_lengths_are_refused():
    with pytest.raises(UserError, match=r"AudioTransformer takes items of shape \(1024,\), not \(1000,\)"):
        AudioTransformer().init(jax.random.key(0), jnp.zeros((2, 1000)), train=False)
