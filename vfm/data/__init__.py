"""Data: sources (records) → data sets (rows) → pipeline (batches), all pure functions of seed and index."""

import inspect

from vfm.data.aligned import Composed, Records
from vfm.data.construct import construct, plain
from vfm.data.fused import Matching, Parity
from vfm.data.in_context import InContext
from vfm.data.items import Items
from vfm.data.mixture import Mixture
from vfm.data.pairs import Pairs
from vfm.data.pipeline import Pipeline, eval_batches
from vfm.data.questions import Questions
from vfm.data.sources import fields, texts
from vfm.data.subset import Subset
from vfm.data.text import Text
from vfm.data.visual import VisualSentences
from vfm.data.waveform import Waveform
from vfm.errors import unknown

__all__ = [
    "DATASETS",
    "Composed",
    "InContext",
    "Items",
    "Matching",
    "Mixture",
    "Pairs",
    "Parity",
    "Pipeline",
    "Questions",
    "Records",
    "Subset",
    "Text",
    "VisualSentences",
    "Waveform",
    "blank",
    "build",
    "eval_batches",
    "fields",
    "texts",
]

DATASETS = {
    "composed": Composed,
    "in_context": InContext,
    "items": Items,
    "matching": Matching,
    "mixture": Mixture,
    "pairs": Pairs,
    "parity": Parity,
    "questions": Questions,
    "records": Records,
    "subset": Subset,
    "text": Text,
    "visual_sentences": VisualSentences,
    "waveform": Waveform,
}


def build(cfg, split: str, *, layout, tokenizer, skip_corrupt: bool = False, **overrides):
    """One split of the data set that `cfg.name` names.

    layout: `interleave.Layout` of the model. skip_corrupt: for the data sets that read all records to plan
    their rows; the others leave it to the pipeline. overrides: arguments that no config sets, such as
    task="image->text", answer=False, train=False of `Pairs`.
    """
    kind = DATASETS.get(cfg.get("name"))
    if kind is not None and "skip_corrupt" in inspect.signature(kind).parameters:
        overrides["skip_corrupt"] = skip_corrupt
    return construct("dataset", DATASETS, cfg, split=split, layout=layout, tokenizer=tokenizer, **overrides)


def blank(cfg, *, layout, tokenizer) -> dict:
    """A row of zeros with the arrays of the data set that `cfg.name` names; nothing is read."""
    if cfg.get("name") not in DATASETS:
        raise unknown("dataset", cfg.get("name"), DATASETS)
    return DATASETS[cfg["name"]].blank(plain(cfg), layout, tokenizer)
