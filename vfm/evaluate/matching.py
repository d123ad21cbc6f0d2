"""A fusion encoder as a scorer of pairs: how likely do two items belong together?"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vfm import flops
from vfm import model as model_lib
from vfm.data.pipeline import stack
from vfm.errors import UserError
from vfm.evaluate import Evaluation, fewest, options
from vfm.evaluate.retrieval import hit_rate, query_flops, ranks, reader, recall_table
from vfm.objectives.matching import check_pairs, match, read_items

OPTIONS = {"k": (1, 5, 10)}


def check_matching(experiment) -> None:
    """Refuses a model that cannot say whether two items match, and data without pairs."""
    options(experiment, "matching", OPTIONS)
    check_pairs(experiment.model, "the evaluator 'matching'")
    if "pairs" not in experiment.config.data:
        raise UserError("the evaluator 'matching' needs data with pairs, such as config.data.name='composed'")


def matching(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Retrieval by a fusion encoder, among the same items as in `retrieval`: of the rows of a split (or `limit`), one
    item of each modality.

      r{k}_{A}_{B}    share of items of A for which a row's own item of B is among the k best matches of all
      query_flops     see `retrieval.query_flops`; a candidate costs a pass of both items' features through the backbone

    Items are encoded once; every pair of them goes through the backbone, as the pair was shown in training. Options in
    config.eval.matching: k.
    """
    k, model, dataset = options(experiment, "matching", OPTIONS)["k"], experiment.model, experiment.dataset(split)
    read = item_reader(model)
    found = reader(experiment, read)(params, variables, dataset, fewest(limit, len(dataset)))
    items = {name: (x, found["real"][name]) for name, x in found["features"].items()}
    shown = {frozenset(pair): pair for pair in dataset.pairs}
    count, measured, costs = len(next(iter(found["raw"].values()))), {}, []
    for names in itertools.combinations(items, 2):
        a, b = pair = shown.get(frozenset(names), names)
        score = experiment.jit(functools.partial(pair_scores, model, pair))
        scores = experiment.fetch(score({"params": params, **variables}, items[a], items[b]))
        same = found["label"][a][:, None] == found["label"][b][None]
        for x, y, table, relevant in ((a, b, scores, same), (b, a, scores.T, same.T)):
            place = ranks(table, relevant)
            measured |= {f"r{n}_{x}_{y}": hit_rate(place, n) for n in k}
        one = lambda item: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), item)
        variable = {"params": experiment.abstract_state.params, **experiment.abstract_state.variables}
        costs.append(flops.count(functools.partial(pair_scores, model, pair), variable, one(items[a]), one(items[b])))
    measured["query_flops"] = query_flops(experiment, read, float(np.mean(costs)), count)
    return Evaluation(measured, {"retrieval": recall_table(tuple(items), dataset.pairs, k, measured, count)})


def item_reader(model):
    """(params, variables, {X: items [B, …]}) -> {"features", "real": {X: [B, P, …]}}: what the backbone reads."""

    def read(params, variables, items):
        run = nn.apply(lambda model, items: read_items(model, items, train=False), model)
        found = run({"params": params, **variables}, items)
        return {kind: {name: item[i] for name, item in found.items()} for i, kind in enumerate(("features", "real"))}

    return read


def pair_scores(model, pair: tuple[str, str], variables, x, y) -> jax.Array:
    """float32[n, m]: `objectives.matching.match` of each of n items x of pair[0] with each of m items y of pair[1], as
    `read_items` gives them; one x at a time with all y."""

    def one(x):
        alike = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (y[0].shape[0], *leaf.shape)), x)
        return nn.apply(lambda model: match(model, pair, alike, y, train=False), model)(variables)

    return jax.lax.map(one, x)


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
