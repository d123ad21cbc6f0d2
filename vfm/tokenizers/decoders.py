"""Decoders: the bytes that ids stand for, by the components of `tokenizer.json` or a SentencePiece model."""

import codecs
import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from vfm.errors import UserError, unknown
from vfm.tokenizers.bpe import to_bytes
from vfm.tokenizers.normalizers import SPACE

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BY_BYTE = "vfm.replace_each_byte"
codecs.register_error(BY_BYTE, lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Decoder:
    """Bytes of ids.

    rest, first: id -> bytes of a token within a text, and at its beginning. spaces: how many spaces are left out at
    the beginning; each: this many of every token there, as long as nothing else has been written; exact: ids that keep
    theirs. gap: a space at the end of a token is written only if another token follows. errors: how bytes that are not
    UTF-8 become text (`bytes.decode`). shown: special tokens that are not left out.
    """

    def __init__(
        self,
        rest: Mapping[int, bytes],
        first: Mapping[int, bytes] | None = None,
        *,
        exact: Iterable[int] = (),
        spaces: int = 0,
        each: bool = False,
        gap: bool = False,
        errors: str = "replace",
        shown: Iterable[int] = (),
    ):
        self.rest, self.first, self.exact = dict(rest), dict(rest if first is None else first), frozenset(exact)
        self.spaces, self.each, self.gap, self.errors, self.shown = spaces, each, gap, errors, frozenset(shown)
        self.simple = first is None and not spaces and not gap

    def parts(self, ids: Iterable[int]) -> Iterable[bytes]:
        """The bytes of each id in turn, for ids that follow each other from the beginning of a text."""
        if self.simple:
            yield from map(self.rest.__getitem__, ids)
            return
        begun, left, held = False, self.spaces, b""
        for at, i in enumerate(ids):
            part = (self.rest if at else self.first)[i]
            if not begun and left and i not in self.exact:
                stripped = part[left:] if part.startswith(b" " * left) else part.lstrip(b" ")
                left = left if self.each else left - (len(part) - len(stripped))
                part = stripped
            begun = begun or bool(part)
            part = held + part
            held = b" " if self.gap and part.endswith(b" ") else b""
            yield part.removesuffix(b" ") if held else part


class Stream:
    """Text of ids that arrive one by one: `push(id)` gives what can be told so far, `finish()` the rest.

    A character whose bytes are spread over several ids comes with the last of them. Together it is the text of all.
    parts: ids -> the bytes of each, one by one. kept: id -> [id], or [] if it is left out. errors: see `Decoder`.
    """

    def __init__(
        self,
        parts: Callable[[Iterator[int]], Iterable[bytes]],
        kept: Callable[[int], list[int]],
        errors: str = "replace",
    ):
        self._waiting: collections.deque[int] = collections.deque()
        self._parts = iter(parts(iter(self._waiting.popleft, None)))
        self._kept, self._text = kept, codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, i: int) -> str:
        """The text that this id completes; an id outside the vocabulary raises UserError."""
        kept = self._kept(i)
        self._waiting.extend(kept)
        return "".join(self._text.decode(next(self._parts)) for _ in kept)

    def finish(self) -> str:
        """The text of the bytes that are left, U+FFFD where a character is incomplete."""
        return self._text.decode(b"", final=True)


def _clean(text: str) -> str:
    """The spaces that BERT's decoder takes away again."""
    for old, new in (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
        (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
    ):  # fmt: skip
        text = text.replace(old, new)
    return text


def build(spec: dict | None, tokens: Mapping[int, str], added: Mapping[int, str]) -> Decoder:
    """The decoder of a `tokenizer.json`.

    tokens: id -> token of the model. added: id -> text of the added tokens, which stand for themselves.
    A component that is not supported raises UserError.
    """
    steps = [] if spec is None else spec["decoders"] if spec["type"] == "Sequence" else [spec]
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if byte_level:
        if len(steps) > 1:
            raise UserError("decoder 'Sequence': 'ByteLevel' together with others is not supported")
        rest = {i: to_bytes(token) for i, token in tokens.items()}
        return Decoder(rest | {i: text.encode("utf-8") for i, text in added.items()})
    rest = first = dict(tokens) | dict(added)
    options, raw, fused = {}, {}, False
    if not steps:  # without a decoder, tokens are joined by spaces
        rest = {i: f" {token}" for i, token in rest.items()}
    for step in steps:
        kind = step["type"]
        if kind == "WordPiece":
            prefix, clean = step.get("prefix", "##"), _clean if step.get("cleanup", True) else str
            first = {i: clean(token) for i, token in first.items()}
            rest = {
                i: clean(token.removeprefix(prefix) if token.startswith(prefix) else f" {token}")
                for i, token in rest.items()
            }
        elif kind == "Metaspace":
            mark = step.get("replacement", SPACE)
            drop = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
            first = {i: token.replace(mark, "" if drop else " ") for i, token in first.items()}
            rest = {i: token.replace(mark, " ") for i, token in rest.items()}
        elif kind == "Replace" and "String" in step["pattern"]:
            old, new = step["pattern"]["String"], step["content"]
            first = {i: token.replace(old, new) for i, token in first.items()}
            rest = {i: token.replace(old, new) for i, token in rest.items()}
        elif kind == "ByteFallback":
            raw = {i: int(found[1], 16) for i, token in tokens.items() if (found := _BYTE.fullmatch(token))}
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step["content"] == " " and not step.get("stop"):
            options["spaces"] = step["start"]
        elif kind == "BPEDecoder":
            suffix = step.get("suffix", "</w>")
            rest = first = {i: token.replace(suffix, " ") for i, token in rest.items()}
            options["gap"] = True
        else:
            known = ("BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip")
            if kind in known:
                raise UserError(f"decoder {kind!r} with these options is not supported: {step}")
            raise unknown("component", kind, (*known, "WordPiece"), "decoder")

    def encoded(table: dict[int, str]) -> dict[int, bytes]:
        written = {i: token.encode("utf-8", "surrogatepass") for i, token in table.items()}
        return written | {i: bytes([byte]) for i, byte in raw.items()}

    return Decoder(
        encoded(rest),
        None if first is rest else encoded(first),
        exact=raw,
        errors=BY_BYTE if raw else "replace",
        **options,
    )
