"""Files of tokenizers: `load` finds out what a file or folder is, `save` writes a folder.

Read and written: tokenizer.json (Hugging Face), vocab.json with merges.txt, tiktoken ranks. Read: SentencePiece
models, vocab.txt (BERT). What a file does not support ends in one line that names it.
"""

import base64
import binascii
import json
import pathlib
from collections.abc import Mapping, Sequence

from vfm.errors import UserError, unknown
from vfm.tokenizers import decoders, sentencepiece
from vfm.tokenizers.added import AddedToken
from vfm.tokenizers.bpe import BPE, BYTE_OF, Joins, byte_characters, to_bytes, to_characters
from vfm.tokenizers.split import PATTERNS
from vfm.tokenizers.tokenizer import Tokenizer
from vfm.tokenizers.unigram import Unigram
from vfm.tokenizers.wordpiece import WordPiece

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# The later one counts where a file names both.
_ROLES = {"cls_token": "bos", "bos_token": "bos", "sep_token": "eos", "eos_token": "eos", "pad_token": "pad"}
_FILES = "tokenizer.json, *.model (SentencePiece), vocab.json with merges.txt, vocab.txt (WordPiece), *.tiktoken"


def load(path: str | pathlib.Path, *, pattern: str = "", special: Sequence[str] | Mapping[str, int] = ()) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds one.

    pattern: for tiktoken ranks, which do not say how text is split: a name of `split.PATTERNS` or an expression.
    special: special tokens that are added where the tokenizer has them not; ids follow the others unless given.
    Truncation and padding that a tokenizer.json asks for are left to whoever makes batches.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise UserError(f"tokenizer {str(path)!r} does not exist; expected a folder or file: {_FILES}")
    file = _find(path) if path.is_dir() else path
    names = _names(file.parent)
    if file.suffix == ".json" and file.name != "vocab.json":
        tokenizer = from_json(_read_json(file), str(file), names)
    elif file.suffix == ".model":
        tokenizer = from_sentencepiece(file.read_bytes(), str(file), names)
    elif file.name in ("vocab.json", "merges.txt"):
        tokenizer = _from_merges(file.parent, names)
    elif file.name == "vocab.txt":
        tokenizer = _from_vocab_txt(file, names)
    elif file.suffix == ".tiktoken":
        tokenizer = from_tiktoken(file.read_bytes(), str(file), pattern, names)
    else:
        raise UserError(f"tokenizer {str(file)!r} is of no known kind; expected {_FILES}")
    if isinstance(special, Mapping):
        added = [AddedToken(name, i) for name, i in special.items() if name not in tokenizer.special]
        return tokenizer.with_added([*tokenizer.added, *added])
    return tokenizer.with_special(special) if special else tokenizer


