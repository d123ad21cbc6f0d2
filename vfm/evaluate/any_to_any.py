"""Accuracy of every direction of an any-to-any model on held-out examples."""

from typing import Any

import jax
import numpy as np

from vfm.data.pairs import Task
from vfm.errors import UserError
from vfm.evaluate import Evaluation, cell
from vfm.evaluate.generation import drawer, sampler_settings
from vfm.evaluate.judge import Judge
from vfm.generate import generate
from vfm.wiring import generative

SAMPLES = 8


def check_any_to_any(experiment) -> None:
    """Refuses a config without tasks, and a backbone without room for prompt and answer."""
    config, max_len = experiment.config, experiment.model.backbone.max_len
    if "tasks" not in config.data or "words" not in config.data:
        raise UserError(
            f"the evaluator 'any_to_any' needs config.data.tasks and .words; the dataset {config.data.name!r} "
            "has none. Leave it out of config.eval.evaluators"
        )
    room = config.data.length + _max_new(experiment.tokenizer, config.data.words)
    if any(Task.split(task)[1] == "text" for task in config.data.tasks) and room > max_len:
        raise UserError(
            f"the evaluator 'any_to_any' generates up to position {room}: config.data.length="
            f"{config.data.length} and the longest word; model.backbone.max_len={max_len} is too small"
        )


def any_to_any(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """One accuracy per task of `config.data.tasks`, each over the whole split (or `limit` examples).

      a_to_text_accuracy     greedy generation with the cache; exact match of the decoded text with the true word
      a_to_X_accuracy        X has a decoder: the generated item's class, by a `Judge` fitted on real training items; a
                             generative decoder samples with the settings of `config.eval.generation`
      a_to_X_class_accuracy  X has no decoder: the class of the predicted features, by a `Judge` fitted on the encoder's
                             features of real training items

    A task with several inputs counts as `mixed_to_...`, the next with the same output as `A_B_to_...`.
    `judge_X_accuracy` is the judge's own on real held-out items.
    """
    found: dict[str, float] = {}
    samples: dict[str, tuple[str, list]] = {}
    variables = {"params": params, **variables}
    judges: dict[str, Judge] = {}
    for task in experiment.config.data.tasks:
        prompts = experiment.dataset(split, task=task, answer=False)
        inputs, output = prompts.tasks[0].inputs, prompts.tasks[0].output
        name = f"{inputs[0] if len(inputs) == 1 else 'mixed'}_to_{output}"
        if name in samples:  # another task of several inputs
            name = f"{'_'.join(inputs)}_to_{output}"
        if output == "text":
            accuracy, rows = _to_text(experiment, variables, prompts, limit)
            found[f"{name}_accuracy"] = accuracy
        else:
            if output not in judges:
                judges[output] = _fit_judge(experiment, variables, output)
                found[f"judge_{output}_accuracy"] = _judge_real(
                    experiment, variables, judges[output], experiment.dataset(split, task=task), output, limit
                )
            accuracy, rows = _to_item(experiment, variables, prompts, output, judges[output], limit)
            suffix = "accuracy" if output in experiment.model.decoders else "class_accuracy"
            found[f"{name}_{suffix}"] = accuracy
        samples[name] = (f"{task}: inputs, what was generated, and the truth; {split} split", rows)
    return Evaluation(found, samples)


def _to_text(experiment, variables, prompts, limit):
    tokenizer = experiment.tokenizer
    max_new = _max_new(tokenizer, prompts.words)
    right, count, rows = 0, 0, []
    for host, batch in experiment.eval_batches(prompts, limit):
        with experiment.use_mesh():
            tokens = experiment.fetch(
                generate(
                    experiment.model,
                    variables,
                    batch,
                    max_new=max_new,
                    eos_id=tokenizer.eos_id,
                    suppress=experiment.unused_ids,
                )
            )
        for b in np.flatnonzero(host["example_mask"]):
            answer, truth = tokenizer.decode(_until(tokens[b], tokenizer.eos_id)), prompts.words[host["label"][b]]
            right, count = right + (answer == truth), count + 1
            if len(rows) < SAMPLES:
                rows.append([*_input_cells(experiment, host, b), ("text", f"→ {answer}"), ("text", f"truth: {truth}")])
    return right / max(count, 1), rows


def _max_new(tokenizer, words) -> int:
    return max(len(tokenizer.encode(word)) for word in words) + 1  # and <eos>


def _to_item(experiment, variables, prompts, output, judge, limit):
    key = "decoded" if output in experiment.model.decoders else "predicted"
    right, count, rows = 0, 0, []
    draw = drawer(experiment, output, sampler_settings(experiment)) if output in generative(experiment.model) else None
    for i, (host, batch) in enumerate(experiment.eval_batches(prompts, limit)):
        if draw is None:
            items = experiment.forward(variables, batch)[output][key]
        else:
            items = draw(variables, batch, jax.random.key(i))
        items = experiment.fetch(items)[:, -1]
        real = np.flatnonzero(host["example_mask"])
        classes = judge.predict(_features(items, key)[real])
        labels = host["label"][real]
        right, count = right + int((classes == labels).sum()), count + len(real)
        for b, found, label in zip(real[: SAMPLES - len(rows)], classes, labels):
            cells = _input_cells(experiment, host, b)
            shown = ("image", np.clip(items[b], 0, 1)) if key == "decoded" else ("text", f"→ class {found}")
            rows.append([*cells, shown, ("text", f"judged {found}, truth {label}")])
    return right / max(count, 1), rows


def _fit_judge(experiment, variables, output) -> Judge:
    items, labels = _real_items(
        experiment,
        variables,
        experiment.dataset("train", task=f"text->{output}", train=False),
        output,
        experiment.config.eval.judge_examples,
    )
    return Judge(items, labels)


def _judge_real(experiment, variables, judge, dataset, output, limit) -> float:
    return judge.accuracy(*_real_items(experiment, variables, dataset, output, limit))


def _real_items(experiment, variables, dataset, output, limit):
    """Real items of a split (or the encoder's features of them where there is no decoder) and their labels."""
    items, labels = [], []
    for host, batch in experiment.eval_batches(dataset, limit):
        real = np.flatnonzero(host["example_mask"])
        if output in experiment.model.decoders:
            found = host["inputs"][output][:, -1]
        else:
            found = _features(
                experiment.fetch(experiment.forward(variables, batch)[output]["features"])[:, -1], "features"
            )
        items.append(found[real])
        labels.append(host["label"][real])
    return np.concatenate(items), np.concatenate(labels)


def _features(items, key):
    return items if key == "decoded" else items.mean(axis=1)  # features: mean over the item's tokens


def _input_cells(experiment, host, b) -> list[Any]:
    """The inputs of row b as report cells, in the order of the sequence."""
    cells = []
    for name, starts in host["starts"].items():
        for n in np.flatnonzero(starts[b] >= 0):
            cells.append((starts[b, n], cell(experiment, name, host["inputs"][name][b, n])))
    text = experiment.tokenizer.decode(host["tokens"][b][host["input_mask"][b]])
    cells = [found for _, found in sorted(cells, key=lambda c: c[0])]
    return [*cells, ("text", text)] if text.strip() else cells


def _until(tokens, eos_id) -> list[int]:
    tokens = list(map(int, tokens))
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
