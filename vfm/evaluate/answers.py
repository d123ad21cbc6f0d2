"""Are the answers right? Exact match, and measures that change gradually, of the same answers."""

import functools
import json
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm import data
from vfm.data.construct import plain
from vfm.data.interleave import Layout
from vfm.data.questions import Questions
from vfm.errors import UserError, unknown
from vfm.evaluate import Evaluation, options
from vfm.generate import generate
from vfm.model import INPUTS

log = logging.getLogger(__name__)
OPTIONS: dict[str, Any] = {"generate": True, "marker": "", "prompts": {}}
PROMPT = ("source", "split", "shots", "separator", "shots_source", "shots_split", "shots_tasks", "length")
SAMPLES = 8
_KEPT: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()  # data sets of an experiment


def check_answers(experiment) -> None:
    """Refuses what has no questions, a backbone that does not write from left to right, and unknown ways to ask."""
    config, chosen = experiment.config, options(experiment, "answers", OPTIONS)
    if config.data.name != "questions" or "text" not in experiment.model.decoders:
        raise UserError("the evaluator 'answers' needs model.decoders.text and config.data.name='questions'")
    if experiment.model.backbone.kind != "decoder_only":
        raise UserError("the evaluator 'answers' needs a decoder-only backbone")
    for name, changes in plain(chosen["prompts"]).items():
        for field in changes:
            if field not in PROMPT:
                raise unknown("field", field, PROMPT, f"config.eval.answers.prompts.{name}")
        if changes.get("length", 1) > experiment.model.backbone.max_len:
            raise UserError(
                f"config.eval.answers.prompts.{name}.length={changes['length']} is longer than "
                f"model.backbone.max_len={experiment.model.backbone.max_len}"
            )


