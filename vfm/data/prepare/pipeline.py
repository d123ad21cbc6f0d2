"""Collect, normalise, clean, deduplicate, split, check: from JSON lines to JSON lines and a data card."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vfm.data.prepare import card as cards
from vfm.data.prepare import labels, leaks, lines, minhash, perplexity
from vfm.data.prepare.collect import Collected
from vfm.data.prepare.folder import whole
from vfm.data.prepare.normalise import normalise
from vfm.data.prepare.options import Options
from vfm.data.prepare.stages import Stages
from vfm.errors import UserError

Progress = Callable[[str, int, int], None]


def prepare(
    inputs: Sequence[str],
    output: str,
    options: Options | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Prepares JSON lines into the folder `output`, and returns its data card.

    inputs: files, plain or .gz, or patterns. output: gets a file for each split (`train.jsonl`, …), `data_card.json`
    and `DATA_CARD.md`. It appears as a whole when all is done; an output that exists is replaced only with
    options.overwrite. progress: called with a stage, and how much of how much of it is done.

    Texts are streamed. In memory are about 60 bytes for each record, 130 more for its key among exact duplicates, and
    8 more for each band while near-duplicates are sought; signatures are in a file that is mapped. UserError for bad
    input; `leaks.Leaks` if splits share texts or groups, and then nothing is written.
    """
    options = options or Options()
    files = lines.expand(inputs)
    splits = tuple(options.fractions())
    check_leaks = options.leak_check and len(splits) > 1
    own = lambda name: name.endswith((".jsonl", ".jsonl.gz")) or name in ("data_card.json", "DATA_CARD.md")
    with whole(pathlib.Path(output).expanduser(), options.overwrite, files, own) as folder:
        model, limit = _perplexity(options, progress)
        make = Stages(options, files, model=model, limit=limit, sketch=bool(options.near_dedup) or check_leaks)
        data = Collected(folder, files, make).read(progress)
        if not data.seen:
            raise UserError(f"the input holds no record ({data.removed.summary() or 'it is empty'})")
        kept = np.ones(len(data.records), bool)
        if options.near_dedup:
            progress("near-duplicates", 0, 1)
            _remove_near(data, kept, options.near_dedup)
        doubtful = _labels(data, kept, options, progress) if options.label_noise != "off" else {}
        if not kept.any():
            raise UserError(f"no record is left: {data.removed.summary()}")
        report = None
        if check_leaks:
            progress("leaks", 0, 1)
            report = leaks.find(data, kept, options.threshold(), splits)
            if report["leaks"] and not options.allow_leaks:
                raise leaks.Leaks(
                    report,
                    f"{leaks.summary(report)}. Nothing was written: --near_dedup={options.threshold():g} removes "
                    "duplicates, --group_field keeps groups together, --allow_leaks writes the splits as they are",
                )
        written = _write(data, kept, doubtful, folder, splits, progress)
        card = cards.build(data, kept, written, limit, report)
        (folder / "data_card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "DATA_CARD.md").write_text(cards.markdown(card), encoding="utf-8")
        data.discard()
    return card


def check(
    files: Sequence[tuple[str, str]], options: Options | None = None, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """The report of `leaks.find` on data that are split already.

    files: (split, file) pairs; a split may have several files, and the training data come first. Of the options those
    of collecting, normalising and comparing count.
    """
    options = dataclasses.replace(
        options or Options(), clean="none", scripts="", bad_words="", perplexity_sample="", exact_dedup=False
    )
    splits = list(dict.fromkeys(split for split, _ in files))
    if len(splits) < 2:
        raise UserError("a leak check needs two splits, such as --check=train=a.jsonl,test=b.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        found = [(splits.index(split), path) for split, pattern in files for path in lines.expand([pattern])]
        paths = [path for _, path in found]
        make = Stages(options, paths, [split for split, _ in found])
        data = Collected(pathlib.Path(folder), paths, make).read(progress)
        progress("leaks", 0, 1)
        return leaks.find(data, np.ones(len(data.records), bool), options.threshold(), splits)


def _perplexity(options: Options, progress: Progress) -> tuple[perplexity.CharNgram | None, float]:
    """The model of the clean sample, normalised as the data are, and the limit of bits per character."""
    if not options.perplexity_sample:
        return None, 0.0

    def texts() -> Iterator[str]:
        for path in lines.expand([options.perplexity_sample]):
            for number, line in lines.LineReader(path):
                text = lines.parse(line, f"{path}:{number}", options.text_field)[options.text_field]
                yield normalise(text, options.unicode, options.controls, options.whitespace, options.html)

    progress("fit the perplexity filter", 0, 1)
    model, limit = perplexity.fit(texts())
    return model, options.max_bits_per_char or limit


def _remove_near(data: Collected, kept: np.ndarray, threshold: float) -> None:
    """Takes all but the first of each cluster of near-duplicates out of `kept`."""
    within = data.records["within"]
    order = np.lexsort((within, data.records["content"]))  # the same in whatever order the files come
    first = minhash.components(data.signatures, data.keys(threshold, within), threshold, order)
    again = np.flatnonzero(first != np.arange(len(first)))
    kept[again] = False
    similar = minhash.similarity(data.signatures, again, first[again])
    for index, original, alike in zip(again.tolist(), first[again].tolist(), similar.tolist()):
        example = lambda index=index, original=original, alike=alike: {
            "where": data.where(index),
            "text": data.excerpt(index),
            "near": data.where(original),
            "similarity": round(alike, 3),
        }
        data.removed.add("near_dedup", f"similarity of {threshold:g}", 1, int(data.records["chars"][index]), example)


def _labels(data: Collected, kept: np.ndarray, options: Options, progress: Progress) -> dict[int, str]:
    """{index: likelier label} of the records with a doubtful label; with label_noise=remove out of `kept` as well."""
    field, indices = options.label_field, np.flatnonzero(kept)

    def records() -> Iterator[tuple[str, str, int]]:
        for index, line in data.lines(kept):
            record = json.loads(line)
            label = lines.plain_field(record, field, data.where(index))
            yield record[options.text_field], str(label), int(data.records["content"][index])

    progress("label noise", 0, 1)
    mask = kept.copy()
    doubtful = {int(indices[n]): label for n, label in labels.suspects(records)}
    for index, label in doubtful.items():
        example = lambda index=index, label=label: {
            "where": data.where(index),
            "text": data.excerpt(index),
            "likelier": label,
        }
        data.removed.add("labels", options.label_noise, 1, int(data.records["chars"][index]), example)
        mask[index] = False
    if options.label_noise == "remove":
        kept[:] = mask
    return doubtful


def _write(
    data: Collected,
    kept: np.ndarray,
    doubtful: dict[int, str],
    folder: pathlib.Path,
    splits: Sequence[str],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Writes the splits; {split: {"file": name, "sha256": hash}}."""
    ending = ".jsonl.gz" if data.make.options.compress else ".jsonl"
    with contextlib.ExitStack() as stack:
        files = []
        for split in splits:
            file = stack.enter_context((folder / f"{split}{ending}").open("wb"))
            if data.make.options.compress:  # without name and time, so that equal data give equal files
                file = stack.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0))
            files.append(file)
        part, total = data.records["split"], int(kept.sum())
        for n, (index, line) in enumerate(data.lines(kept)):
            if n % 4096 == 0:
                progress("write", n, total)
            if index in doubtful:
                line = lines.dump(json.loads(line) | {"label_suspect": doubtful[index]})
            files[part[index]].write(line)
    progress("write", total, total)
    written = {}
    for split in splits:
        with (folder / f"{split}{ending}").open("rb") as file:
            written[split] = {"file": f"{split}{ending}", "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return written
