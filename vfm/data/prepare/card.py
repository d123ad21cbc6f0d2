"""The data card of a prepared corpus: where it comes from, what each step did, what it holds."""

import dataclasses
import datetime
import importlib.metadata
import platform
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vfm.data.prepare import clean
from vfm.data.prepare.collect import Collected


def build(
    data: Collected,
    kept: np.ndarray,
    written: Mapping[str, Mapping[str, Any]],
    limit: float,
    report: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The card, ready for JSON.

    data, kept: what was collected, and which of it is written. written: {split: file and hash}, in the order of the
    splits' numbers. limit: bits per character of the perplexity filter. report: of the leak check, None without one.
    """
    options, records = data.make.options, data.records[kept]
    sources = {}
    for source in sorted({source for source, _ in data.seen}):
        number = data.names["source"].index(source) if source in data.names["source"] else -1
        own = records[records["source"] == number]
        sources[source] = {
            "records_in": data.seen[source, "records"],
            "chars_in": data.seen[source, "chars"],
            "bytes_in": data.seen[source, "bytes"],
            **_size(own),
            "licences": _counts(own["licence"], data.names["licence"]),
            "scripts": _counts(own["script"], data.names["script"]),
        }
    splits = {}
    for number, (split, file) in enumerate(written.items()):
        own = records[records["split"] == number]
        splits[split] = {**file, **_size(own), "groups": len(np.unique(own["group"])) if options.group_field else None}
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": [
            {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(data.files, data.sha256)
        ],
        "records_in": sum(count for (_, kind), count in data.seen.items() if kind == "records"),
        "total": _size(records),
        "sources": sources,
        "steps": _steps(data, limit),
        "splits": splits,
        "leak_check": report,
        "options": dataclasses.asdict(options),
        "versions": _versions(options.chinese != "characters", options.label_noise != "off"),
    }


def _steps(data: Collected, limit: float) -> list[dict[str, Any]]:
    """What each step removed and changed, in order."""
    options, removed = data.make.options, data.removed
    rules = data.make.cleaner.rules
    limits = {name: f"{(clean.RULES | clean.LINE_RULES)[name]}: {value:g}" for name, value in rules.items()}
    if limit:
        limits["perplexity"] = f"bits per character in a character n-gram model of the sample, at most: {limit:.3f}"
    step = lambda name, on, **more: {"step": name, "on": on, "removed": removed.of(name), **more}
    return [
        step("collect", True),
        step("normalise", True, changed_records=data.changed["normalise"]),
        step(
            "clean",
            bool(limits),
            rules=limits,
            changed_records=data.changed["clean"],
            chars_of_cut_lines=data.changed["clean_chars"],
        ),
        step("exact_dedup", options.exact_dedup),
        step("near_dedup", bool(options.near_dedup)),
        step("labels", options.label_noise != "off"),
    ]


def _size(records: np.ndarray) -> dict[str, int]:
    return {"records": len(records), "chars": int(records["chars"].sum()), "bytes": int(records["bytes"].sum())}


def _counts(numbers: np.ndarray, names: list[str]) -> dict[str, int]:
    found = {names[n] or "not stated": int(count) for n, count in zip(*np.unique(numbers, return_counts=True))}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _versions(chinese: bool, sklearn: bool) -> dict[str, str]:
    packages = ["vfm", "numpy"] + ["scikit-learn"] * sklearn + ["rjieba"] * chinese
    found = {"python": platform.python_version(), "unicode": unicodedata.unidata_version}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def markdown(card: Mapping[str, Any]) -> str:
    """The card to read."""
    total = card["total"]
    parts = [
        "# Data card",
        f"{total['records']:,} of {card['records_in']:,} records, {total['chars']:,} characters, {total['bytes']:,} "
        f"bytes of text. Made by `python -m experiments.prepare` on {card['created'][:10]}.",
        "## Splits",
        _table(
            ("split", "file", "records", "characters", "bytes", "groups"),
            (
                (
                    name,
                    f"`{s['file']}`",
                    s["records"],
                    s["chars"],
                    s["bytes"],
                    "" if s["groups"] is None else s["groups"],
                )
                for name, s in card["splits"].items()
            ),
        ),
        "## Sources",
        _table(
            ("source", "records in", "records", "characters", "bytes", "licences", "scripts"),
            (
                (name, s["records_in"], s["records"], s["chars"], s["bytes"], _list(s["licences"]), _list(s["scripts"]))
                for name, s in card["sources"].items()
            ),
        ),
        "## What each step did",
    ]
    rows = []
    for step in card["steps"]:
        for rule, entry in step["removed"].items():
            kind = "flagged" if (step["step"], rule) == ("labels", "flag") else "removed"
            rows.append((step["step"], rule, f"{kind} {entry['records']:,}", entry["chars"]))
        if step.get("changed_records"):
            rows.append((step["step"], "", f"changed {step['changed_records']:,}", step.get("chars_of_cut_lines", "")))
        if not step["on"]:
            rows.append((step["step"], "", "off", ""))
        elif not step["removed"] and not step.get("changed_records"):
            rows.append((step["step"], "", "nothing", ""))
    parts.append(_table(("step", "rule", "records", "characters"), rows))
    if rules := next(step for step in card["steps"] if step["step"] == "clean")["rules"]:
        parts += ["Cleaning rules, the first one that a record breaks counts:"]
        parts.append("\n".join(f"* `{name}`: {meaning}" for name, meaning in rules.items()))
    examples = [
        f"* {step['step']}, {rule}: "
        + ", ".join(f"{key} {value}" for key, value in example.items() if key != "text")
        + f": `{_code(example['text'])}`"
        for step in card["steps"]
        for rule, entry in step["removed"].items()
        for example in entry["examples"]
    ]
    if examples:
        parts += ["## Examples", "\n".join(examples)]
    parts += ["## Leaks between splits", leak_table(card["leak_check"])]
    parts += [
        "## Inputs",
        _table(("file", "bytes", "SHA-256"), ((f"`{i['file']}`", i["bytes"], i["sha256"]) for i in card["inputs"])),
        "## Options and versions",
        "\n".join(f"* `{name}`: {value!r}" for name, value in card["options"].items()),
        "\n".join(f"* {name} {version}" for name, version in card["versions"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def leak_table(report: Mapping[str, Any] | None) -> str:
    """The report of a leak check as a table with examples."""
    if report is None:
        return "Not checked."
    lines = [
        f"Near-duplicates from a similarity of {report['threshold']:g} on.",
        "",
        _table(
            ("split", "records", "against", "equal texts", "near-duplicates", "common groups"),
            ((p["split"], p["records"], p["against"], p["equal"], p["near"], p["groups"]) for p in report["pairs"]),
        ),
    ]
    for pair in report["pairs"]:
        for example in pair["examples"]:
            here, there = example[pair["split"]], example[pair["against"]]
            lines.append(
                f"* {example['kind']}: {here} and {there}, similarity {example['similarity']}: "
                f"`{_code(example['text'])}`"
            )
    return "\n".join(lines)


def _list(counts: Mapping[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:4]]
    return ", ".join(shown + ["…"] * (len(counts) > 4))


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())[:100]


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    cell = lambda value: f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")
    head, rows = list(head), [list(map(cell, row)) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