def answers(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Of the questions of a split (`limit` of them), by teacher forcing, that is given the true answer so far:

      answer_exact_match          the share of answers of which every token, <eos> included, is ranked first. It is the
                                  same event as that greedy decoding writes the answer, and costs one pass.
      answer_token_accuracy       the share of tokens that are ranked first
      answer_log_likelihood       nats per token, ≤ 0
      answer_exact_match_TASK     where items have a task
      answer_questions

    and by greedy decoding with the key/value cache, unless `generate` is False:

      answer_edit_distance        Levenshtein's, in tokens, over the length of the longer one of both answers: 0 to 1
      answer_final_match          where items have `final`: the share of answers that give it

    Options in config.eval.answers: generate; marker: what is compared with `final` is the text behind the last marker
    of an answer (without one, all of it); prompts: {NAME: fields of the data set `questions`}, other ways to ask the
    same questions, such as {"few_shot": {"shots": 4, "length": 96}}, or those of another split, {"split": SPLIT}; their
    metrics begin with NAME_. Of the field `source` only what is other is given, unless it names a source of its own.
    """
    chosen = options(experiment, "answers", OPTIONS)
    found, samples = {}, {}
    for name, changes in {"": {}, **plain(chosen["prompts"])}.items():
        lead = f"{name}_" if name else ""
        metrics, rows = _ask(experiment, {"params": params, **variables}, split, limit, chosen, changes)
        found |= {f"{lead}{key}": value for key, value in metrics.items()}
        if rows:
            asked = f", asked as {name}" if name else ""
            samples[f"{lead}answers"] = (f"Question, its answer, and the one found by greedy decoding{asked}", rows)
    return Evaluation(found, samples)


def _ask(experiment, weights, split, limit, chosen, changes) -> tuple[dict[str, float], list[list]]:
    """One way to ask: its metrics, and the first few questions with the answers."""
    dataset, tokenizer = _dataset(experiment, split, changes), experiment.tokenizer
    items = dataset.items[: limit or None]
    forced = {"nll": [], "hits": [], "tokens": []}
    texts, distances = [], []
    for host, batch in experiment.eval_batches(dataset, limit):
        real = host["example_mask"] > 0
        with experiment.use_mesh():
            given = _teacher_forcing(experiment.model, experiment.unused_ids, weights, batch)
        for key, value in given.items():
            forced[key].append(experiment.fetch(value)[real])
        if chosen["generate"]:
            tokens = _generate(experiment, weights, dataset, host)[real]
            sizes = _lengths(tokens, tokenizer.eos_id)
            true = [dataset.ids[i][1] for i in range(len(distances), len(distances) + len(tokens))]
            longest = np.maximum(np.maximum(sizes, [*map(len, true)]), 1)  # both may be empty
            distances += (_edit_distances(tokens, sizes, true) / longest).tolist()
            texts += [tokenizer.decode(row[:n]) for row, n in zip(tokens.tolist(), sizes, strict=True)]
    nll, hits, tokens = (np.concatenate(forced[key]) for key in ("nll", "hits", "tokens"))
    exact = hits == tokens
    found = {
        "answer_exact_match": exact.mean(),
        "answer_token_accuracy": hits.sum() / tokens.sum(),
        "answer_log_likelihood": -nll.sum(dtype=np.float64) / tokens.sum(),
        "answer_questions": len(items),
    }
    names = np.array([item.get("task", "") for item in items])
    for name in sorted({*names} - {""}):
        found[f"answer_exact_match_{name}"] = exact[names == name].mean()
    if texts:
        found["answer_edit_distance"] = np.mean(distances)
        finals = [(text, item["final"]) for text, item in zip(texts, items, strict=True) if "final" in item]
        if finals:
            found["answer_final_match"] = np.mean([final_of(text, chosen["marker"]) == final for text, final in finals])
    rows = [
        [("text", item["prompt"]), ("text", item["answer"]), ("text", text)]
        for item, text in zip(items[:SAMPLES], texts, strict=False)
    ]
    return {name: float(value) for name, value in found.items()}, rows


def final_of(text: str, marker: str) -> str:
    """What stands behind the last marker of an answer, without the spaces around it."""
    return (text.rpartition(marker)[2] if marker else text).strip()


def _dataset(experiment, split: str, changes: Mapping) -> Questions:
    """The questions of a split, whatever the objective predicts of them, with other fields; kept for the next time."""
    own = ("length", "workers", "skip_corrupt", "dir")  # fields of the run, not of the data set
    fields = {key: value for key, value in plain(experiment.config.data).items() if key not in own}
    split = changes.get("split", split)
    changes = {name: value for name, value in changes.items() if name != "split"}
    if not changes and fields.get("loss", "answer") == "answer":
        return experiment.dataset(split)
    kept = _KEPT.setdefault(experiment, {})
    key = (split, json.dumps(changes, sort_keys=True))
    if key not in kept:
        length = changes.get("length", experiment.layout.length)
        layout = Layout(length, experiment.layout.modalities)
        own = fields["source"]
        fields |= {"loss": "answer", **{name: value for name, value in changes.items() if name != "length"}}
        if "name" not in fields["source"]:
            fields["source"] = {**own, **fields["source"]}
        kept[key] = data.build(fields, split, layout=layout, tokenizer=experiment.tokenizer)
    return kept[key]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _teacher_forcing(model, unused: tuple[int, ...], weights, batch) -> dict[str, jax.Array]:
    """Of each row's answer: nll float[B] in nats, hits int[B] and tokens int[B]."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    logits = model.apply(weights, **inputs, train=False)[0].astype(jnp.float32)
    asked, targets = batch["loss_mask"] > 0, batch["targets"]
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    hits = jnp.argmax(logits.at[..., jnp.asarray(unused, jnp.int32)].set(-jnp.inf), axis=-1) == targets
    total = lambda x: jnp.where(asked, x, 0).sum(axis=1)
    return {"nll": total(nll), "hits": total(hits), "tokens": asked.sum(axis=1)}


def _generate(experiment, weights, dataset: Questions, host: Mapping) -> np.ndarray:
    """int32[B, new]: what the model writes behind the prompts of a batch, by greedy decoding."""
    known = (host["loss_mask"] > 0).argmax(axis=1)[:, None] + 1
    length = min(dataset.longest_prompt, host["tokens"].shape[1])
    new = min(dataset.longest_answer, experiment.model.backbone.max_len - length)
    if new < dataset.longest_answer:
        log.warning("evaluator 'answers': model.backbone.max_len leaves room for answers of %d tokens only", new)
    prompts = {**host, "tokens": host["tokens"][:, :length], "input_mask": np.arange(length)[None] < known}
    with experiment.use_mesh():
        tokens = generate(
            experiment.model,
            weights,
            experiment.put(prompts),
            max_new=max(new, 1),
            eos_id=experiment.tokenizer.eos_id,
            suppress=experiment.unused_ids,
        )
    return experiment.fetch(tokens)


def _lengths(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """int[B]: tokens of each row before its first <eos>."""
    ended = tokens == eos_id
    return np.where(ended.any(axis=1), ended.argmax(axis=1), tokens.shape[1])


def _edit_distances(tokens: np.ndarray, sizes: np.ndarray, true: list[list[int]]) -> np.ndarray:
    """int[B]: Levenshtein's distance of tokens[i, :sizes[i]] and true[i], all rows at once."""
    B, n = tokens.shape
    m = max(map(len, true), default=0)
    padded = np.full((B, m), -1)
    for row, ids in zip(padded, true, strict=True):
        row[: len(ids)] = ids
    table = np.zeros((n + 1, m + 1, B), int)  # of the prefixes, so that what stands behind a row's end does not count
    table[:, 0], table[0] = np.arange(n + 1)[:, None], np.arange(m + 1)[:, None]
    for i in range(n):
        for j in range(m):
            other = tokens[:, i] != padded[:, j]
            changed = np.minimum(table[i, j + 1], table[i + 1, j]) + 1
            table[i + 1, j + 1] = np.minimum(table[i, j] + other, changed)
    return table[sizes, [len(ids) for ids in true], np.arange(B)]
