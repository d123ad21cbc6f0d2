"""How well a backbone of any family predicts how a text goes on, in bits per byte."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm import flops
from vfm.data.passages import Passages
from vfm.errors import UserError, unknown
from vfm.evaluate import Evaluation, check_length, fewest, options
from vfm.evaluate.text import byte_lengths

OPTIONS = {"length": 0, "share": 0.25, "per_document": 2, "examples": 256}


class _Cut:
    """Passages with the number of their tokens that are given, `known`; the others are to be predicted."""

    def __init__(self, passages: Passages, share: float):
        self.passages = passages
        sizes = np.array([len(ids) for ids in passages.ids])
        self.known = (sizes - np.maximum(np.floor(sizes * share + 1e-9), 1)).astype(np.int32)
        self.given, self.ahead = int(self.known.max()), int((sizes - self.known).max())

    def __len__(self) -> int:
        return len(self.passages)

    def example(self, index: int, rng=None) -> dict:
        return {**self.passages.example(index), "known": self.known[index]}


def check_continuation(experiment) -> None:
    """Refuses a model that predicts no text, a corruption without a way to continue, and passages that do not fit."""
    config, chosen = experiment.config, options(experiment, "continuation", OPTIONS)
    if "text" not in experiment.model.decoders or config.data.name != "text":
        raise UserError("the evaluator 'continuation' needs model.decoders.text and config.data.name='text'")
    if (name := _corruption(config)) not in WAYS:
        raise unknown("corruption", name, WAYS, "the evaluator 'continuation'")
    if not 0 < chosen["share"] < 1:
        raise UserError(f"config.eval.continuation.share={chosen['share']} must be above 0 and below 1")
    length = chosen["length"] or config.data.length
    if length < 2:
        raise UserError(f"config.eval.continuation.length={length} must be at least 2: a token and its continuation")
    # An encoder reads all tokens but one, and special ones.
    extra = {"span_corruption": 1, "text_infilling": 2}.get(name, 0)
    check_length("continuation", length + extra, experiment.model)


def _corruption(config) -> str:
    return (config.data.get("corruption") or {"name": "next_token"})["name"]


def continuation(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """The last part of passages of the split, given what stands before it, with teacher forcing:

      continuation_bits_per_byte   -sum log2 p(token | all tokens before it) per byte of text
      continuation_accuracy        the share of tokens that the model ranks first
      continuation_flops_per_byte  of forward passes: what it costs to have these probabilities
      continuation_examples

    In every family it is the same event, the next token, under the same condition, the text before it and no text
    behind it; the probabilities of a passage multiply to that of its continuation. Special tokens are left out of the
    distribution, in all families alike: it is known that the text goes on. How a family is asked, as it was trained:

      next_token       one causal pass
      prefix_lm        one pass; the given part is the prefix
      masked           one pass for every token: the text before it, then one mask, then nothing
      span_corruption  the encoder reads the given part and the sentinel of a last span; the decoder writes the span
      text_infilling   the encoder reads the given part and a mask; the decoder writes all, and its first part is given

    Options in config.eval.continuation: length (tokens of a passage; 0: data.length), share (of its tokens that are
    predicted), per_document, examples (at most; also `limit`).
    """
    chosen, config = options(experiment, "continuation", OPTIONS), experiment.config
    cut = _Cut(
        Passages(
            config.data.source,
            split=split,
            tokenizer=experiment.tokenizer,
            length=chosen["length"] or config.data.length,
            per_document=chosen["per_document"],
            most=fewest(chosen["examples"], limit),
            skip_corrupt=config.data.get("skip_corrupt", False),
        ),
        chosen["share"],
    )
    sizes = byte_lengths(experiment.tokenizer)
    text = np.zeros(experiment.model.decoders["text"].vocab_size, bool)
    text[: len(sizes)] = sizes > 0
    corruption = experiment.dataset(split).corruption
    score = functools.partial(_score, experiment.model, corruption, cut.given, cut.ahead, text)
    jitted, weights = experiment.jit(score), {"params": params, **variables}
    bits, hits, tokens, read, work = 0.0, 0, 0, 0, 0.0
    per_batch: int | None = None
    for host, batch in experiment.eval_batches(cut):
        nll, hit = (experiment.fetch(x) for x in jitted(weights, batch))
        real = host["example_mask"] > 0
        at = np.arange(host["tokens"].shape[1])[None]
        asked = host["input_mask"] & (at >= host["known"][:, None]) & real[:, None]
        per_batch = per_batch or flops.count(score, weights, batch)
        work += per_batch * real.mean()  # without the rows that only fill the batch
        read += int(sizes[host["tokens"][asked]].sum())
        tokens += int(asked.sum())
        bits += float(nll[real].sum()) / math.log(2)
        hits += int(hit[real].sum())
    return Evaluation(
        {
            "continuation_bits_per_byte": bits / max(read, 1),
            "continuation_accuracy": hits / max(tokens, 1),
            "continuation_flops_per_byte": work / max(read, 1),
            "continuation_examples": len(cut),
        },
        {},
    )


def _score(model, corruption, given: int, ahead: int, text, weights, batch) -> tuple[jax.Array, jax.Array]:
    """Of every row: -log p of what is predicted, float[B] in nats, and how many tokens are ranked first, int[B]."""
    tokens, known = batch["tokens"], batch["known"]
    at = known[:, None] + jnp.arange(ahead)[None]
    asked = at < batch["input_mask"].sum(axis=1, keepdims=True)
    targets = _take(tokens, at)
    apply = functools.partial(model.apply, weights, train=False)
    logits = WAYS[corruption.name](apply, corruption, batch, given, targets).astype(jnp.float32)
    logits = jnp.where(text[None, None], logits, -jnp.inf)
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    hit = (jnp.argmax(logits, axis=-1) == targets) & asked
    return jnp.where(asked, nll, 0).sum(axis=1), hit.sum(axis=1)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """x[B, T, …] at places int[B, C]; the last one for places behind it."""
    at = jnp.minimum(at, x.shape[1] - 1)
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)


# Each way: (apply, corruption, batch, given, targets int32[B, C]) -> logits float[B, C, V] of the C tokens from `known`
# on. given: the greatest `known`.


def _causal(apply, corruption, batch, given, targets, **more) -> jax.Array:
    logits, _ = apply(batch["tokens"][:, :-1], input_mask=batch["input_mask"][:, :-1], **more)
    return _take(logits, batch["known"][:, None] - 1 + jnp.arange(targets.shape[1])[None])


def _prefix(apply, corruption, batch, given, targets) -> jax.Array:
    places = jnp.arange(batch["tokens"].shape[1] - 1)[None]
    return _causal(apply, corruption, batch, given, targets, prefix=places < batch["known"][:, None])


def _masked(apply, corruption, batch, given, targets) -> jax.Array:
    places = jnp.arange(batch["tokens"].shape[1])[None]

    def ask(ahead):
        at = batch["known"][:, None] + ahead
        tokens = jnp.where(places == at, corruption.mask_id, batch["tokens"])
        logits, _ = apply(tokens, input_mask=places <= at)
        return _take(logits, at)[:, 0]

    return jax.lax.map(ask, jnp.arange(targets.shape[1])).swapaxes(0, 1)


def _span(apply, corruption, batch, given, targets) -> jax.Array:
    known, sentinel = batch["known"][:, None], corruption.sentinels[0]
    places = jnp.arange(given + 2)[None]
    tokens = jnp.pad(batch["tokens"][:, :given], ((0, 0), (0, 2)))
    tokens = jnp.where(places == known, sentinel, jnp.where(places == known + 1, corruption.eos_id, tokens))
    start = jnp.asarray([[corruption.start_id, sentinel]], tokens.dtype).repeat(len(targets), axis=0)
    logits, _ = apply(
        tokens, input_mask=places < known + 2, decoder_tokens=jnp.concatenate([start, targets[:, :-1]], axis=1)
    )
    return logits[:, 1:]


def _infilling(apply, corruption, batch, given, targets) -> jax.Array:
    known = batch["known"][:, None]
    places = jnp.arange(given + 3)[None]
    tokens = jnp.pad(batch["tokens"][:, :given], ((0, 0), (1, 2)), constant_values=corruption.bos_id)
    tokens = jnp.where(places == known + 1, corruption.mask_id, tokens)
    tokens = jnp.where(places == known + 2, corruption.eos_id, tokens)
    start = jnp.asarray([[corruption.eos_id, corruption.bos_id]], tokens.dtype).repeat(len(targets), axis=0)
    decoder_tokens = jnp.concatenate([start, batch["tokens"][:, :-1]], axis=1)
    logits, _ = apply(tokens, input_mask=places < known + 3, decoder_tokens=decoder_tokens)
    return _take(logits, known + 1 + jnp.arange(targets.shape[1])[None])


WAYS: Mapping[str, Any] = {
    "next_token": _causal,
    "prefix_lm": _prefix,
    "masked": _masked,
    "span_corruption": _span,
    "text_infilling": _infilling,
}
