"""WordPiece: a word is split from the left into the longest tokens of the vocabulary.

Source: Schuster & Nakajima 2012; Wu et al. 2016 (arXiv:1609.08144); as in BERT (Devlin et al. 2019).
"""

from collections.abc import Collection, Mapping, Sequence

from vfm.errors import UserError
from vfm.tokenizers.bpe import Cache


class WordPiece:
    """Ids of a word; one that cannot be split, or is longer than max_chars characters, is unk_token.

    vocab: token -> id. prefix: of tokens that do not begin a word. never: ids that no text becomes. Raises UserError
    without unk_token in the vocabulary.
    """

    type = "WordPiece"

    def __init__(
        self,
        vocab: Mapping[str, int],
        *,
        unk_token: str = "[UNK]",
        prefix: str = "##",
        max_chars: int = 100,
        never: Collection[int] = (),
    ):
        if unk_token not in vocab:
            raise UserError(f"unk_token {unk_token!r} is not in the vocabulary")
        self.vocab, self.unk_token, self.prefix, self.max_chars = dict(vocab), unk_token, prefix, max_chars
        self._usable = {token: i for token, i in self.vocab.items() if i not in never}
        self._longest = max(map(len, self.vocab))
        self.cache = Cache(self.encode)

    def encode(self, word: str) -> tuple[int, ...]:
        """Ids of a word, not looked up in the cache."""
        return tuple(self._split(word)[0])

    def encode_spans(self, words: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each word its ids, and for each id the (start, end) of its characters in the word."""
        return [self._split(word) for word in words]

    def _split(self, word: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, spans, start = [], [], 0
        while start < len(word) <= self.max_chars:
            prefix = self.prefix if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                found = self._usable.get(prefix + word[start:end])
                if found is not None:
                    break
            else:
                break
            ids.append(found)
            spans.append((start, end))
            start = end
        if start < len(word):
            return [self.vocab[self.unk_token]], [(0, len(word))]
        return ids, spans
