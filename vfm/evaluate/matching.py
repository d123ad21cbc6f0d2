"""A fusion encoder as a scorer of pairs: how likely do two items belong together?"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vfm import model as model_lib
from vfm.data.pipeline import stack


def match_scores(
    model,
    variables: Mapping[str, Any],
    row: Callable[[int, int], Mapping],
    num_queries: int,
    num_candidates: int,
    *,
    batch_size: int = 256,
) -> np.ndarray:
    """float32[n, m]: log p(match) - log p(no match) of query i and candidate j, by the model's decoder `label`.

    row: (i, j) -> the arrays of the row that shows both, without a leading axis, such as `Fused.row` gives; arrays that
    the model does not read are left out. Every pair goes through the whole model, n · m rows in batches of batch_size
    (the last one is filled): a fusion encoder has no embeddings to compare. The score ranks the pairs, for retrieval.
    """
    total = num_queries * num_candidates
    batch_size = min(batch_size, total)
    scores = np.empty(total, np.float32)
    for begin in range(0, total, batch_size or 1):
        pairs = np.arange(begin, begin + batch_size) % total
        rows = [row(int(pair // num_candidates), int(pair % num_candidates)) for pair in pairs]
        batch = stack([{name: found[name] for name in model_lib.INPUTS if name in found} for found in rows])
        found = np.asarray(_scores(model, variables, batch))
        scores[begin : begin + batch_size] = found[: total - begin]
    return scores.reshape(num_queries, num_candidates)


@functools.partial(jax.jit, static_argnums=0)
def _scores(model, variables, batch):
    _, out = model.apply(variables, **batch, train=False)
    logits = out["label"]["logits"].astype("float32")
    return logits[:, 1] - logits[:, 0]
