"""Added tokens: texts that are one token each, found in a text before the model sees what is between them."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Sequence

from vfm.errors import UserError, unknown
from vfm.tokenizers import unicode16


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A text that is one token, whatever the model would make of it.

    special: left out when decoding, and recognised in texts only when asked for. single_word: only where no letter
    is next to it. lstrip, rstrip: takes the white space beside it. normalized: looked for after normalisation.
    """

    content: str
    id: int
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class AddedTokens:
    """Finds added tokens. normalize: what is done to the text of the normalized ones before they are looked for."""

    def __init__(self, tokens: Sequence[AddedToken], normalize: Callable[[str], str]):
        self.tokens = tuple(tokens)
        self.ids = {token.content: token.id for token in tokens}
        self.special = {token.content: token.id for token in tokens if token.special}
        self._texts = [normalize(token.content) if token.normalized else token.content for token in tokens]
        self._by_text = {(t.normalized, text): t for t, text in reversed(list(zip(tokens, self._texts)))}
        self._patterns: dict[frozenset[str], tuple[re.Pattern | None, re.Pattern | None]] = {}

    def patterns(self, allow: bool | Collection[str]) -> tuple[re.Pattern | None, re.Pattern | None]:
        """What to look for before, and after, normalisation when these special tokens are allowed in a text."""
        names = frozenset(self.special if allow is True else allow or ())
        if names not in self._patterns:
            for name in names:
                if name not in self.special:
                    raise unknown("special token", name, self.special, where="allow_special")
            self._patterns[names] = self._pattern(names, False), self._pattern(names, True)
        return self._patterns[names]

    def _pattern(self, names: frozenset[str], normalized: bool) -> re.Pattern | None:
        texts = {
            text
            for token, text in zip(self.tokens, self._texts)
            if text and token.normalized == normalized and (not token.special or token.content in names)
        }
        # Of the tokens that begin at the same place the longest one counts.
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None

    def search(
        self, text: str, pattern: re.Pattern | None, normalized: bool
    ) -> Iterator[tuple[str | AddedToken, int, int]]:
        """The tokens and the texts between them, each with its (start, end)."""
        at = 0
        for match in pattern.finditer(text) if pattern else ():
            token, (start, end) = self._by_text[normalized, match[0]], match.span()
            if start < at:
                continue
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])):
                continue
            if token.lstrip:
                start = max(at, len(text[:start].rstrip(unicode16.WHITE_SPACE)))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip(unicode16.WHITE_SPACE))
            if at < start:
                yield text[at:start], at, start
            yield token, start, end
            at = end
        if at < len(text):
            yield text[at:] if at else text, at, len(text)


def _is_word(char: str) -> bool:
    return bool(char) and (unicode16.category(char)[0] in "LM" or unicode16.category(char) in ("Nd", "Nl", "Pc"))


def check(tokens: Sequence[AddedToken], vocab: dict[str, int]) -> None:
    """Refuses added tokens that are empty, or whose ids belong to other tokens of the model."""
    known = {i: token for token, i in vocab.items()}
    for token in tokens:
        if not isinstance(token.content, str) or not token.content:
            raise UserError(f"the added token of id {token.id} has no text")
        if type(token.id) is not int or token.id < 0:
            raise UserError(f"added token {token.content!r} has the id {token.id!r}, which is not a number from 0 on")
        if known.setdefault(token.id, token.content) != token.content:
            raise UserError(f"added token {token.content!r} has the id {token.id} of the token {known[token.id]!r}")
