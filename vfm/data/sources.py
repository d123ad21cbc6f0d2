"""Sources: random-access sequences of records.

A source has `len(source)` and `source[i] -> dict` (arrays, text, `label`), and `labels` int32[n] (or None),
which is known without decoding any record; a label of -1 marks a record that could not be read while
indexing.
A damaged record raises `CorruptRecord`.
"""

from vfm.data.arrays import Npz
from vfm.data.audio import AudioFolder, Dtmf
from vfm.data.construct import construct
from vfm.data.documents import Jsonl, Stdlib
from vfm.data.image import Digits, ImageFolder
from vfm.data.tfds import Tfds

SOURCES = {
    "audio_folder": AudioFolder,
    "digits": Digits,
    "dtmf": Dtmf,
    "image_folder": ImageFolder,
    "jsonl": Jsonl,
    "npz": Npz,
    "stdlib": Stdlib,
    "tfds": Tfds,
}


def build_source(cfg, split: str):
    """One split of the source that `cfg.name` names; an unknown name, field or split raises UserError."""
    return construct("source", SOURCES, cfg, split=split)
