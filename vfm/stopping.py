"""Where an answer ends: sequences of tokens or strings, found inside the jitted program, and text without them."""

from collections.abc import Sequence

import numpy as np

from vfm.errors import UserError


def stop_tokens(sequences: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """The automaton (see `automaton`) that finds any of the sequences of token ids."""
    return automaton(sequences, [(i,) for i in range(vocab_size)])


def stop_strings(strings: Sequence[str], tokenizer, vocab_size: int) -> np.ndarray:
    """The automaton that finds any of the strings, however they are cut into tokens.

    vocab_size: of the model; its ids beyond those of the tokenizer stand for nothing.
    """
    ids = range(min(vocab_size, tokenizer.vocab_size))
    # What a token stands for within a text may differ from what it does at the beginning (a space).
    before, start = next((i, data) for i in ids if (data := tokenizer.decode_bytes((i,))).strip())
    pieces = [tokenizer.decode_bytes((before, i))[len(start) :] for i in ids]
    return automaton([s.encode() for s in strings], [*pieces, *[b""] * (vocab_size - len(pieces))])


def automaton(sequences: Sequence[Sequence[int]], pieces: Sequence[Sequence[int]]) -> np.ndarray:
    """int32[states, V]: the state after a token, for a search of several sequences of symbols at once.

    pieces: the symbols of each of the V tokens. State 0 is the beginning; the last state is that one of the sequences
    was found, and stays. Raises `UserError` for an empty sequence. Source: Aho and Corasick 1975, with the steps of
    all symbols of a token taken together.
    """
    column = {symbol: i for i, symbol in enumerate(sorted({s for sequence in sequences for s in sequence}), start=1)}
    children: list[dict[int, int]] = [{}]
    ends = set()
    for sequence in sequences:
        if not len(sequence):
            raise UserError("stop: an empty sequence ends nothing; leave it out")
        node = 0
        for symbol in sequence:
            if symbol not in children[node]:
                children[node][symbol] = len(children)
                children.append({})
            node = children[node][symbol]
        ends.add(node)
    found = len(children)
    step = np.zeros((found + 1, len(column) + 1), np.int32)  # column 0: symbols that are in no sequence
    fallback, queue = [0] * found, [0]
    for node in queue:  # breadth first: a node falls back to shorter ones, which are complete by then
        step[node] = step[fallback[node]]
        for symbol, child in children[node].items():
            fallback[child] = int(step[node, column[symbol]]) if node else 0
            step[node, column[symbol]] = child
            ends |= {child} if fallback[child] in ends else set()
            queue.append(child)
    step[np.isin(step, list(ends))] = found
    step[[*ends, found]] = found
    state = np.repeat(np.arange(found + 1, dtype=np.int32)[:, None], len(pieces), axis=1)
    lengths = np.array([len(piece) for piece in pieces])
    for i in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > i)
        symbols = np.array([column.get(pieces[token][i], 0) for token in longer])
        state[:, longer] = step[state[:, longer], symbols[None]]
    return state


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the stop string that is complete first, without it."""
    found = _first(text, stops)
    return text if found is None else text[:found]


def _first(text, stops) -> int | None:
    """Where the stop string begins that ends first; of several that end together, the longest."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(ends)[1] if ends else None


class TextStream:
    """Text as its tokens come: no piece ends inside a character, and none holds the beginning of a stop string.

    The pieces of `push` and of `finish` together are `cut(tokenizer.decode(ids), stops)`.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self._text, self._stops = tokenizer.stream(), tuple(stops)
        self._held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that is certain with one more token; often empty."""
        return self._take(self._text.push(token))

    def finish(self) -> str:
        """The text that was held back, when no token follows."""
        rest = self._take(self._text.finish()) + self._held
        self._held, self.stopped = "", True
        return rest

    def _take(self, text):
        if self.stopped:
            return ""
        text = self._held + text
        found = _first(text, self._stops)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if n <= len(text) and text.endswith(stop[:n])),
            default=0,
        )
        text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return text
