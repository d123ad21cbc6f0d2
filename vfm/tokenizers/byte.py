"""Byte-level tokenizer: no training, no unknown words, exact on any bytes."""

import codecs
import dataclasses
import re
from collections.abc import Iterable

from vfm.errors import UserError, unknown

_REQUIRED = ("<pad>", "<bos>", "<eos>")


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids, after the special tokens.

    special: names of the special tokens, ids 0, 1, … in this order; begins with <pad>, <bos>, <eos>.
    Ids: byte b has id len(special) + b; vocab_size = len(special) + 256.
    Special names inside a text are not recognised: they are bytes like any other, so that no user text can
    forge a marker. Use `token_id`.
    Source: ByT5 (Xue et al. 2022, arXiv:2105.13626), section 3.
    """

    special: tuple[str, ...] = _REQUIRED

    def __post_init__(self):
        object.__setattr__(self, "special", tuple(self.special))
        if self.special[:3] != _REQUIRED:
            raise UserError(f"tokenizer field `special` must begin with {_REQUIRED}, found {self.special}")
        if len(set(self.special)) != len(self.special):
            raise UserError(f"tokenizer field `special` names a token twice: {self.special}")

    @property
    def vocab_size(self) -> int:
        return len(self.special) + 256

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def bos_id(self) -> int:
        return 1

    @property
    def eos_id(self) -> int:
        return 2

    def token_id(self, name: str) -> int:
        """Id of a special token, such as "<image>"; an unknown name raises UserError."""
        try:
            return self.special.index(name)
        except ValueError:
            raise unknown("special token", name, self.special, where="tokenizer field `special`") from None

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """Ids of the text's UTF-8 bytes (or of the bytes themselves), without <bos> and <eos>.

        allow_special: names of special tokens in the text mean these tokens.
        """
        if allow_special:
            names = sorted(self.special, key=len, reverse=True)
            parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
            return [i for part in parts for i in ([self.token_id(part)] if part in names else self.encode(part))]
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        offset = len(self.special)
        return [offset + byte for byte in data]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: specials are skipped, bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids, specials skipped; an id outside the vocabulary raises UserError."""
        offset, data = len(self.special), bytearray()
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size} ids")
            if i >= offset:
                data.append(i - offset)
        return bytes(data)

    def stream(self) -> "ByteStream":
        """A decoder that takes ids one by one, as they are generated."""
        return ByteStream(self)


class ByteStream:
    """Text of ids that arrive one by one; together it is `decode(ids)`. See `Stream` of the other tokenizers."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._text = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """The text that this id completes."""
        return self._text.decode(self._tokenizer.decode_bytes((i,)))

    def finish(self) -> str:
        """The text of the bytes that are left, U+FFFD where a character is incomplete."""
        return self._text.decode(b"", final=True)
