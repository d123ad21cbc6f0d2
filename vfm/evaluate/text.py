"""Perplexity, bits per byte, and samples of a language model."""

import math

import jax
import numpy as np

from vfm.data.interleave import Text, interleave
from vfm.errors import UserError
from vfm.evaluate import Evaluation
from vfm.generate import generate
from vfm.objectives.next_token import apply, cross_entropy

SAMPLES, NEW = 4, 128


def check_text(experiment) -> None:
    """Refuses a model that predicts no text."""
    if "text" not in experiment.model.decoders or experiment.config.data.name != "text":
        raise UserError("the evaluator 'text' needs model.decoders.text and config.data.name='text'")


def text(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Over the whole split (or `limit` rows), without label smoothing:

      bits_per_byte   -log2 p of the targets, per byte of text that they stand for (a special token stands for none):
                      it compares models with any tokenizer
      perplexity      exp of the mean -log p per token
      bytes_per_token

    samples: continuations of the text `config.generate.text`, where the backbone is causal.
    """
    sizes = byte_lengths(experiment.tokenizer)
    total, count, read = 0.0, 0.0, 0

    @experiment.jit
    def step(params, variables, batch):
        # Not the objective's term, which may be smoothed.
        logits, _, _ = apply(experiment.model, params, variables, batch, jax.random.key(0), train=False)
        return cross_entropy(logits, batch)[0]

    for host, batch in experiment.eval_batches(experiment.dataset(split), limit):
        nll, n = jax.device_get(step(params, variables, batch))
        total, count = total + float(nll), count + float(n)
        kept = (host["loss_mask"] > 0) & (host["example_mask"][:, None] > 0)
        read += int(sizes[host["targets"][kept]].sum())
    found = {
        "bits_per_byte": total / math.log(2) / max(read, 1),
        "perplexity": math.exp(min(total / max(count, 1), 700)),
        "bytes_per_token": read / max(count, 1),
    }
    causal = experiment.model.backbone.kind == "decoder_only" and "corruption" not in experiment.config.data
    samples = {"samples": ("Continuations of a text", _samples(experiment, params, variables))} if causal else {}
    return Evaluation(found, samples)


def byte_lengths(tokenizer) -> np.ndarray:
    """int[V]: bytes of text behind each id; 0 for special tokens."""
    found = np.zeros((tokenizer.vocab_size,), np.int64)
    anchor = next((i for i in range(tokenizer.vocab_size) if tokenizer.decode_bytes([i])), 0)
    # Behind another token: a decoder may leave out the space before a text.
    lead = len(tokenizer.decode_bytes([anchor]))
    for i in range(tokenizer.vocab_size):
        found[i] = len(tokenizer.decode_bytes([anchor, i])) - lead
    return found


def _samples(experiment, params, variables) -> list[list]:
    cfg, tokenizer = experiment.config.generate, experiment.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode(cfg.text)][: experiment.layout.length]
    room = experiment.model.backbone.max_len - experiment.layout.length
    new = min(NEW, cfg.max_new, room)
    if new < 1:
        return []
    row = interleave([Text(prompt)], experiment.layout, tokenizer)
    rows = experiment.config.eval.batch_size
    host = {**jax.tree.map(lambda x: np.stack([x] * rows), row), "example_mask": np.ones((rows,), np.float32)}
    with experiment.use_mesh():
        tokens = generate(
            experiment.model,
            {"params": params, **variables},
            experiment.put(host),
            max_new=new,
            eos_id=tokenizer.eos_id,
            temperature=cfg.temperature,
            suppress=experiment.unused_ids,
            rng=jax.random.key(experiment.config.seed),
        )
    tokens = experiment.fetch(tokens)[: SAMPLES if cfg.temperature else 1].tolist()
    return [[("text", cfg.text), ("text", tokenizer.decode(ids))] for ids in tokens]
