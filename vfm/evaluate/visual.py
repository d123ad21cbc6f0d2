"""Visual sentences: does the model infer from examples what is asked of an image?"""

import jax
import numpy as np

from vfm.errors import UserError
from vfm.evaluate import Evaluation, check_length, options
from vfm.generate import generate

OPTIONS = {"pairs": (), "temperature": 1.0}
SAMPLES = 6


def check_visual(experiment) -> None:
    """Refuses a config without visual sentences, and a backbone without room for prompt and answer."""
    data, chosen = experiment.config.data, options(experiment, "visual", OPTIONS)
    if data.name != "visual_sentences":
        raise UserError(f"the evaluator 'visual' needs config.data.name='visual_sentences', not {data.name!r}")
    pairs = data.get("pairs", 0)
    if data.get("tasks") and not all(0 <= n <= pairs for n in chosen["pairs"]):
        raise UserError(f"config.eval.visual.pairs={chosen['pairs']} must be from 0 to config.data.pairs={pairs}")
    # Of an image P tokens; a row holds one with <bos>, or pairs of two with two tokens between, and <bos>.
    longest = (data.length - 1) // (2 * pairs + 2) - 1 if data.get("tasks") else 0
    check_length("visual", data.length + longest, experiment.model)


def visual(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """In-context learning from n example pairs (LVM, Bai et al. 2024), by greedy generation of the annotation of the
    query:

      visual_accuracy_n           the share of the annotation's tokens that are right, after n examples
      visual_exact_n              the share of annotations that are right as a whole
      visual_shuffled_accuracy_n  the same after n examples that tell nothing: annotations of other images under other
      visual_shuffled_exact_n     tasks (see `VisualSentences`); without an example the two are the same
      visual_examples

    Queries and tasks are the same for every n. Without tasks (iGPT) the report alone gets something: held-out images of
    which the model has seen the upper half, and completed the lower one.
    Options in config.eval.visual: pairs (the numbers n; (): all up to data.pairs), temperature (of the completions).
    """
    chosen, weights = options(experiment, "visual", OPTIONS), {"params": params, **variables}
    if not experiment.dataset(split).tasks:
        return Evaluation({}, {"completions": _completions(experiment, weights, split, chosen["temperature"])})
    counts = tuple(chosen["pairs"]) or tuple(range(experiment.config.data.pairs + 1))
    found, samples, size = {}, {}, 0
    for n in counts:
        for shuffled in (False, True) if n else (False,):
            prompts = experiment.dataset(split, pairs=n, shuffled=shuffled, answer=False)
            accuracy, exact, size, rows = _answer(experiment, weights, prompts, limit)
            for prefix in ["visual", "visual_shuffled"] if not n else ["visual_shuffled" if shuffled else "visual"]:
                found |= {f"{prefix}_accuracy_{n}": accuracy, f"{prefix}_exact_{n}": exact}
            if n == max(counts):
                name = "shuffled" if shuffled else "sentences"
                samples[name] = (f"Images and annotations, the answer, and the truth; {split} split", rows)
    return Evaluation({**found, "visual_examples": size}, samples)


def _answer(experiment, weights, prompts, limit):
    """(share of right tokens, share of right annotations, number of examples, rows for the report)."""
    tokenizer, right, exact, count, rows = experiment.tokenizer, 0.0, 0, 0, []
    for host, batch in experiment.eval_batches(prompts, limit):
        answers = _continue(experiment, weights, batch, tokenizer.length)
        real = host["example_mask"] > 0
        hits = (answers == host["answer"])[real]
        right, exact, count = right + hits.mean(axis=1).sum(), exact + hits.all(axis=1).sum(), count + len(hits)
        for b in np.flatnonzero(real)[: SAMPLES - len(rows)]:
            ids = host["tokens"][b]
            ids = ids[ids >= len(tokenizer.special)].reshape(-1, tokenizer.length)  # without what stands between
            shown = tokenizer.decode(np.concatenate([ids, answers[b][None], host["answer"][b][None]]))
            rows.append([*(_cell(x) for x in shown[:-2]), ("text", "→"), _cell(shown[-2]), _cell(shown[-1])])
    return float(right / max(count, 1)), float(exact / max(count, 1)), count, rows


def _continue(experiment, weights, batch, max_new: int, **sampling) -> np.ndarray:
    """int32[B, max_new]: codes of images that follow the prompts."""
    never = (*range(len(experiment.tokenizer.special)), *experiment.unused_ids)
    with experiment.use_mesh():
        tokens = generate(
            experiment.model, weights, batch, max_new=max_new, eos_id=(), pad_id=0, suppress=never, **sampling
        )
    return experiment.fetch(tokens)


def _completions(experiment, weights, split, temperature):
    tokenizer, dataset = experiment.tokenizer, experiment.dataset(split)
    host, batch = next(iter(experiment.eval_batches(dataset, SAMPLES)))
    half = tokenizer.length // 2
    prompt = {"tokens": batch["tokens"][:, : half + 1], "input_mask": batch["input_mask"][:, : half + 1]}
    sampling = {"temperature": temperature, "rng": jax.random.key(0)} if temperature else {}
    new = _continue(experiment, weights, prompt, tokenizer.length - half, **sampling)
    truth = host["tokens"][:, 1 : tokenizer.length + 1]
    rows = []
    for b in range(min(SAMPLES, len(dataset))):
        completed = np.concatenate([truth[b, :half], new[b]])
        rows.append([_cell(image) for image in tokenizer.decode(np.stack([completed, truth[b]]))])
    return f"Upper half given, lower half generated; beside the true image; {split} split", rows


def _cell(image: np.ndarray) -> tuple:
    return "image", np.clip(image, 0, 1) if image.shape[-1] in (1, 3) else np.clip(image.mean(axis=-1), 0, 1)