def _find(folder: pathlib.Path) -> pathlib.Path:
    for pattern in ("tokenizer.json", "tokenizer.model", "*.model", "vocab.json", "vocab.txt", "*.tiktoken"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            files = ", ".join(file.name for file in found)
            raise UserError(f"folder {str(folder)!r} has several tokenizers; name one: {files}")
        if found:
            return found[0]
    raise UserError(f"folder {str(folder)!r} has no tokenizer; expected one of {_FILES}")


def _read_json(file: pathlib.Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(file)!r} holds a {type(value).__name__}, not a JSON object")
    return value


def _names(folder: pathlib.Path) -> dict[str, str]:
    """Which tokens are bos, eos and pad, where the files beside the tokenizer say it."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        config = _read_json(folder / name)
        for key, role in _ROLES.items():
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[role] = value
    return found


# tokenizer.json


def from_json(spec: dict, where: str = "tokenizer.json", names: Mapping[str, str] | None = None) -> Tokenizer:
    """The tokenizer of the contents of a `tokenizer.json`; names: which tokens are "bos", "eos" and "pad"."""
    try:
        if not isinstance(spec.get("model"), dict):
            raise UserError("it has no `model`")
        added = [
            AddedToken(token["content"], token["id"], **{flag: token.get(flag, False) for flag in _FLAGS})
            for token in spec.get("added_tokens") or ()
        ]
        byte_level = _has(spec.get("pre_tokenizer"), "ByteLevel", "pretokenizers")
        model = _model(spec["model"], byte_level, frozenset(token.id for token in added if token.special))
        present = {token.content for token in added} | model.vocab.keys()
        return Tokenizer(
            model,
            **{key: spec.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")},
            added=added,
            names={role: name for role, name in (names or {}).items() if name in present},
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, StopIteration) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where} is not a well-formed tokenizer.json: {what}") from error


def _has(spec: dict | None, kind: str, parts: str) -> bool:
    return spec is not None and (spec["type"] == kind or any(_has(part, kind, parts) for part in spec.get(parts, ())))


def _model(spec: dict, byte_level: bool, never: frozenset[int]) -> BPE | Unigram | WordPiece:
    kind = spec.get("type") or ("BPE" if "merges" in spec else "Unigram" if "unk_id" in spec else "WordPiece")
    if kind == "BPE":
        if spec.get("dropout"):
            raise UserError(f"model 'BPE' with dropout={spec['dropout']} is not supported")
        return BPE(
            _vocab(spec["vocab"]),
            [_merge(merge, number) for number, merge in enumerate(spec["merges"], start=1)],
            byte_level=byte_level,
            byte_fallback=spec.get("byte_fallback", False),
            unk_token=spec.get("unk_token"),
            fuse_unk=spec.get("fuse_unk", False),
            ignore_merges=spec.get("ignore_merges", False),
            prefix=spec.get("continuing_subword_prefix") or "",
            suffix=spec.get("end_of_word_suffix") or "",
            never=never,
        )
    if kind == "Unigram":
        pieces = [(str(token), float(score)) for token, score in spec["vocab"]]
        return Unigram(pieces, spec.get("unk_id"), byte_fallback=spec.get("byte_fallback", False), never=never)
    if kind == "WordPiece":
        return WordPiece(
            _vocab(spec["vocab"]),
            unk_token=spec.get("unk_token", "[UNK]"),
            prefix=spec.get("continuing_subword_prefix", "##"),
            max_chars=spec.get("max_input_chars_per_word", 100),
            never=never,
        )
    raise unknown("model", kind, ("BPE", "Unigram", "WordPiece"))


def _vocab(vocab: dict) -> dict[str, int]:
    owner: dict[int, str] = {}
    for token, i in vocab.items():
        if type(i) is not int or i < 0:
            raise UserError(f"token {token!r} has the id {i!r}, which is not a number from 0 on")
        if i in owner:
            raise UserError(f"tokens {owner[i]!r} and {token!r} have the same id {i}")
        owner[i] = token
    if not vocab:
        raise UserError("the vocabulary is empty")
    return vocab


def _merge(merge, number: int) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise UserError(f"merge {number} is {merge!r}, not two tokens")
    return parts[0], parts[1]


def to_json(tokenizer: Tokenizer) -> dict:
    """The contents of a `tokenizer.json` that Hugging Face `tokenizers` reads to the same ids.

    Of a SentencePiece unigram model it is an approximation: `tokenizers` normalises a few rare characters otherwise.
    """
    model, components = tokenizer.model, dict(tokenizer.components)
    if isinstance(components["decoder"], decoders.Decoder):
        components |= sentencepiece.components(components["decoder"].model)
    if isinstance(model, BPE):
        written = {
            "dropout": None,
            "unk_token": model.unk_token,
            "continuing_subword_prefix": model.prefix or None,
            "end_of_word_suffix": model.suffix or None,
            "fuse_unk": model.fuse_unk,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": model.ignore_merges,
            "vocab": dict(sorted(model.vocab.items(), key=lambda item: item[1])),
            "merges": [list(pair) for pair in model.listed_merges()],
        }
    elif isinstance(model, Unigram):
        written = {"unk_id": model.unk_id, "vocab": model.pieces, "byte_fallback": model.byte_fallback}
    else:
        written = {
            "unk_token": model.unk_token,
            "continuing_subword_prefix": model.prefix,
            "max_input_chars_per_word": model.max_chars,
            "vocab": dict(sorted(model.vocab.items(), key=lambda item: item[1])),
        }
    added = sorted(tokenizer.added, key=lambda token: token.id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token.id, "content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}
            for token in added
        ],
        **components,
        "model": {"type": model.type, **written},
    }


def dumps(tokenizer: Tokenizer) -> str:
    """The text of a `tokenizer.json`; see `to_json`."""
    return json.dumps(to_json(tokenizer), ensure_ascii=False)


def save(path: str | pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes a folder: tokenizer.json, tokenizer_config.json, and for BPE vocab.json and merges.txt."""
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"a {type(tokenizer).__name__} has no files to save")
    folder = pathlib.Path(path).expanduser()
    spec = to_json(tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "tokenizer.json", spec)
        ids = {role: tokenizer._find(role) for role in ("bos", "eos", "pad")}
        text = {token.id: token.content for token in tokenizer.added}
        config = {f"{role}_token": text[i] for role, i in ids.items() if i in text}
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
        if isinstance(tokenizer.model, BPE):
            _write_json(folder / "vocab.json", spec["model"]["vocab"])
            lines = ["#version: 0.2", *(f"{a} {b}" for a, b in spec["model"]["merges"])]
            (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the tokenizer to {str(folder)!r}: {error.strerror}") from error


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# vocab.json and merges.txt, vocab.txt


def _from_merges(folder: pathlib.Path, names: Mapping[str, str]) -> Tokenizer:
    """Byte-level BPE as GPT-2's; tokens that are neither a byte nor a merge are taken for special ones."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise UserError(f"folder {str(folder)!r} has no {name}; vocab.json and merges.txt belong together")
    vocab = _read_json(folder / "vocab.json")
    merges = []
    text = (folder / "merges.txt").read_text(encoding="utf-8")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{str(folder / 'merges.txt')!r}, line {number}: {line!r} is not two tokens")
        merges.append((parts[0], parts[1]))
    try:
        model = BPE(_vocab(vocab), merges)
    except UserError as error:
        raise UserError(f"{str(folder)!r}: {error}") from error
    reached = {a + b for a, b in merges} | BYTE_OF.keys()
    special = [AddedToken(token, i) for token, i in vocab.items() if token not in reached]
    kept = {role: name for role, name in names.items() if name in vocab}
    return Tokenizer(model, pre_tokenizer=_BYTE_LEVEL, decoder=_BYTE_LEVEL, added=special, names=kept)


def _from_vocab_txt(file: pathlib.Path, names: Mapping[str, str]) -> Tokenizer:
    """BERT's WordPiece, lower case unless `tokenizer_config.json` says do_lower_case=false."""
    try:
        tokens = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(file)!r} is not UTF-8: {error}") from error
    vocab = {token.rstrip("\r"): i for i, token in enumerate(tokens)}
    config = file.parent / "tokenizer_config.json"
    lowercase = (_read_json(config) if config.is_file() else {}).get("do_lower_case", True)
    special = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocab]
    around = [["[SEP]", vocab["[SEP]"]], ["[CLS]", vocab["[CLS]"]]] if {"[CLS]", "[SEP]"} <= vocab.keys() else None
    try:
        return Tokenizer(
            WordPiece(vocab),
            normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                        "strip_accents": None, "lowercase": lowercase},
            pre_tokenizer={"type": "BertPreTokenizer"},
            post_processor={"type": "BertProcessing", "sep": around[0], "cls": around[1]} if around else None,
            decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
            added=[AddedToken(token, vocab[token]) for token in special],
            names={role: name for role, name in names.items() if name in vocab},
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{str(file)!r}: {error}") from error


