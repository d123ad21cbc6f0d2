"""Post-processors: the tokens that are put around texts, by the components of `tokenizer.json`."""

from vfm.errors import unknown

_KNOWN = ("BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing")


def _flat(spec: dict | None) -> list[dict]:
    if spec is None:
        return []
    if spec["type"] not in _KNOWN:
        raise unknown("component", spec["type"], _KNOWN, "post_processor")
    return [s for part in spec["processors"] for s in _flat(part)] if spec["type"] == "Sequence" else [spec]


def trims_offsets(spec: dict | None) -> tuple[bool, bool]:
    """Whether spaces do not count to the offsets of a token, and whether one was put in front of the text."""
    steps = [step for step in _flat(spec) if step["type"] in ("ByteLevel", "RobertaProcessing")]
    trims = [step for step in steps if step.get("trim_offsets", True)]
    return bool(trims), any(step.get("add_prefix_space", True) for step in trims)


def template(spec: dict | None, key: str) -> list[tuple[int | str, int]]:
    """(id, or "A" and "B" for the texts; type id) in order. key: "single" or "pair"."""
    found: list[tuple[int | str, int]] = [("A", 0), ("B", 1)] if key == "pair" else [("A", 0)]
    for step in _flat(spec):
        if step["type"] == "TemplateProcessing":
            found = _resolved(step, key)
        elif step["type"] != "ByteLevel":
            cls, sep, bert = step["cls"][1], step["sep"][1], step["type"] == "BertProcessing"
            found = [(cls, 0), ("A", 0), (sep, 0)]
            if key == "pair":
                found += [("B", 1), (sep, 1)] if bert else [(sep, 0), ("B", 0), (sep, 0)]
    return found


def _resolved(step: dict, key: str) -> list[tuple[int | str, int]]:
    tokens, found = step.get("special_tokens", {}), []
    for part in step[key]:
        ((kind, item),) = part.items()
        if kind == "Sequence":
            found.append((item["id"], item["type_id"]))
        elif item["id"] not in tokens:
            raise unknown("token", item["id"], tokens, "post_processor")
        else:
            found += [(i, item["type_id"]) for i in tokens[item["id"]]["ids"]]
    return found
