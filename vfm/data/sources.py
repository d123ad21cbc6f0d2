"""Sources: random-access sequences of records.

A source has `len(source)` and `source[i] -> dict` (arrays, text, `label`), and `labels` int32[n] (or None),
which is known without decoding any record; a label of -1 marks a record that could not be read while
indexing.
A damaged record raises `CorruptRecord`.
"""

from collections.abc import Iterator
from typing import Any

from vfm.data.arithmetic import Addition, Modular, Relations
from vfm.data.arrays import Npz
from vfm.data.audio import AudioFolder, Dtmf
from vfm.data.construct import construct
from vfm.data.documents import Jsonl, Stdlib
from vfm.data.edges import Edges
from vfm.data.image import Digits, ImageFolder
from vfm.data.logs import Logs
from vfm.data.patterns import Functions, Lookup, Repeated
from vfm.data.records import CorruptRecord
from vfm.data.shapes import Shapes
from vfm.data.speech import Spectrograms, Speech
from vfm.data.task_families import TaskFamilies
from vfm.data.tfds import Tfds
from vfm.errors import UserError

SOURCES = {
    "addition": Addition,
    "audio_folder": AudioFolder,
    "digits": Digits,
    "dtmf": Dtmf,
    "edges": Edges,
    "functions": Functions,
    "image_folder": ImageFolder,
    "jsonl": Jsonl,
    "logs": Logs,
    "lookup": Lookup,
    "modular": Modular,
    "npz": Npz,
    "relations": Relations,
    "repeated": Repeated,
    "shapes": Shapes,
    "spectrograms": Spectrograms,
    "speech": Speech,
    "stdlib": Stdlib,
    "task_families": TaskFamilies,
    "tfds": Tfds,
}


def texts(cfg, split: str, skipped: list[str] | None = None) -> Iterator[str]:
    """The texts of one split of a source, in order: see `fields`."""
    return fields(cfg, split, "text", skipped)


def fields(cfg, split: str, name: str, skipped: list[str] | None = None) -> Iterator[Any]:
    """The field `name` of every record of one split of a source, in order.

    A damaged record raises CorruptRecord; where there is a list `skipped`, its message goes there instead. Raises
    UserError for a source without the field.
    """
    records = build_source(cfg, split)
    for index in range(len(records)):
        try:
            item = records[index]
        except CorruptRecord as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        if name not in item:
            raise UserError(f"source {cfg['name']!r} gives {', '.join(sorted(item))}, no {name!r}")
        yield item[name]


def build_source(cfg, split: str):
    """One split of the source that `cfg.name` names; an unknown name, field or split raises UserError."""
    return construct("source", SOURCES, cfg, split=split)