# tiktoken ranks


def from_tiktoken(data: bytes, where: str, pattern: str, names: Mapping[str, str] | None = None) -> Tokenizer:
    """Byte-level BPE of tiktoken ranks: per line a token in base64 and its rank, which is its id."""
    if not pattern:
        raise UserError(
            f"{where}: tiktoken ranks do not say how text is split; give pattern={', '.join(PATTERNS)} or an expression"
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{where}, line {number}: {line[:80]!r} is not a token in base64 and its rank") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{where}: it has no token for the byte {missing[0]}")
    vocab = _vocab({to_characters(token): rank for token, rank in ranks.items()})
    joins = Joins({rank: token for token, rank in ranks.items()}, sorted(ranks.values()))
    return Tokenizer(
        BPE(vocab, joins, ignore_merges=True), pre_tokenizer=_split(pattern), decoder=_BYTE_LEVEL, names=names
    )


def _split(pattern: str) -> dict:
    """The pre-tokenizer of a split pattern, by name or expression."""
    if pattern == "gpt2":
        return _BYTE_LEVEL
    expression = {"Regex": PATTERNS.get(pattern, pattern)}
    split = {"type": "Split", "pattern": expression, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL | {"use_regex": False}]}


def byte_level_tokenizer(model: BPE, pattern: str, special: Sequence[str]) -> Tokenizer:
    """A tokenizer of a byte-level model, split by a pattern; special: names of tokens of its vocabulary."""
    added = [AddedToken(name, model.vocab[name]) for name in special]
    return Tokenizer(model, pre_tokenizer=_split(pattern), decoder=_BYTE_LEVEL, added=added)


