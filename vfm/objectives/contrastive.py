"""Contrastive alignment of any modalities: InfoNCE and sigmoid losses, momentum encoders with queues, gradient caching.

A pair of modalities "image-text" takes one item of each from every row; rows are the examples that are told apart. With
several pairs (survey section 1.3, bridging: ImageBind, CoDi) each has items of its own: the k-th pair that names a
modality takes the k-th of its items in the row.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vfm import metrics
from vfm.data.aligned import parse_pairs, slots
from vfm.errors import UserError, unknown
from vfm.objectives import Aux, LossFn
from vfm.objectives.next_token import MUTABLE, rngs

LOSSES = ("infonce", "sigmoid")
NEVER = -1e30  # the logit of an embedding that is none


def infonce(
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None = None,
    *,
    groups: jax.Array | None = None,
    chunks: int = 1,
    keys: tuple[jax.Array, jax.Array] | None = None,
    queues: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each row's partner among all rows (CLIP, Radford et al. 2021, figure 3), and hits.

    float32[B] twice: the loss is the mean of both ways, a -> b and b -> a, and a hit the share of them in which the
    partner is nearest.
    a, b: float[B, E] of unit length; under data parallelism they are global arrays, so that the negatives are those of
    all devices. mask: [B], rows that count, as examples and as negatives. groups: int[B], rows of one group are no
    negatives of each other. chunks: the rows are compared in so many parts, which must divide B, one after the other:
    memory is B²/chunks.
    keys: other embeddings (of a, of b) that rows are compared with (momentum encoders: MoCo, He et al. 2020). queues:
    earlier keys (of a, of b) float[Q, E], negatives too (BriVL, Huo et al. 2021); rows that are all zero are none.
    """
    B = a.shape[0]
    mask = jnp.ones((B,), bool) if mask is None else mask > 0
    key_a, key_b = keys or (a, b)
    queue_a, queue_b = queues or (None, None)

    def one_way(x, keys, queue):
        def part(index, x):
            logits = jnp.where(_negatives(index, mask, groups), scale * x @ keys.T, NEVER)
            true = jnp.take_along_axis(logits, index[:, None], axis=1)[:, 0]
            if queue is not None:
                earlier = jnp.where(jnp.any(queue != 0, axis=-1)[None], scale * x @ queue.T, NEVER)
                logits = jnp.concatenate([logits, earlier], axis=1)
            nearest = true >= jax.lax.stop_gradient(logits).max(axis=1)
            return jax.nn.logsumexp(logits, axis=1) - true, nearest.astype(jnp.float32)

        return _in_parts(part, chunks, x)

    (there, hits), (back, hits_back) = one_way(a, key_b, queue_b), one_way(b, key_a, queue_a)
    return (there + back) / 2, (hits + hits_back) / 2


