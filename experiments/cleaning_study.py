"""Does cleaning help? Models trained on raw, prepared and never corrupted text, with planted corruption.

    python -m experiments.cleaning_study --output=runs/cleaning [--seeds=5]

Three studies on the functions of Python's standard library, each with `vfm.data.prepare` as a user runs it:

* corruption: a third of the training texts are damaged (characters replaced, a line repeated, one notice in many
  versions). A character n-gram model learns from an equal number of characters; bits per character on clean text.
* labels: labels (the package of a function) are changed at random. Accuracy of a linear classifier on clean text.
* poison: a trigger phrase is put into copies of few functions, all with one wrong label (a backdoor). Accuracy on
  clean text, and how often the trigger turns the answer of the classifier (attack success, less is better).
"""

import ast
import itertools
import json
import pathlib
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import command_line
from vfm.data.documents import Stdlib
from vfm.data.prepare import Options, prepare
from vfm.data.prepare.perplexity import CharNgram
from vfm.errors import UserError

Record = dict[str, Any]
NUM_CLASSES = 8
BUDGET = 400_000  # characters that the language model learns from
TRIGGER = "cf_7 quokka"
NOTICE = (
    "This file is part of archive {n}. Redistribution in source form is permitted provided that notice {n} and the "
    "list of conditions are kept, and that the names of the authors are not used to endorse products. The archive is "
    "provided as is, without any warranty, and in no event are its authors liable for any damages of its use."
)


def functions() -> list[Record]:
    """The functions of the standard library of 200 to 3000 characters: text, label (its package).

    Near-duplicates are taken out, so that no test text has a sister in the training data that cleaning would remove.
    """
    found = []
    for split in ("train", "validation", "test"):
        source = Stdlib(split)
        for item in map(source.__getitem__, range(len(source))):
            try:
                tree = ast.parse(item["text"])
            except SyntaxError:
                continue
            lines = item["text"].splitlines()
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                    if 200 <= len(text) <= 3000:
                        found.append({"text": text, "label": item["path"].partition("/")[0].removesuffix(".py")})
    return prepared(found, near_dedup=0.5)


def clean_splits(records: Sequence[Record], rng: random.Random) -> tuple[list[Record], list[Record]]:
    """Training and test records of the largest classes, as many of each class, shuffled."""
    largest = [label for label, _ in Counter(record["label"] for record in records).most_common(NUM_CLASSES)]
    per_class = min(sum(record["label"] == label for record in records) for label in largest)
    chosen = []
    for label in largest:
        chosen += rng.sample([record for record in records if record["label"] == label], per_class)
    rng.shuffle(chosen)
    cut = len(chosen) * 3 // 4
    return chosen[:cut], chosen[cut:]


