"""Data preparation: JSON lines in, clean, deduplicated and split JSON lines out, with a data card.

collect → normalise → clean → exact and near deduplication → label noise → split → leak check; `prepare` runs them all,
`check` looks for leaks between splits that exist. `words`, `sentences` and `scripts` cut text in any language.
"""

from vfm.data.prepare.leaks import Leaks
from vfm.data.prepare.normalise import normalise
from vfm.data.prepare.options import Options
from vfm.data.prepare.pipeline import check, prepare
from vfm.data.prepare.segment import scripts, sentences, words

__all__ = ["Leaks", "Options", "check", "normalise", "prepare", "scripts", "sentences", "words"]
