"""What two splits share: equal texts, near-duplicates, groups."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vfm.data.prepare import minhash
from vfm.data.prepare.collect import Collected
from vfm.errors import UserError


class Leaks(UserError):
    """Splits that share texts or groups; `report` says which."""

    def __init__(self, report: dict[str, Any], message: str):
        super().__init__(message)
        self.report = report


def find(data: Collected, kept: np.ndarray, threshold: float, splits: Sequence[str]) -> dict[str, Any]:
    """A report of what each split shares with those before it; "leaks" is the number of records and groups.

    pairs: for each pair of splits, how many records of `split` have an equal text (equal), or else a near-duplicate
    of this similarity (near), in `against`, and how many groups are in both. A text that is a small part of another
    is not alike in this sense, and is not found.
    """
    keys = data.keys(threshold)
    pairs = [
        _pair(data, kept, keys, threshold, (later, split), (earlier, against))
        for later, split in enumerate(splits)
        for earlier, against in enumerate(splits[:later])
    ]
    total = sum(pair[kind] for pair in pairs for kind in ("equal", "near", "groups"))
    return {"threshold": threshold, "leaks": total, "pairs": pairs}


def _pair(
    data: Collected,
    kept: np.ndarray,
    keys: np.ndarray,
    threshold: float,
    split: tuple[int, str],
    against: tuple[int, str],
) -> dict[str, Any]:
    """What two splits, each (number, name), share."""
    records = data.records
    ask, among = (np.flatnonzero(kept & (records["split"] == number)) for number, _ in (split, against))
    content, first = np.unique(records["content"][among], return_index=True)
    place = np.searchsorted(content, records["content"][ask])
    place[place == len(content)] = 0
    equal = np.zeros(len(ask), bool) if not len(content) else content[place] == records["content"][ask]
    found = {"equal": (ask[equal], among[first[place[equal]]] if equal.any() else ask[:0])}
    rest = ask[~equal]
    partner = minhash.matches(data.signatures, keys, threshold, among, rest)
    found["near"] = rest[partner >= 0], partner[partner >= 0]
    found["groups"] = ask[:0], among[:0]
    if data.make.options.group_field:
        _, i, j = np.intersect1d(records["group"][ask], records["group"][among], return_indices=True)
        found["groups"] = ask[i], among[j]
    examples = [
        {
            "kind": kind,
            split[1]: data.where(a),
            against[1]: data.where(b),
            "similarity": round(float((data.signatures[a] == data.signatures[b]).mean()), 3),
            "text": data.excerpt(a),
        }
        for kind, (i, j) in found.items()
        for a, b in list(zip(i.tolist(), j.tolist()))[: data.make.options.examples]
    ]
    counts = {kind: len(i) for kind, (i, _) in found.items()}
    return {"split": split[1], "against": against[1], "records": len(ask), **counts, "examples": examples}


def summary(report: dict[str, Any]) -> str:
    """One line: what is shared by which splits, and the first place."""
    parts = []
    for pair in report["pairs"]:
        counts = {"equal texts": pair["equal"], "near-duplicates": pair["near"], "common groups": pair["groups"]}
        if found := [f"{count} {kind}" for kind, count in counts.items() if count]:
            example = pair["examples"][0] if pair["examples"] else None
            place = f" (such as {example[pair['split']]} and {example[pair['against']]})" if example else ""
            parts.append(f"{pair['split']} and {pair['against']} share {', '.join(found)}{place}")
    return "; ".join(parts) or "no leak between splits"