def sigmoid(
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mask: jax.Array | None = None,
    *,
    groups: jax.Array | None = None,
    chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Each pair of rows told apart from the others by itself (SigLIP, Zhai et al. 2023, eq. 1), and hits a -> b.

    float32[B] twice; arguments as in `infonce`.
    """
    B = a.shape[0]
    mask = jnp.ones((B,), bool) if mask is None else mask > 0

    def part(index, x):
        logits = scale * x @ b.T + bias
        own = index[:, None] == jnp.arange(B)[None]
        counts = _negatives(index, mask, groups)
        loss = -jnp.where(counts, jax.nn.log_sigmoid(jnp.where(own, logits, -logits)), 0.0).sum(axis=1)
        nearest = jnp.where(own, logits, NEVER).max(axis=1) >= jnp.where(counts, logits, NEVER).max(axis=1)
        return loss, nearest.astype(jnp.float32)

    return _in_parts(part, chunks, a)


def _negatives(index, mask, groups):
    """bool[b, B]: what the rows `index` are compared with: themselves, and rows that count of other groups."""
    own = index[:, None] == jnp.arange(mask.shape[0])[None]
    others = jnp.broadcast_to(mask[None], own.shape)
    if groups is not None:
        others &= groups[index][:, None] != groups[None]
    return own | others


def _in_parts(part, chunks, x):
    """part(row numbers, rows of x) for all rows, in so many parts one after the other; no part's logits are kept."""
    B = x.shape[0]
    if B % chunks:
        raise UserError(f"config.objective: chunks={chunks} must divide the {B} rows of a batch")
    index = jnp.arange(B)
    if chunks == 1:
        return part(index, x)
    found = jax.lax.map(lambda rows: jax.checkpoint(part)(*rows), (cut(index, chunks), cut(x, chunks)))
    return tuple(map(uncut, found))


def cut(x: jax.Array, parts: int) -> jax.Array:
    """[B, …] -> [parts, B / parts, …]: row r goes to part r % parts, which leaves each device its own rows."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def uncut(x: jax.Array) -> jax.Array:
    """The inverse of `cut`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def check_paired(model, pairs: Sequence[tuple[str, str]], where: str) -> None:
    """Refuses a model with an encoder that no pair trains."""
    unpaired = set(model.encoders) - {name for pair in pairs for name in pair}
    if unpaired:
        raise UserError(f"{where}: no pair names {', '.join(sorted(unpaired))}; without one nothing trains its encoder")


def paired_items(batch, pairs: Sequence[tuple[str, str]], where: str) -> dict[str, jax.Array]:
    """The items of a batch that the pairs name; UserError if there is not one for each pair that names it."""
    found = {}
    for name in sorted({name for pair in pairs for name in pair}):
        found[name], count = batch["inputs"][name], sum(name in pair for pair in pairs)
        if found[name].shape[1] != count:
            raise UserError(
                f"{where}: rows hold {found[name].shape[1]} item(s) of {name!r}, but {count} pair(s) name it; the "
                "data must be made for the same pairs"
            )
    return found


def contrastive(
    model,
    *,
    pairs: tuple[str, ...],
    loss: str = "infonce",
    weights: tuple[float, ...] = (),
    same_label: str = "negative",
    chunks: int = 1,
    cache: int = 1,
    momentum: float = 0.0,
    queue: int = 0,
) -> LossFn:
    """Rows of a batch told apart by their items of two modalities; one term per pair, in nats.

    pairs: ("image-text", "audio-text", …); the batch holds one item of a modality for each pair that names it.
    weights: of the pairs (1 each). loss: "infonce" or "sigmoid"; the model's alignment needs a bias for "sigmoid".
    same_label: rows with an equal `label` are "negative"s of each other, or are "ignored".
    chunks: see `infonce`. cache: batches are encoded in so many parts one after the other, and each part again in the
    backward pass: the memory is that of one part and the gradient that of the whole batch (GradCache, Gao et al. 2021).
    momentum m: rows are compared with the embeddings of encoders that follow the trained ones, θ' = m θ' + (1 - m) θ
    (MoCo, He et al. 2020); queue: so many earlier ones are negatives as well. Both change in training only.

    Metrics: hits_A-B, the share of both ways in which the own partner is the nearest; logit_scale.
    """
    where = "config.objective: contrastive"
    alignment = getattr(model, "alignment", None)
    if alignment is None:
        raise UserError(f"{where} needs model.alignment, such as {{'temperature': 0.07}}")
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES, where)
    if loss == "sigmoid" and alignment["bias"] is None:
        raise UserError(f"{where}: loss='sigmoid' needs model.alignment.bias, such as -10.0")
    if same_label not in ("negative", "ignored"):
        raise unknown("same_label", same_label, ("negative", "ignored"), where)
    for name, value in (("chunks", chunks), ("cache", cache)):
        if value < 1:
            raise UserError(f"{where}: {name}={value} must be at least 1")
    if not 0 <= momentum < 1 or queue < 0:
        raise UserError(f"{where}: momentum={momentum} must be from 0 to less than 1, and queue={queue} at least 0")
    if queue and not momentum:
        raise UserError(f"{where}: a queue holds embeddings of momentum encoders; set momentum, such as 0.99")
    if momentum and loss == "sigmoid":
        raise UserError(f"{where}: momentum encoders and queues are for loss='infonce'")
    if queue and same_label == "ignored":
        raise UserError(f"{where}: a queue holds no labels, so same_label='ignored' cannot be kept; set queue=0")
    parsed = parse_pairs(pairs, model.encoders, where)
    own = slots(parsed)
    weights = tuple(weights) or (1.0,) * len(parsed)
    if len(weights) != len(parsed):
        raise UserError(f"{where}: {len(weights)} weights for {len(parsed)} pairs")
    check_paired(model, parsed, where)

    def embed(params, variables, inputs, rng, train):
        """{X: float[B, N, E]}, the rest of `out`, and the variables as they are now."""
        mutable = [name for name in MUTABLE if train and name in variables]

        def part(inputs, rng):
            (_, out), changed = model.apply(
                {"params": params, **variables}, inputs=inputs, train=train, rngs=rngs(rng), mutable=mutable
            )
            rest = {name: value for name, value in out.items() if name.startswith("logit_")}
            return {name: out[name]["embedding"] for name in inputs}, rest, changed

        if cache == 1:
            found, rest, changed = part(inputs, rng)
        else:
            if mutable:
                raise UserError(f"{where}: cache={cache} is not exact for encoders with batch statistics")
            rows = jax.tree.leaves(inputs)[0].shape[0]
            if rows % cache:
                raise UserError(f"{where}: cache={cache} must divide the {rows} rows of a batch")
            keys = jax.random.split(rng, cache)
            found, rest, changed = jax.lax.map(
                lambda rows: jax.checkpoint(part)(*rows), (jax.tree.map(lambda x: cut(x, cache), inputs), keys)
            )
            found, rest = jax.tree.map(uncut, found), jax.tree.map(lambda x: x[0], rest)
        return found, rest, {**variables, **changed}

    def loss_fn(params, variables, batch, rng, *, train: bool):
        inputs = paired_items(batch, parsed, where)
        found, rest, new = embed(params, variables, inputs, rng, train)
        teacher = None
        if momentum:
            slow = variables["momentum"]
            if train:
                slow = jax.tree.map(lambda old, p: momentum * old + (1 - momentum) * p, slow, params)
                slow = jax.lax.stop_gradient(slow)
            teacher = jax.lax.stop_gradient(embed(slow, variables, inputs, rng, False)[0])
            new = {**new, "momentum": slow}
        mask = batch.get("example_mask")
        rows = next(iter(found.values())).shape[0]
        mask = jnp.ones((rows,), jnp.float32) if mask is None else mask.astype(jnp.float32)
        if same_label == "ignored" and "label" not in batch:
            raise UserError(f"{where}: same_label='ignored' needs batches with a label")
        labels = batch["label"] if same_label == "ignored" else None  # int[B], or int[B, P], of each pair
        terms, measured, queues = {}, {}, dict(variables.get("queue", {}))
        for k, ((a, b), (i, j), weight) in enumerate(zip(parsed, own, weights)):
            groups = labels if labels is None or labels.ndim == 1 else labels[:, k]
            name, x, y = f"{a}-{b}", found[a][:, i], found[b][:, j]
            if loss == "sigmoid":
                nll, hits = sigmoid(x, y, rest["logit_scale"], rest["logit_bias"], mask, groups=groups, chunks=chunks)
            else:
                keys = (teacher[a][:, i], teacher[b][:, j]) if teacher else None
                earlier = (queues[f"{name}/{a}"], queues[f"{name}/{b}"]) if queue else None
                nll, hits = infonce(
                    x, y, rest["logit_scale"], mask, groups=groups, chunks=chunks, keys=keys, queues=earlier
                )
                if queue and train:
                    # First in, first out. Rows that only fill a batch enter as zeros, which are no negatives.
                    for m, key in zip((a, b), keys):
                        queues[f"{name}/{m}"] = jnp.concatenate([key * mask[:, None], queues[f"{name}/{m}"]])[:queue]
            terms[name] = (weight, *metrics.mean(nll, mask))
            measured[f"hits_{name}"] = metrics.mean(hits, mask)
        if queue:
            new = {**new, "queue": queues}
        measured["logit_scale"] = (rest["logit_scale"], jnp.ones(()))
        return terms, Aux(measured, new)

    def variables(params):
        """What the loss function keeps beside the model's variables, at the start."""
        start = {"momentum": jax.tree.map(jnp.copy, params)} if momentum else {}
        if queue:
            width = model_width(model)
            start["queue"] = {f"{a}-{b}/{m}": jnp.zeros((queue, width)) for a, b in parsed for m in (a, b)}
        return start

    loss_fn.whole_batch = (
        "compares the rows of a batch with each other, and micro-batches have fewer; set config.objective.cache instead"
    )
    loss_fn.variables = variables
    return loss_fn


def model_width(model) -> int:
    """Width of the shared space."""
    name = next(iter(model.encoders))
    return (model.input_projectors.get(name) or model.encoders[name]).width