def save_tiktoken(path: str | pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the ranks of a byte-level BPE tokenizer in the format of tiktoken; special tokens are not in it.

    Raises UserError where ids do not follow the order of the merges, so that ranks cannot tell both.
    """
    model = tokenizer.model
    if not isinstance(model, BPE) or not model.byte_level or model.prefix or model.suffix:
        raise UserError("only a byte-level BPE tokenizer can be written as tiktoken ranks")
    merged = [model.vocab[a + b] for a, b in model.listed_merges()]
    tokens = sorted({model.vocab[char] for char in byte_characters()} | set(merged))
    if not isinstance(model.merges, Joins) and merged != sorted(set(merged)):
        raise UserError("the ids of the tokens are not in the order of their merges, which tiktoken ranks need")
    text = {i: token for token, i in model.vocab.items()}
    lines = [f"{base64.b64encode(to_bytes(text[i])).decode()} {i}\n" for i in tokens]
    pathlib.Path(path).expanduser().write_text("".join(lines), encoding="ascii")


# SentencePiece


def from_sentencepiece(data: bytes, where: str, names: Mapping[str, str] | None = None) -> Tokenizer:
    """The tokenizer of a SentencePiece model; `encode(add_special=True)` puts its bos and eos around a text."""
    model = sentencepiece.parse(data, where)
    kinds = (sentencepiece.UNKNOWN, sentencepiece.CONTROL)
    special = {token: i for i, (token, _, kind) in enumerate(model.pieces) if kind in kinds}
    added = [AddedToken(token, i) for token, i in special.items()]
    if model.type == sentencepiece.BPE_TYPE:
        user = [(token, i) for i, (token, _, kind) in enumerate(model.pieces) if kind == sentencepiece.USER_DEFINED]
        added += [AddedToken(token, i, special=False, normalized=True) for token, i in user]
    text = {i: token for token, i in special.items()}
    roles = {"bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id}
    roles = {role: text[i] for role, i in roles.items() if i in text}
    return Tokenizer(
        sentencepiece.build(model, where),
        post_processor=sentencepiece.template(roles, special),
        decoder=sentencepiece.SentencePieceDecoder(model),
        added=added,
        names=roles | {role: name for role, name in (names or {}).items() if name in special},
        edits=[sentencepiece.edit(model)],
    )
