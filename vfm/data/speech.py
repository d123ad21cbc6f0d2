"""Words of the ten digits, spoken by a small synthesiser: a source of speech that needs no recordings."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from vfm.data.synthetic import SyntheticDigits
from vfm.errors import UserError


class Phone(NamedTuple):
    """What the vocal tract aims at: formants in Hz, loudness of the voice and of the noise, and Hz of the noise."""

    seconds: float
    formants: tuple[float, float, float]
    voice: float = 1.0
    noise: float = 0.0
    noise_hz: float = 4000.0


# Vowels: means of the men in Peterson & Barney 1952, table II. Consonants: near the targets of Klatt 1980, table III,
# rounded; in a stop the voice pauses before a burst.
PHONES = {
    "i": Phone(0.10, (270, 2290, 3010)),
    "ih": Phone(0.08, (390, 1990, 2550)),
    "eh": Phone(0.10, (530, 1840, 2480)),
    "uh": Phone(0.09, (640, 1190, 2390)),
    "a": Phone(0.10, (730, 1090, 2440)),
    "ao": Phone(0.11, (570, 840, 2410)),
    "u": Phone(0.12, (300, 870, 2240)),
    "er": Phone(0.10, (490, 1350, 1690)),
    "w": Phone(0.06, (290, 610, 2150), 0.6),
    "r": Phone(0.06, (310, 1060, 1380), 0.6),
    "n": Phone(0.08, (250, 1340, 2470), 0.4),
    "v": Phone(0.06, (220, 1100, 2080), 0.4, 0.10, 2500.0),
    "z": Phone(0.09, (240, 1390, 2530), 0.3, 0.35, 3600.0),
    "s": Phone(0.11, (320, 1390, 2530), 0.0, 0.5, 3700.0),
    "f": Phone(0.10, (340, 1100, 2080), 0.0, 0.25, 2200.0),
    "th": Phone(0.10, (320, 1290, 2540), 0.0, 0.15, 3000.0),
    "-": Phone(0.04, (350, 1500, 2500), 0.0, 0.0),
    "t": Phone(0.03, (400, 1600, 2600), 0.0, 0.6, 3400.0),
    "k": Phone(0.03, (300, 1990, 2850), 0.0, 0.5, 1900.0),
}
WORDS = (
    ("zero", "z i r ao u"),
    ("one", "w uh n"),
    ("two", "- t u"),
    ("three", "th r i"),
    ("four", "f ao er"),
    ("five", "f a ih v"),
    ("six", "s ih - k s"),
    ("seven", "s eh v uh n"),
    ("eight", "eh ih - t"),
    ("nine", "n a ih n"),
)
BANDWIDTHS = (60.0, 90.0, 150.0)  # of the formants, in Hz
FRAME = 0.005  # seconds between two settings of the vocal tract


class Speech(SyntheticDigits):
    """The digits "zero" to "nine", spoken with a voice of its own in every item, in noise.

    Voiced sound is a sum of harmonics, noise is filtered; both follow the formants of a list of phones (`PHONES`).
    A voice has a pitch, a length of the vocal tract that scales all formants, a speed, and a loudness; every phone is
    spoken a little differently.
    duration: length of the window in seconds; a word begins anywhere where it fits, and one that is too slow is sped
    up. pitch: range of the mean fundamental in Hz. tract: range of the factor of the formants. speed: range.
    snr_db: range of the power of the word over that of white noise. sizes: items per split. cache: keep items in
    memory once they are made.
    Item i of a split is a pure function of (seed, split, i): audio float32[samples] in [-1, 1], label = i % 10.
    It is a caricature: intelligible to a model, not pleasant.
    Sources: Peterson & Barney 1952; Klatt 1980, "Software for a cascade/parallel formant synthesizer".
    """

    name = "speech"

    def __init__(
        self,
        split: str,
        sample_rate: int = 8000,
        duration: float = 0.6,
        pitch: tuple[float, float] = (90.0, 240.0),
        tract: tuple[float, float] = (0.9, 1.2),
        speed: tuple[float, float] = (0.8, 1.25),
        snr_db: tuple[float, float] = (15.0, 35.0),
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        cache: bool = True,
    ):
        super().__init__(split, sample_rate, duration, sizes, seed, cache)
        if sample_rate < 8000:
            raise UserError(f"source 'speech': sample_rate={sample_rate} must be at least 8000, for the hiss of an s")
        if duration < 0.2:
            raise UserError(f"source 'speech': duration={duration} s must be at least 0.2, for a word")
        self.ranges = tuple(pitch), tuple(tract), tuple(speed), tuple(snr_db)

    def make(self, label: int, rng: np.random.Generator) -> np.ndarray:
        pitch, tract, speed, snr = (low + (high - low) * rng.random() for low, high in self.ranges)
        word = self._word(WORDS[label][1].split(), pitch, tract, speed, rng)
        onset = int(rng.integers(0, self.samples - len(word) + 1))
        noise = np.sqrt(np.square(word).mean()) * 10 ** (-snr / 20)
        audio = noise * rng.standard_normal(self.samples)
        audio[onset : onset + len(word)] += word
        peak = 10 ** (-(3 + 15 * rng.random()) / 20)  # 3 to 18 dB below full scale
        return (audio * peak / np.abs(audio).max()).astype(np.float32)

    def _word(self, names: list[str], pitch, tract, speed, rng) -> np.ndarray:
        phones = [PHONES[name] for name in names]
        lengths = np.array([phone.seconds * np.exp(0.1 * rng.standard_normal()) for phone in phones]) / speed
        lengths *= min(1.0, 0.9 * self.samples / self.sample_rate / lengths.sum())
        # Targets hold in the middle of the phones; on the way from one to the next all goes in straight lines.
        edges = np.concatenate([[0], np.cumsum(lengths)])
        middle, frames = (edges[1:] + edges[:-1]) / 2, np.arange(0, edges[-1], FRAME)
        between = lambda values: np.interp(frames, middle, values)
        vary = np.exp(0.03 * rng.standard_normal((len(phones), 3)))
        formants = np.stack([between([p.formants[k] * v[k] for p, v in zip(phones, vary)]) for k in range(3)], axis=1)
        formants *= tract
        fade = np.clip(np.minimum(frames, edges[-1] - frames) / 0.02, 0, 1)
        voice, noise = between([p.voice for p in phones]) * fade, between([p.noise for p in phones]) * fade
        hiss = between([min(p.noise_hz * tract, 0.47 * self.sample_rate) for p in phones])
        time = np.arange(int(edges[-1] * self.sample_rate)) / self.sample_rate
        fall = pitch * (1.08 - 0.2 * time / edges[-1]) * (1 + 0.02 * np.sin(2 * np.pi * (5 * time + rng.random())))
        phase = 2 * np.pi * np.cumsum(fall) / self.sample_rate
        sound = self._harmonics(time, frames, phase, pitch, formants, voice, rng)
        return sound + self._hiss(time, frames, hiss, noise, rng)

    def _harmonics(self, time, frames, phase, pitch, formants, voice, rng) -> np.ndarray:
        """Harmonics k · f0 below half of the sample rate, falling by 12 dB an octave, through the formants."""
        k = np.arange(1, max(2, int(0.46 * self.sample_rate / pitch)))
        gain = resonance(k[None] * pitch, formants) * voice[:, None] / k[None]
        amplitude = np.stack([np.interp(time, frames, column) for column in gain.T])
        start = 2 * np.pi * rng.random((len(k), 1))
        return (amplitude * np.sin(k[:, None] * phase[None] + start)).sum(axis=0)

    def _hiss(self, time, frames, centre, loudness, rng) -> np.ndarray:
        """Noise in a band, in overlapping windows of 10 ms."""
        size = 2 * int(FRAME * self.sample_rate)
        frequency = np.fft.rfftfreq(size, 1 / self.sample_rate)[None]
        band = np.exp(-np.square((frequency - centre[:, None]) / 700)) * loudness[:, None]
        grains = np.fft.irfft(np.fft.rfft(rng.standard_normal((len(frames), size))) * band) * np.hanning(size)
        out = np.zeros(len(time) + 2 * size)
        for i, grain in enumerate(grains):
            out[i * size // 2 : i * size // 2 + size] += grain
        return out[: len(time)]


def resonance(frequency: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """|H| of a chain of resonators at frequencies [1 | T, K] in Hz for formants [T, 3] -> [T, K]; 1 at 0 Hz
    (Fant 1960, section 1.3)."""
    gain = np.ones((len(formants), frequency.shape[1]))
    for centre, width in zip(formants.T[..., None], BANDWIDTHS):
        centre_squared = centre**2 + (width / 2) ** 2
        beside = (width / 2) ** 2 + np.square(frequency - centre)
        gain = gain * centre_squared / np.sqrt(beside * ((width / 2) ** 2 + np.square(frequency + centre)))
    return gain


class Spectrograms:
    """The sounds of another source as images: log-mel spectrograms float32[frames, n_mels, 1] in [0, 1].

    source: a source config whose items have `audio` float[samples] of one length. 1 is the loudest place of an item, 0
    is `range_db` below it and less; frame t is centred on sample t · hop, and the last, incomplete one is left out.
    """

    def __init__(
        self,
        split: str,
        source: Mapping,
        sample_rate: int = 8000,
        n_fft: int = 256,
        hop: int = 150,
        n_mels: int = 32,
        range_db: float = 50.0,
    ):
        from vfm.data.sources import build_source  # which has this source in its table
        from vfm.layers.spectrogram import mel_filterbank

        self.source = build_source(source, split)
        self.labels = getattr(self.source, "labels", None)
        self.class_names = getattr(self.source, "class_names", ())
        self.sample_rate, self.n_fft, self.hop, self.range_db = sample_rate, n_fft, hop, range_db
        self.filters = mel_filterbank(n_mels, n_fft, sample_rate)
        self.window = np.hanning(n_fft + 1)[:-1]
        self._cache: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        if index not in self._cache:
            record = self.source[index]
            if "audio" not in record:
                raise UserError(f"source 'spectrograms' needs a source with audio, not one with {', '.join(record)}")
            self._cache[index] = self._image(np.asarray(record["audio"], np.float64))
        found = {"image": self._cache[index]}
        return found if self.labels is None else found | {"label": int(self.labels[index])}

    def sound(self, image: np.ndarray) -> np.ndarray:
        """A sound float32[frames · hop] with such a spectrogram, as far as there is one: phases, and what the mel bands
        do not tell apart, are made up (see `griffin_lim`). Its highest amplitude is 1."""
        audio = np.asarray(self._invert(np.clip(image[None, ..., 0], 0, 1).astype(np.float32)))[0]
        return audio / max(float(np.abs(audio).max()), 1e-12)

    @functools.cached_property
    def _invert(self) -> Callable:
        import jax
        import jax.numpy as jnp

        from vfm.layers.griffin_lim import griffin_lim, mel_to_power

        @jax.jit
        def invert(levels):
            mel = 10.0 ** ((levels - 1) * self.range_db / 10)
            mel = jnp.concatenate([mel, mel[:, -1:]], axis=1)  # a frame for the incomplete one
            magnitude = jnp.sqrt(mel_to_power(mel, self.filters))
            return griffin_lim(magnitude, hop=self.hop, rng=jax.random.key(0), edges="constant")[0]

        return invert

    def _image(self, audio: np.ndarray) -> np.ndarray:
        padded = np.pad(audio, self.n_fft // 2)
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop][: len(audio) // self.hop]
        power = np.square(np.abs(np.fft.rfft(frames * self.window))) @ self.filters
        decibels = 10 * np.log10(np.maximum(power, 1e-12))
        level = 1 + (decibels - decibels.max()) / self.range_db
        return np.clip(level, 0, 1)[..., None].astype(np.float32)
