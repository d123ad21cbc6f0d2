"""SentencePiece `.model` files: the parts of the protocol buffer that encoding needs, and the normalisation.

Source: Kudo & Richardson 2018 (arXiv:1808.06226); sentencepiece_model.proto of google/sentencepiece.
"""

import base64
import dataclasses
import re
import struct
from collections.abc import Iterator

from vfm.errors import UserError
from vfm.tokenizers.bpe import BPE, Joins
from vfm.tokenizers.charsmap import Charsmap
from vfm.tokenizers.decoders import BY_BYTE, Decoder
from vfm.tokenizers.normalizers import SPACE, Edit
from vfm.tokenizers.unigram import Unigram

_SPACES = re.compile("  +")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM_TYPE, BPE_TYPE = 1, 2
_MODEL_TYPES = {UNIGRAM_TYPE: "unigram", BPE_TYPE: "bpe", 3: "word", 4: "char"}


@dataclasses.dataclass
class Model:
    """What a `.model` file says. pieces: (token, score, type) by id."""

    pieces: list[tuple[str, float, int]]
    type: int = UNIGRAM_TYPE
    byte_fallback: bool = False
    suffix_space: bool = False
    unk_surface: str = " \u2047 "
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    unk_id: int = 0
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True
    escape_spaces: bool = True


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol-buffer message; fixed-size values as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            if at + size > len(data):
                raise ValueError(f"it ends within field {tag >> 3}")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"field {tag >> 3} has the wire type {kind}")
        yield tag >> 3, value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def parse(data: bytes, where: str) -> Model:
    """The contents of a `.model` file; a damaged one raises UserError that names `where`."""
    model = Model([])
    trainer = {3: "type", 24: "suffix_space", 35: "byte_fallback", 40: "unk_id", 41: "bos_id", 42: "eos_id"}
    trainer |= {43: "pad_id"}
    normalizer = {3: "dummy_prefix", 4: "remove_extra_spaces", 5: "escape_spaces"}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                model.pieces.append((piece.get(1, b"").decode("utf-8"), score, piece.get(3, NORMAL)))
            elif number == 2:
                for field, setting in _fields(value):
                    if field in trainer:
                        kind = type(getattr(model, trainer[field]))
                        setattr(model, trainer[field], kind(_signed(setting)))
                    elif field == 44:
                        model.unk_surface = setting.decode("utf-8")
            elif number == 3:
                for field, setting in _fields(value):
                    if field in normalizer:
                        setattr(model, normalizer[field], bool(setting))
                    elif field == 2:
                        model.charsmap = setting
    except (IndexError, ValueError, TypeError, AttributeError, struct.error) as error:
        reason = "it ends too early" if isinstance(error, IndexError) else error
        raise UserError(f"{where} is not a SentencePiece model: {reason}") from error
    if not model.pieces:
        raise UserError(f"{where} is not a SentencePiece model: it has no tokens")
    return model


def build(model: Model, where: str) -> BPE | Unigram:
    """The model of a `.model` file; types other than unigram and bpe raise UserError."""
    ids = {kind: [i for i, piece in enumerate(model.pieces) if piece[2] == kind] for kind in range(1, 7)}
    if model.type == UNIGRAM_TYPE:
        return Unigram(
            [(token, score) for token, score, _ in model.pieces],
            ids[UNKNOWN][0] if ids[UNKNOWN] else None,
            byte_fallback=model.byte_fallback,
            never=frozenset(ids[UNKNOWN] + ids[CONTROL] + ids[UNUSED] + ids[BYTE]),
            always=frozenset(ids[USER_DEFINED]),
            single=True,
        )
    if model.type != BPE_TYPE or ids[UNUSED]:
        kind = _MODEL_TYPES.get(model.type, str(model.type)) if model.type != BPE_TYPE else "bpe with unused tokens"
        raise UserError(f"{where}: SentencePiece models of type {kind!r} are not supported; unigram and bpe are")
    vocab = {token: i for i, (token, _, _) in enumerate(model.pieces)}
    order = sorted(ids[NORMAL], key=lambda i: (-model.pieces[i][1], i))
    return BPE(
        vocab,
        Joins({i: model.pieces[i][0] for i in ids[NORMAL]}, order),
        byte_level=False,
        byte_fallback=model.byte_fallback,
        unk_token=model.pieces[ids[UNKNOWN][0]][0] if ids[UNKNOWN] else None,
        fuse_unk=True,
    )


