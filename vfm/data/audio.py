"""Audio sources: DTMF keypad tones, and folders of wav files."""

import math
import pathlib
import struct
from collections.abc import Mapping

import numpy as np

from vfm.data.records import CorruptRecord, class_files
from vfm.data.synthetic import SyntheticDigits
from vfm.errors import UserError

# ITU-T Q.23, figure 1: (low group, high group) in Hz for the keys 0–9.
DTMF_HZ = (
    (941, 1336),
    (697, 1209), (697, 1336), (697, 1477),
    (770, 1209), (770, 1336), (770, 1477),
    (852, 1209), (852, 1336), (852, 1477),
)  # fmt: skip

FASTEST = 1_000_000  # Hz of a wav file; beyond it the header is damaged


class Dtmf(SyntheticDigits):
    """Dual-tone multi-frequency signals of the keypad's digits, as a telephone line would carry them.

    duration: length of the window in seconds. tone: range of the tone's length in seconds; it begins anywhere
    in the window where it fits. level_db: range of the low-group tone's amplitude, dB relative to full scale.
    twist_db: range of high-group minus low-group amplitude, dB. snr_db: range of the ratio of the power of
    the two tones to that of white Gaussian noise (over the whole window), dB. Phases are uniform. sizes:
    items per split. cache: keep items in memory once they are made.
    Item i of a split is a pure function of (seed, split, i): audio float32[samples] in [-1, 1], label = i %
    10.
    Raises UserError when a tone does not fit into the window, or the sample rate is too low for 1477 Hz.
    Source: ITU-T Recommendation Q.23 (11/88), "Technical features of push-button telephone sets"; the default
    tone length is above the 40 ms that ITU-T Q.24 (11/88) demands at least.
    """

    name = "dtmf"

    def __init__(
        self,
        split: str,
        sample_rate: int = 8000,
        duration: float = 0.5,
        tone: tuple[float, float] = (0.15, 0.35),
        level_db: tuple[float, float] = (-24.0, -9.0),
        twist_db: tuple[float, float] = (-3.0, 3.0),
        snr_db: tuple[float, float] = (5.0, 25.0),
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        cache: bool = False,
    ):
        super().__init__(split, sample_rate, duration, sizes, seed, cache)
        if not 0 < tone[0] <= tone[1] <= duration:
            raise UserError(f"source 'dtmf': tone={tuple(tone)} s must be a range within duration={duration} s")
        if self.sample_rate <= 2 * 1477:
            raise UserError(f"source 'dtmf': sample_rate={sample_rate} is too low for 1477 Hz (use 8000)")
        self.ranges = tuple(tone), tuple(level_db), tuple(twist_db), tuple(snr_db)

    def make(self, label: int, rng: np.random.Generator) -> np.ndarray:
        tone, level, twist, snr = (low + (high - low) * rng.random() for low, high in self.ranges)
        count = min(round(tone * self.sample_rate), self.samples)
        onset = int(rng.integers(0, self.samples - count + 1))
        low = 10 ** (level / 20)
        high = low * 10 ** (twist / 20)
        time = np.arange(count, dtype=np.float32)
        pair = np.zeros((count,), np.float32)
        for amplitude, hertz in zip((low, high), DTMF_HZ[label]):
            phase = rng.random() * 2 * math.pi
            step = np.float32(2 * math.pi * hertz / self.sample_rate)
            pair += np.float32(amplitude) * np.sin(step * time + np.float32(phase))
        noise = math.sqrt((low**2 + high**2) / 2 * 10 ** (-snr / 10))
        audio = rng.standard_normal(self.samples, dtype=np.float32)
        audio *= np.float32(noise)
        audio[onset : onset + count] += pair
        return np.clip(audio, -1.0, 1.0, out=audio)


