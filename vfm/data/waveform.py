"""Sound as tokens: the samples of a waveform, one by one."""

from collections.abc import Mapping

import numpy as np

from vfm.data.interleave import Layout, Text, interleave
from vfm.data.records import CorruptRecord
from vfm.data.sources import build_source
from vfm.errors import UserError
from vfm.tokenizers.byte import ByteTokenizer

MU = 255


def mu_law(audio: np.ndarray) -> np.ndarray:
    """uint8 codes of samples float in [-1, 1]: the companding of ITU-T G.711, continuous, in 256 steps, as WaveNet has
    it (van den Oord et al. 2016, section 2.2)."""
    audio = np.clip(np.asarray(audio, np.float64), -1, 1)
    companded = np.sign(audio) * np.log1p(MU * np.abs(audio)) / np.log1p(MU)
    return np.floor((companded + 1) / 2 * MU + 0.5).astype(np.uint8)


class Waveform:
    """Rows <bos> codes: windows of the mu-law codes of sounds, each code a byte of the tokenizer, and each predicted.

    source: config of a source whose items have `audio` float[samples] in [-1, 1], all of one length, such as "speech",
    or "tfds" with `samples`. A row holds length - 1 samples; those of an item follow each other, and what is left over
    at its end is no row.
    Raises UserError for another tokenizer than "byte", and for sounds shorter than a row; a sound of another length, or
    with numbers that are not finite, raises CorruptRecord.
    """

    keys = frozenset()

    def __init__(self, source: Mapping, *, split: str, layout: Layout, tokenizer):
        if not isinstance(tokenizer, ByteTokenizer):
            raise UserError("dataset 'waveform' needs config.tokenizer.name=byte: a code is a byte")
        self.layout, self.tokenizer, self.window = layout, tokenizer, layout.length - 1
        self.source = build_source(source, split)
        self.samples = self._first_length()
        self.rows = self.samples // max(self.window, 1)
        if not self.window or not self.rows:
            raise UserError(
                f"dataset 'waveform': a row of config.data.length={layout.length} holds {self.window} samples; the "
                f"sounds have {self.samples}"
            )

    def _first_length(self) -> int:
        """Samples of the first sound that can be read."""
        for index in range(len(self.source)):
            try:
                return len(self._audio(index, None))
            except CorruptRecord as error:
                last = error
        raise UserError(f"dataset 'waveform': no sound of the source can be read: {last}")

    def _audio(self, index: int, samples: int | None) -> np.ndarray:
        item = self.source[index]
        if "audio" not in item:
            raise UserError(f"dataset 'waveform': the source gives {', '.join(sorted(item))}, no 'audio'")
        audio = np.asarray(item["audio"])
        if audio.ndim != 1 or samples not in (None, len(audio)) or not np.isfinite(audio).all():
            raise CorruptRecord(f"sound {index} of the source has shape {audio.shape}, or numbers that are not finite; "
                                f"rows need {samples} samples")  # fmt: skip
        return audio

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        return interleave([], layout, tokenizer)

    def __len__(self) -> int:
        return len(self.source) * self.rows

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """Row `index`: tokens, targets, loss_mask, input_mask."""
        item, row = divmod(index, self.rows)
        audio = self._audio(item, self.samples)[row * self.window : (row + 1) * self.window]
        ids = self.tokenizer.encode(mu_law(audio).tobytes())
        return interleave([Text([self.tokenizer.bos_id]), Text(ids, target=True)], self.layout, self.tokenizer)
