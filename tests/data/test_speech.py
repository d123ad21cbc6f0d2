"""Synthesised digits, and sounds as images."""

import numpy as np
import pytest

from vfm.data.speech import PHONES, WORDS, Spectrograms, Speech, resonance
from vfm.errors import UserError
from vfm.evaluate.judge import Judge

SIZES = {"train": 20, "validation": 10, "test": 10}


def test_an_item_is_a_function_of_seed_split_and_number():
    first, again, other = (Speech("train", sizes=SIZES, seed=seed, cache=False) for seed in (0, 0, 1))
    test = Speech("test", sizes=SIZES)
    for i in (0, 9, 13):
        audio = first[i]["audio"]
        assert audio.shape == (4800,) and audio.dtype == np.float32 and 0.1 < np.abs(audio).max() < 0.8
        assert first[i]["label"] == i % 10 == first.labels[i]
        np.testing.assert_array_equal(audio, again[i]["audio"])
        assert np.abs(audio - other[i]["audio"]).max() > 0.05
    assert np.abs(first[3]["audio"] - first[13]["audio"]).max() > 0.05  # the same word, another voice
    assert np.abs(first[3]["audio"] - test[3]["audio"]).max() > 0.05


def test_words_are_made_of_known_phones():
    assert len(WORDS) == 10 and {name for _, word in WORDS for name in word.split()} == set(PHONES)


def test_resonance_peaks_at_the_formants():
    frequency = np.arange(50.0, 3500.0, 5.0)[None]
    gain = resonance(frequency, np.array([[500.0, 1500.0, 2500.0]]))[0]
    peaks = frequency[0, 1:-1][(gain[1:-1] > gain[:-2]) & (gain[1:-1] > gain[2:])]
    np.testing.assert_allclose(peaks, (500, 1500, 2500), atol=20)  # each pulls its neighbours a little


def test_voiced_and_unvoiced_words_differ_in_their_spectra():
    """An s hisses above 2 kHz, which a nasal does not."""
    source = Speech("train", sizes=SIZES, snr_db=(60.0, 60.0), cache=False)

    def share(index):
        power = np.square(np.abs(np.fft.rfft(source[index]["audio"])))
        return power[len(power) // 2 :].sum() / power.sum()  # above 2 kHz

    assert max(share(1), share(11)) < 0.02 < min(share(6), share(16))  # one, six


class Tone:
    labels = np.array([7, 7])

    def __init__(self, split, hertz=1000.0):
        self.audio = np.sin(2 * np.pi * hertz / 8000 * np.arange(4800)).astype(np.float32)
        self.audio[:2400] *= 0.1  # 20 dB less

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"audio": self.audio, "label": 7}


def test_a_tone_is_a_line_whose_brightness_is_its_level():
    found = Spectrograms("train", {"name": f"{__name__}.Tone"}, range_db=50.0, hop=150, n_mels=32)[0]
    image = found["image"][..., 0]
    assert image.shape == (32, 32) and found["label"] == 7 and image.max() == 1 and image.min() == 0
    assert len(set(image[4:12].argmax(axis=1)) | set(image[20:28].argmax(axis=1))) == 1
    np.testing.assert_allclose(image[4:12].max(axis=1), 1 - 20 / 50, atol=0.01)
    np.testing.assert_allclose(image[20:28].max(axis=1), 1, atol=0.01)


def test_a_picture_of_a_sound_can_be_heard():
    """The picture of the sound that is made of a picture is that picture again, nearly."""
    source = Spectrograms("test", {"name": "speech", "sizes": {"test": 2}})
    image = source[0]["image"]
    sound = source.sound(image)
    assert sound.shape == (32 * 150,) and np.abs(sound).max() == pytest.approx(1)
    away = lambda other: np.abs(source._image(np.asarray(other, np.float64)) - image).mean()
    assert away(sound) < 0.04 < 0.08 < away(sound[::-1])


@pytest.mark.slow
def test_a_classifier_understands_the_words():
    train, test = (
        Spectrograms(split, {"name": "speech", "sizes": {split: size}})
        for split, size in (("train", 600), ("test", 200))
    )
    stack = lambda source: np.stack([source[i]["image"] for i in range(len(source))])
    assert Judge(stack(train), train.labels).accuracy(stack(test), test.labels) > 0.9


@pytest.mark.parametrize(
    "changes, message", [({"sample_rate": 4000}, "at least 8000"), ({"duration": 0.1}, "at least 0.2")]
)
def test_bad_fields_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Speech("train", **changes)


def test_spectrograms_need_sounds():
    with pytest.raises(UserError, match="needs a source with audio, not one with image, label"):
        Spectrograms("test", {"name": "digits"})[0]
