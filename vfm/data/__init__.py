"""Data: sources (records) → data sets (rows) → pipeline (batches), all pure functions of seed and index."""

from vfm.data.construct import construct
from vfm.data.mixture import Mixture
from vfm.data.pairs import Pairs
from vfm.data.pipeline import Pipeline, eval_batches
from vfm.data.text import Text

__all__ = ["DATASETS", "Mixture", "Pairs", "Pipeline", "Text", "build", "eval_batches"]

DATASETS = {"mixture": Mixture, "pairs": Pairs, "text": Text}


def build(cfg, split: str, *, layout, tokenizer, **overrides):
    """One split of the data set that `cfg.name` names.

    layout: `interleave.Layout` of the model. overrides: arguments that no config sets, such as
    task="image->text", answer=False, train=False of `Pairs`.
    """
    return construct("dataset", DATASETS, cfg, split=split, layout=layout, tokenizer=tokenizer, **overrides)