class AudioFolder:
    """Wav files in class sub-folders: dir/<split>/<class>/<file>, or dir/<class>/<file> with `fractions`.

    sample_rate: target rate in Hz (polyphase resampling). samples: fixed length (padded with zeros or cut at
    the end); 0 keeps each file's own. fractions, classes: as in `ImageFolder`.
    Item: audio float32[samples] in [-1, 1], mono, label int. A file that cannot be read raises CorruptRecord.
    """

    def __init__(
        self,
        split: str,
        dir: str,
        sample_rate: int = 16000,
        samples: int = 0,
        classes: tuple[str, ...] = (),
        fractions: Mapping[str, float] | None = None,
    ):
        self.sample_rate, self.samples = int(sample_rate), int(samples)
        self.paths, self.labels, self.class_names = class_files(
            "source 'audio_folder'", dir, split, (".wav",), classes, fractions
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        audio = read_audio(self.paths[index], self.sample_rate, self.samples)
        return {"audio": audio, "label": int(self.labels[index])}


def read_audio(path: str | pathlib.Path, sample_rate: int, samples: int) -> np.ndarray:
    """float32[samples] in [-1, 1] of a wav file: mono, at `sample_rate`, padded or cut (0: its own length)."""
    audio, rate = read_wav(path)
    return fit(resample(audio.mean(axis=1, dtype=np.float32), rate, sample_rate), samples)


def fit(audio: np.ndarray, samples: int) -> np.ndarray:
    """audio[T, …] padded with zeros, or cut, at the end to `samples`; 0 leaves it."""
    if not samples or len(audio) == samples:
        return audio
    out = np.zeros((samples, *audio.shape[1:]), audio.dtype)
    out[: min(samples, len(audio))] = audio[:samples]
    return out


def resample(audio: np.ndarray, rate: int, target: int) -> np.ndarray:
    """audio float32[T] at another rate, by a polyphase filter."""
    if rate == target:
        return audio
    from scipy.signal import resample_poly

    divisor = math.gcd(rate, target)
    return resample_poly(audio, target // divisor, rate // divisor).astype(np.float32)


def read_wav(path: str | pathlib.Path) -> tuple[np.ndarray, int]:
    """(float32[T, channels] in [-1, 1], sample rate) of a wav file: PCM of 8, 16, 24, 32 bits, or float.

    Unlike the standard library's `wave` it reads float and extensible formats and sees a truncated file.
    Source: Multimedia Programming Interface and Data Specifications 1.0 (IBM, Microsoft 1991), RIFF WAVE.
    """

    def broken(why: str) -> CorruptRecord:
        return CorruptRecord(f"wav file {str(path)!r}: {why}")

    try:
        raw = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise broken(str(error)) from error
    if raw[:4] != b"RIFF" or raw[8:12] != b"WAVE":
        raise broken("not a RIFF WAVE file")
    form, at = None, 12
    while at + 8 <= len(raw):
        tag, size = raw[at : at + 4], struct.unpack_from("<I", raw, at + 4)[0]
        body = raw[at + 8 : at + 8 + size]
        if len(body) < size:
            raise broken(f"truncated: chunk {tag.decode('latin-1')!r} has {len(body)} of {size} bytes")
        if tag == b"fmt ":
            if size < 16:
                raise broken(f"format chunk of {size} bytes")
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
            if kind == 0xFFFE and size >= 26:  # extensible: the real format opens the sub-format's GUID
                kind = struct.unpack_from("<H", body, 24)[0]
            form = kind, channels, rate, bits
        elif tag == b"data":
            if form is None:
                raise broken("data before the format chunk")
            break
        at += 8 + size + size % 2
    else:
        raise broken("truncated: no data chunk")
    kind, channels, rate, bits = form
    width = bits // 8
    formats = (1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)
    if (kind, bits) not in formats or not channels or not 0 < rate <= FASTEST:
        raise broken(f"format {kind} with {bits} bits, {channels} channels, {rate} Hz is not supported")
    if len(body) % (width * channels):
        raise broken(f"{len(body)} bytes of data are not a whole number of {width * channels}-byte frames")
    if kind == 3:
        audio = np.frombuffer(body, f"<f{width}").astype(np.float32)
    elif bits == 8:  # unsigned by definition
        audio = (np.frombuffer(body, np.uint8).astype(np.float32) - 128) / 128
    else:  # the sample's bytes go to the top of an int32, so that the sign is right for 24 bits too
        wide = np.zeros((len(body) // width, 4), np.uint8)
        wide[:, 4 - width :] = np.frombuffer(body, np.uint8).reshape(-1, width)
        audio = wide.view("<i4")[:, 0].astype(np.float32) / 2.0**31
    return audio.reshape(-1, channels).astype(np.float32), rate