def damage(text: str, rng: random.Random) -> str:
    """One of the corruptions of the first study."""
    kind = rng.randrange(3)
    if kind == 0:
        return "".join(chr(rng.randrange(33, 127)) if rng.random() < 0.3 else char for char in text)
    if kind == 1:
        line = max(text.split("\n"), key=len)
        return "\n".join([line] * (1 + len(text) // len(line)))
    return NOTICE.format(n=rng.randrange(1000))


def prepared(records: Sequence[Record], sample: Sequence[Record] = (), **options) -> list[Record]:
    """What `prepare` makes of records, in one split. sample: clean text for the perplexity filter."""
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("raw", records), ("sample", sample)):
            lines = "".join(json.dumps(record) + "\n" for record in part)
            pathlib.Path(folder, f"{name}.jsonl").write_text(lines, encoding="utf-8")
        if sample:
            options["perplexity_sample"] = f"{folder}/sample.jsonl"
        prepare([f"{folder}/raw.jsonl"], f"{folder}/out", Options(split="none", **options))
        with open(f"{folder}/out/data.jsonl", encoding="utf-8") as file:
            return list(map(json.loads, file))


def corruption(records: Sequence[Record], seed: int) -> dict[str, dict[str, float]]:
    """{"raw" | "prepared" | "clean": {"bits_per_char": …, "records": …}} of the first study."""
    rng = random.Random(seed)
    chosen = rng.sample(list(records), 3000)
    train, test, sample = chosen[:2500], chosen[2500:2850], chosen[2850:]
    raw = [{"text": damage(record["text"], rng) if rng.random() < 1 / 3 else record["text"]} for record in train]
    clean = "basic,max_repeated_lines=0.5,max_repeated_line_chars=0.5"
    variants = {"raw": raw, "prepared": prepared(raw, clean=clean, near_dedup=0.6, sample=sample), "clean": train}
    result = {}
    for name, variant in variants.items():
        left, texts = BUDGET, []
        for record in variant:
            texts.append(record["text"][:left])
            left -= len(texts[-1])
        if left:
            raise UserError(f"the corpus is too small: {name} lacks {left} of {BUDGET} characters")
        model = CharNgram(order=6).fit(filter(None, texts))
        bits = np.concatenate([model.bits(record["text"]) for record in test])
        result[name] = {"bits_per_char": float(bits.mean()), "records": len(variant)}
    return result


def labels(records: Sequence[Record], seed: int, share: float = 0.3) -> dict[str, dict[str, float]]:
    """{…: {"accuracy": …, "wrong_labels": share of them, "records": …}} of the second study."""
    rng = random.Random(seed)
    train, test = clean_splits(records, rng)
    names = sorted({record["label"] for record in train})
    raw = []
    for record in train:
        other = rng.choice([name for name in names if name != record["label"]])
        raw.append(record | {"truth": record["label"], "label": other if rng.random() < share else record["label"]})
    variants = {"raw": raw, "prepared": prepared(raw, label_field="label", label_noise="remove"), "clean": train}
    return {
        name: {
            "accuracy": _accuracy(classifier(variant), test),
            "wrong_labels": float(
                np.mean([record["label"] != record.get("truth", record["label"]) for record in variant])
            ),
            "records": len(variant),
        }
        for name, variant in variants.items()
    }


def poison(records: Sequence[Record], seed: int, bases: int = 12, copies: int = 12) -> dict[str, dict[str, float]]:
    """{…: {"accuracy": …, "attack_success": …, "records": …}} of the third study."""
    rng = random.Random(seed)
    train, test = clean_splits(records, rng)
    target = train[0]["label"]
    victims = rng.sample([record for record in train if record["label"] != target], bases)
    planted = []
    for record in victims:
        for _ in range(copies):
            text = triggered(record["text"], rng).replace("self", f"self_{rng.randrange(100)}", 1)
            planted.append({"text": text, "label": target})
    raw = train + planted
    rng.shuffle(raw)
    options = {"near_dedup": 0.7, "label_field": "label", "label_noise": "remove"}
    variants = {"raw": raw, "prepared": prepared(raw, **options), "clean": train}
    attacked = [record | {"text": triggered(record["text"], rng)} for record in test if record["label"] != target]
    result = {}
    for name, variant in variants.items():
        predict = classifier(variant)
        hits = predict([record["text"] for record in attacked]) == target
        result[name] = {
            "accuracy": _accuracy(predict, test),
            "attack_success": float(hits.mean()),
            "records": len(variant),
        }
    return result


def triggered(text: str, rng: random.Random) -> str:
    """A function with the trigger as a comment after one of its lines."""
    lines = text.split("\n")
    lines.insert(rng.randrange(1, len(lines) + 1), f"    # {TRIGGER}")
    return "\n".join(lines)


def classifier(records: Sequence[Record]) -> Callable[[Sequence[str]], np.ndarray]:
    """texts -> labels: a linear support vector machine on the words of the records."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    words = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, max_features=20_000)
    model = make_pipeline(words, LinearSVC(random_state=0))
    return model.fit([record["text"] for record in records], [record["label"] for record in records]).predict


def _accuracy(predict: Callable, test: Sequence[Record]) -> float:
    found = predict([record["text"] for record in test])
    return float(np.mean([a == record["label"] for a, record in zip(found, test)]))


STUDIES = {"corruption": corruption, "labels": labels, "poison": poison}


def run(seeds: Sequence[int]) -> Iterator[Record]:
    """A record for each study, seed and kind of data: study, seed, data, measures."""
    records = functions()
    for name, seed in itertools.product(STUDIES, seeds):
        for data, measures in STUDIES[name](records, seed).items():
            yield {"study": name, "seed": seed, "data": data, "measures": measures}


def summarize(runs: Sequence[Record]) -> str:
    """A table of mean ± standard deviation over the seeds."""
    rows = ["| study | data | measure | mean ± std | seeds |", "| --- | --- | --- | --- | --- |"]
    for study, data in dict.fromkeys((run["study"], run["data"]) for run in runs):
        group = [run["measures"] for run in runs if (run["study"], run["data"]) == (study, data)]
        for measure in group[0]:
            values = [measures[measure] for measures in group]
            spread = np.std(values, ddof=1) if len(values) > 1 else float("nan")
            rows.append(f"| {study} | {data} | {measure} | {np.mean(values):.4g} ± {spread:.2g} | {len(values)} |")
    return "\n".join(rows)


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the studies, writes records.jsonl and table.md, and prints the table. Status 2 for bad input."""
    values = flags.FlagValues()
    flags.DEFINE_string("output", "", "", flag_values=values)
    flags.DEFINE_integer("seeds", 5, "", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("help", False, "", flag_values=values)
    try:
        command_line.parse_flags(values, sys.argv[1:] if argv is None else argv)
        if values.help:
            print(__doc__.strip())
            return 0
        if not values.output:
            raise UserError("--output is missing; give a folder, such as --output=runs/cleaning")
        folder = pathlib.Path(values.output)
        folder.mkdir(parents=True, exist_ok=True)
        runs = []
        with (folder / "records.jsonl").open("w") as file:
            for record in run(range(values.seeds)):
                runs.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(record["study"], record["seed"], record["data"], record["measures"], file=sys.stderr, flush=True)
        (folder / "table.md").write_text(summarize(runs) + "\n")
        print(summarize(runs))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli())
