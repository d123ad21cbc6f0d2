"""Matching by a fusion encoder: two items are read together, and told from two that do not belong together.

The model has encoders, a backbone over the features of both items, and a decoder of labels, `label`, with two classes:
no match and match. An item is encoded once, however many others it is read with.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm import metrics
from vfm.data.aligned import parse_pairs, slots
from vfm.errors import UserError, unknown
from vfm.objectives import Aux, LossFn
from vfm.objectives.contrastive import NEVER, check_paired, paired_items
from vfm.objectives.next_token import MUTABLE, rngs
from vfm.wiring import reads_two

Item = tuple[jax.Array, jax.Array]  # features float[B, P, D], and which of them are real, bool[B, P]


def check_pairs(model, where: str) -> None:
    """Refuses a model that cannot read two items together and say whether they match."""
    if model.backbone is None or model.backbone.kind != "encoder_only":
        raise UserError(f"{where} needs a backbone that reads both items: encoder_only or cross_encoder")
    if "label" not in model.decoders or model.decoders["label"].num_classes != 2:
        raise UserError(f"{where} needs model.decoders.label with num_classes=2: no match, and match")
    for name, encoder in model.encoders.items():
        if not encoder.item_shape:
            raise UserError(
                f"{where}: model.encoders.{name} ({type(encoder).__name__}) reads one token, but whole items are "
                "paired; for text, 'text_transformer'"
            )
    types = model.backbone.num_token_types
    if types and (types < len(model.encoders) or reads_two(model.backbone)):
        raise UserError(
            f"{where}: model.backbone.num_token_types={types} must be 0, or with encoder_only one for each of the "
            f"{len(model.encoders)} modalities"
        )


def read_items(model, inputs, *, train: bool) -> dict[str, Item]:
    """Items {X: [B, *item_shape]} as the backbone reads them. model: bound, as in `nn.apply`."""
    found = {}
    for name, items in inputs.items():
        x, _ = model.encoders[name](items, train=train)
        real = jnp.ones(x.shape[:2], bool)
        if getattr(model.encoders[name], "pad_id", None) is not None and items.shape == x.shape[:2]:
            real = jnp.asarray(items) != model.encoders[name].pad_id
        if name in model.input_projectors:
            x, _ = model.input_projectors[name](x, train=train)
            if x.shape[1] != real.shape[1]:  # a number of its own, such as a resampler's
                real = jnp.ones(x.shape[:2], bool)
        found[name] = x, real
    return found


def match(model, pair: tuple[str, str], x: Item, y: Item, *, train: bool) -> jax.Array:
    """log p(match) - log p(no match), float32[B], of items x of pair[0] and y of pair[1], row by row.

    encoder_only: the features stand one after the other in a sequence, each with the token type of its modality, if
    there are token types; cross_encoder: y asks, and x answers. model: bound, as in `nn.apply`.
    """
    if reads_two(model.backbone):
        real = y[1]
        x, _ = model.backbone(x[0], input_mask=x[1], decoder_x=y[0], decoder_mask=real, train=train)
    else:
        real, call = jnp.concatenate([x[1], y[1]], axis=1), {}
        if model.backbone.num_token_types:
            places = [sorted(model.encoders).index(name) for name in pair]
            lengths = jnp.asarray([x[0].shape[1], y[0].shape[1]])
            types = jnp.repeat(jnp.asarray(places, jnp.int32), lengths, total_repeat_length=real.shape[1])
            call["token_types"] = jnp.broadcast_to(types[None], real.shape)
        x = jnp.concatenate([x[0], y[0].astype(x[0].dtype)], axis=1)
        x, _ = model.backbone(x, input_mask=real, **call, train=train)
    logits, _ = model.decoders["label"](x, input_mask=real, train=train)
    logits = logits.astype(jnp.float32)
    return logits[:, 1] - logits[:, 0]


def matching(
    model,
    *,
    pairs: tuple[str, ...],
    negatives: int = 1,
    candidates: int = 0,
    same_label: str = "negative",
) -> LossFn:
    """A row's own two items shall match better than those of different rows do; one term per pair, in nats.

    The score of two items is log p(match) - log p(no match), as in image–text matching (VL-BERT, UNITER, ALBEF). But it
    is trained to rank, as retrieval needs it: the loss is the mean of softplus(score(x, y') - score(x, y)) and
    softplus(score(x, y') - score(x', y')), over y' of `negatives` other rows for each row's x (RankNet, Burges et al.
    2005, eq. 3). So it orders pairs, and is no probability.

    pairs: as in `contrastive`. candidates: the other rows are drawn from so many random ones, or all that there are,
    with probabilities that grow with exp(score(x, y')) (hard negatives; in ALBEF, Li et al. 2021, section 3.2, by the
    scores of another part of the model); 0: all are drawn at random. same_label: rows with an equal `label` are
    "negative"s of each other, or are "ignored".

    Metrics: hits_A-B, the share of rows whose x matches their own y better than all of these y'.
    """
    where = "config.objective: matching"
    check_pairs(model, where)
    parsed = parse_pairs(pairs, model.encoders, where)
    check_paired(model, parsed, where)
    if negatives < 1 or (candidates and candidates < negatives):
        raise UserError(
            f"{where}: negatives={negatives} must be at least 1, and candidates={candidates} 0 or no fewer than these"
        )
    if same_label not in ("negative", "ignored"):
        raise unknown("same_label", same_label, ("negative", "ignored"), where)

    def compare(model, pair, x, y, mask, groups, rng, train):
        """Scores float32[B, 1 + N] of each row's x with its own y and those of N other rows; the numbers int32[B, N] of
        these; and which of them count."""
        B = mask.shape[0]
        drawn = min(candidates or negatives, B - 1)

        def score(rows, train):
            first = jax.tree.map(lambda leaf: leaf.repeat(rows.shape[1], axis=0), x)
            second = jax.tree.map(lambda leaf: leaf[rows.reshape(-1)], y)
            return match(model, pair, first, second, train=train).reshape(rows.shape)

        own = jnp.arange(B)[:, None]
        rows = (own + 1 + jax.random.choice(rng, B - 1, (1, drawn), replace=False)) % B
        counts = mask[rows] if groups is None else mask[rows] & (groups[rows] != groups[:, None])
        if drawn > negatives:
            # The largest of logits with Gumbel noise are draws without replacement.
            noise = jax.random.gumbel(jax.random.fold_in(rng, 1), rows.shape)
            noisy = jnp.where(counts, jax.lax.stop_gradient(score(rows, False)) + noise, NEVER)
            hard = jax.lax.top_k(noisy, negatives)[1]
            rows, counts = jnp.take_along_axis(rows, hard, axis=1), jnp.take_along_axis(counts, hard, axis=1)
        return score(jnp.concatenate([own, rows], axis=1), train), rows, counts

    def compare_all(model, inputs, mask, labels, rng, train):
        """`compare` for each pair of modalities."""
        B = mask.shape[0]
        if negatives >= B:
            raise UserError(f"{where}: in a batch of {B} rows none has {negatives} others")
        read = read_items(model, {name: x.reshape(-1, *x.shape[2:]) for name, x in inputs.items()}, train=train)
        item = lambda name, i: jax.tree.map(lambda leaf: leaf.reshape(B, -1, *leaf.shape[1:])[:, i], read[name])
        found = []
        for k, (pair, places) in enumerate(zip(parsed, slots(parsed))):
            groups = labels if labels is None or labels.ndim == 1 else labels[:, k]
            x, y = map(item, pair, places)
            found.append(compare(model, pair, x, y, mask, groups, jax.random.fold_in(rng, k), train))
        return found

    def loss_fn(params, variables, batch, rng, *, train: bool):
        inputs = paired_items(batch, parsed, where)
        if same_label == "ignored" and "label" not in batch:
            raise UserError(f"{where}: same_label='ignored' needs batches with a label")
        labels = jnp.asarray(batch["label"]) if same_label == "ignored" else None  # int[B], or int[B, P], of each pair
        mask = jnp.asarray(batch.get("example_mask", jnp.ones(next(iter(inputs.values())).shape[0])), jnp.float32)
        mutable = [name for name in MUTABLE if train and name in variables]
        run = nn.apply(lambda model: compare_all(model, inputs, mask > 0, labels, rng, train), model, mutable=mutable)
        found, changed = run({"params": params, **variables}, rngs=rngs(rng))
        terms, measured = {}, {}
        for pair, (scores, rows, counts) in zip(parsed, found):
            name, own, wrong = "-".join(pair), scores[:, :1], scores[:, 1:]
            loss = (jax.nn.softplus(wrong - own) + jax.nn.softplus(wrong - own[rows, 0])) / 2
            terms[name] = (1.0, *metrics.mean(loss, counts * mask[:, None]))
            hits = own[:, 0] > jnp.where(counts, wrong, NEVER).max(axis=1)
            measured[f"hits_{name}"] = metrics.mean(hits.astype(jnp.float32), mask)
        return terms, Aux(measured, {**variables, **changed})

    loss_fn.whole_batch = "takes the items that do not match from other rows of a batch, and micro-batches have fewer"
    return loss_fn
