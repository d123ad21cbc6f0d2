"""Pre-tokenizers: how a normalised text is split into words, by the components of `tokenizer.json`."""

import functools
import re
from collections.abc import Callable

from vfm.errors import unknown
from vfm.tokenizers import unicode16
from vfm.tokenizers.normalizers import SPACE, Edit, prepend, replace
from vfm.tokenizers.split import GPT2, Splitter, isolated, partition, shadow

BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


class Cut:
    """A way to split: `cut(text)` gives the words, `cut.spans(text)` their (start, end).

    local: the splitter whose `blocks` may cut a long text first, if there is one.
    """

    def __init__(self, spans: Callable, words: Callable | None = None, local: Splitter | None = None):
        self.spans = spans
        self.words = words or functools.partial(_words, spans)
        self.local = local

    def __call__(self, text: str) -> list[str]:
        return self.words(text)


def _words(spans: Callable, text: str) -> list[str]:
    return [text[start:end] for start, end in spans(text)]


def _behave(matches: Callable, behavior: str, invert: bool, text: str) -> list[tuple[int, int]]:
    """Spans of the words when the matches of a pattern are delimiters (with invert: what is between them)."""
    parts = [(start, end, match != invert) for start, end, match in partition(matches, text)]
    if behavior == "Removed":
        return [(start, end) for start, end, delimiter in parts if not delimiter]
    if behavior == "Isolated":
        return [(start, end) for start, end, _ in parts]
    found: list[list] = []
    joined = False  # whether the next part belongs to the last one
    for start, end, delimiter in parts:
        if found and (
            (behavior == "MergedWithPrevious" and delimiter and not found[-1][2])
            or (behavior == "MergedWithNext" and joined and not delimiter)
            or (behavior == "Contiguous" and delimiter == found[-1][2])
        ):
            found[-1][1] = end
            found[-1][2] = delimiter
        else:
            found.append([start, end, delimiter])
        joined = delimiter
    return [(start, end) for start, end, _ in found]


def delimited(splitter: Splitter, behavior: str, invert: bool = False) -> Cut:
    """Splits at the matches of a pattern, as the component `Split` does."""
    local = splitter if splitter.local and behavior == "Isolated" else None
    words = None
    if behavior == "Removed" and invert:
        words = splitter.findall
    elif behavior == "Isolated":
        words = functools.partial(isolated, splitter)
    return Cut(functools.partial(_behave, splitter.spans, behavior, invert), words, local)


def _matches(pattern: re.Pattern, text: str) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(shadow(text))]


@functools.cache
def _set(*names: str, extra: str = "") -> str:
    spans = [(a, min(b, 0xFFFF)) for name in names for a, b in unicode16.ranges(name) if a <= 0xFFFF]
    return unicode16.char_class(spans) + "".join(map(re.escape, extra))


def _is_bert_punctuation(char: str) -> bool:
    # All signs of ASCII, and two characters that have been in another category since.
    return char in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u166d\U000111c9" or (
        unicode16.category(char)[0] == "P" and char not in unicode16.newer()
    )


_punctuation = functools.lru_cache(maxsize=1 << 16)(_is_bert_punctuation)


def _punctuation_matches(text: str) -> list[tuple[int, int]]:
    return [(i, i + 1) for i, char in enumerate(text) if _punctuation(char)]


_SPACES = re.compile(f"[{re.escape(unicode16.WHITE_SPACE)}]+")
_NOT_SPACES = re.compile(f"[^{re.escape(unicode16.WHITE_SPACE)}]+")


def _pieces_at(mark: str, text: str) -> list[str]:
    """Splits in front of each mark."""
    first, *rest = text.split(mark)
    return ([first] if first else []) + [mark + part for part in rest]


def _spans_at(mark: str, text: str) -> list[tuple[int, int]]:
    ends = [i for i, char in enumerate(text) if char == mark and i] + [len(text)]
    return list(zip([0, *ends], ends)) if text else []


def metaspace(spec: dict) -> list[Edit | Cut]:
    """Spaces become visible, one may be put in front, and words begin with them (SentencePiece)."""
    mark = spec.get("replacement", SPACE)
    scheme = spec.get("prepend_scheme", "always" if spec.get("add_prefix_space", True) else "never")
    if scheme not in ("always", "first", "never"):
        raise unknown("prepend_scheme", scheme, ("always", "first", "never"), "pre_tokenizer 'Metaspace'")
    steps: list[Edit | Cut] = [replace({"String": " "}, mark, "pre_tokenizer 'Metaspace'")]
    if scheme != "never":
        steps.append(prepend(mark, unless=mark, only_first=scheme == "first"))
    if spec.get("split", True):
        steps.append(Cut(functools.partial(_spans_at, mark), functools.partial(_pieces_at, mark)))
    return steps


def _steps(spec: dict, where: str) -> list[Edit | Cut]:
    kind = spec["type"]
    if kind == "Sequence":
        return build(spec["pretokenizers"], where)
    if kind == "ByteLevel":
        steps: list[Edit | Cut] = [prepend(" ", unless=" ")] if spec.get("add_prefix_space", True) else []
        return steps + ([delimited(Splitter(GPT2), "Isolated")] if spec.get("use_regex", True) else [])
    if kind == "Split":
        if spec["behavior"] not in BEHAVIORS:
            raise unknown("behavior", spec["behavior"], BEHAVIORS, f"{where} 'Split'")
        pattern = spec["pattern"]
        source = pattern["Regex"] if "Regex" in pattern else re.sub(r"(\W)", r"\\\1", pattern["String"])
        return [delimited(Splitter(source, f"{where} 'Split'"), spec["behavior"], spec.get("invert", False))]
    if kind == "Metaspace":
        return metaspace(spec)
    if kind == "WhitespaceSplit":
        return [Cut(functools.partial(_matches, _NOT_SPACES))]
    if kind == "Whitespace":
        return [delimited(Splitter(r"\w+|[^\w\s]+"), "Removed", invert=True)]
    if kind == "BertPreTokenizer":
        spaces = functools.partial(_behave, functools.partial(_matches, _SPACES), "Removed", False)
        return [Cut(spaces), Cut(functools.partial(_behave, _punctuation_matches, "Isolated", False))]
    if kind == "Punctuation":
        behavior = spec.get("behavior", "Isolated")
        if behavior not in BEHAVIORS:
            raise unknown("behavior", behavior, BEHAVIORS, f"{where} 'Punctuation'")
        return [Cut(functools.partial(_behave, _punctuation_matches, behavior, False))]
    if kind == "Digits":
        one = re.compile(f"[{_set('N')}]{'' if spec.get('individual_digits', False) else '+'}")
        return [Cut(functools.partial(_behave, functools.partial(_matches, one), "Isolated", False))]
    raise unknown(
        "component", kind, ("Sequence", "ByteLevel", "Split", "Metaspace", "WhitespaceSplit", "Whitespace",
                            "BertPreTokenizer", "Punctuation", "Digits"), where
    )  # fmt: skip


def build(specs: list[dict], where: str = "pre_tokenizer") -> list[Edit | Cut]:
    """The steps of pre-tokenizer components, in order; one that is not supported raises UserError."""
    return [step for spec in specs for step in _steps(spec, where)]


def is_byte_level(spec: dict | None) -> bool:
    """Whether words are encoded as their bytes, which is what the component `ByteLevel` is for."""
    if spec is None:
        return False
    if spec["type"] == "Sequence":
        return any(map(is_byte_level, spec["pretokenizers"]))
    return spec["type"] == "ByteLevel"