class Normalize:
    """The normalisation of a `.model` file: character map, spaces, and the space in front."""

    def __init__(self, model: Model):
        self.charsmap = Charsmap(model.charsmap)
        self.model = dataclasses.replace(model, pieces=[])
        kept = sorted((token for token, _, kind in model.pieces if kind == USER_DEFINED), key=len, reverse=True)
        self.kept = re.compile("|".join(map(re.escape, kept))) if kept else None

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """(characters read, text written) in order."""
        found, at = [], 0
        for match in self.kept.finditer(text) if self.kept else ():
            found += self.charsmap.pieces(text[at : match.start()])
            found.append((len(match[0]), match[0]))
            at = match.end()
        found += self.charsmap.pieces(text[at:])
        if self.model.remove_extra_spaces:
            found = _single_spaces(found)
        if not any(out for _, out in found):
            return [(read, "") for read, _ in found]
        if self.model.dummy_prefix:
            found = [*found, (0, " ")] if self.model.suffix_space else [(0, " "), *found]
        space = SPACE if self.model.escape_spaces else " "
        return [(read, out.replace(" ", space)) for read, out in found]

    def __call__(self, text: str) -> str:
        found, at = [], 0
        for match in self.kept.finditer(text) if self.kept else ():
            found += [self.charsmap(text[at : match.start()]), match[0]]
            at = match.end()
        text = "".join(found) + self.charsmap(text[at:] if at else text)
        if self.model.remove_extra_spaces:
            text = _SPACES.sub(" ", text.strip(" "))
        if text and self.model.dummy_prefix:
            text = f"{text} " if self.model.suffix_space else f" {text}"
        return text.replace(" ", SPACE) if self.model.escape_spaces else text


def _single_spaces(pieces: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Without spaces at the ends and after spaces."""
    found, after_space = [], True
    for read, out in pieces:
        out = out.lstrip(" ") if after_space else out
        after_space = out.endswith(" ") if out else after_space
        found.append((read, out))
    for i in range(len(found) - 1, -1, -1):
        found[i] = (found[i][0], found[i][1].rstrip(" "))
        if found[i][1]:
            break
    return found


def edit(model: Model) -> Edit:
    """The normalisation of a `.model` file."""
    normalize = Normalize(model)
    return Edit(normalize, normalize.pieces)


class SentencePieceDecoder(Decoder):
    """The way back from the ids of a `.model` file. model: kept for what a `tokenizer.json` says about it."""

    def __init__(self, model: Model):
        self.model = model
        rest, raw = {}, {}
        for i, (token, _, kind) in enumerate(model.pieces):
            if kind == BYTE:
                raw[i] = bytes([int(token[3:5], 16)])
            elif kind == UNKNOWN:
                rest[i] = model.unk_surface.encode("utf-8")
            else:
                rest[i] = token.replace(SPACE, " ").encode("utf-8")
        strips = model.dummy_prefix or model.remove_extra_spaces
        unknown = [i for i, piece in enumerate(model.pieces) if piece[2] == UNKNOWN]
        super().__init__(
            rest | raw,
            exact=[*raw, *unknown],
            spaces=int(strips),
            each=model.remove_extra_spaces,
            errors=BY_BYTE,
            shown=unknown,
        )


def template(roles: dict[str, str], ids: dict[str, int]) -> dict:
    """The post-processor that puts the bos and eos tokens around a text."""

    def token(role: str, kind: int) -> list[dict]:
        return [{"SpecialToken": {"id": roles[role], "type_id": kind}}] if role in roles else []

    def text(name: str, kind: int) -> list[dict]:
        return token("bos", kind) + [{"Sequence": {"id": name, "type_id": kind}}] + token("eos", kind)

    used = {roles[role] for role in ("bos", "eos") if role in roles}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in sorted(used)},
    }


def components(model: Model) -> dict[str, dict | None]:
    """Normalizer, pre-tokenizer and decoder of a `tokenizer.json` for a `.model` file."""
    edits: list[dict] = []
    if model.charsmap:
        edits.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.remove_extra_spaces:
        edits.append({"type": "Strip", "strip_left": True, "strip_right": True})
        edits.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.suffix_space or not model.escape_spaces:
        raise UserError("SentencePiece models with spaces behind words, or with plain spaces, have no tokenizer.json")
    if model.dummy_prefix:
        edits.append({"type": "Prepend", "prepend": SPACE})
    edits.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}] if model.byte_fallback else []
    steps.append({"type": "Fuse"})
    if model.dummy_prefix or model.remove_extra_spaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": edits},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
    }
