"""Tokenizer of a fixed list of symbols: digits and signs, whole numbers, names of things."""

import dataclasses
import functools
import re
from collections.abc import Iterable

from vfm.errors import UserError, unknown
from vfm.tokenizers.byte import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class SymbolTokenizer(ByteTokenizer):
    """One id for each symbol, after the special tokens; a small vocabulary for synthetic tasks.

    symbols: a text, whose characters are the symbols, or a tuple of words. numbers: "0", "1", … up to numbers - 1 come
    before them, each a symbol of its own. separator: stands between the symbols of a text, such as " "; "": nothing
    does, and a text is read from the left, the longest symbol first.
    Ids: len(special) + place in the list; vocab_size = len(special) + numbers + len(symbols).
    Raises UserError for lists that name a symbol twice or none, and for a text with anything else in it.
    """

    symbols: str | tuple[str, ...] = ""
    numbers: int = 0
    separator: str = ""

    def __post_init__(self):
        super().__post_init__()
        where = "tokenizer 'symbols'"
        if not isinstance(self.numbers, int) or self.numbers < 0:
            raise UserError(f"{where}: numbers={self.numbers!r} must be a whole number >= 0")
        listed = (*map(str, range(self.numbers)), *self.symbols)
        if not listed or not all(isinstance(symbol, str) and symbol for symbol in listed):
            raise UserError(f"{where}: symbols={self.symbols!r} must be a text or a tuple of words, and not empty")
        if twice := next((symbol for symbol in listed if listed.count(symbol) > 1), None):
            raise UserError(f"{where}: the symbol {twice!r} is named twice")
        if self.separator and (inside := next((symbol for symbol in listed if self.separator in symbol), None)):
            raise UserError(f"{where}: the separator {self.separator!r} is inside the symbol {inside!r}")

    @functools.cached_property
    def listed(self) -> tuple[str, ...]:
        """All symbols, in the order of their ids."""
        return (*map(str, range(self.numbers)), *self.symbols)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.listed, start=len(self.special))}

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self.listed, key=len, reverse=True))))

    @property
    def vocab_size(self) -> int:
        return len(self.special) + len(self.listed)

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """Ids of the symbols of a text, without <bos> and <eos>.

        allow_special: names of special tokens in the text mean these tokens.
        """
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if allow_special:
            return super().encode(text, allow_special=True)
        if self.separator:
            words = [word for word in text.split(self.separator) if word]
            if other := next((word for word in words if word not in self._ids), None):
                raise unknown("symbol", other, self.listed, f"the text {text!r}")
        else:
            words = self._pattern.findall(text)
            if sum(map(len, words)) != len(text):
                raise unknown("symbol", self._pattern.sub("", text), self.listed, f"the text {text!r}")
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """The symbols of the ids with separators between them; specials are skipped."""
        words, offset = [], len(self.special)
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size} ids")
            if i >= offset:
                words.append(self.listed[i - offset])
        return self.separator.join(words)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """`decode` as UTF-8."""
        return self.decode(ids).encode()

    def stream(self) -> "SymbolStream":
        """A decoder that takes ids one by one, as they are generated."""
        return SymbolStream(self)


class SymbolStream:
    """Text of ids that arrive one by one; together it is `decode(ids)`."""

    def __init__(self, tokenizer: SymbolTokenizer):
        self._tokenizer, self._begun = tokenizer, False

    def push(self, i: int) -> str:
        """The text that this id adds."""
        text = self._tokenizer.decode((i,))
        lead = self._tokenizer.separator if self._begun and text else ""
        self._begun = self._begun or bool(text)
        return lead + text

    def finish(self) -> str:
        """Nothing is left."""
        return ""
