"""The precompiled character map of SentencePiece models: which sequences of characters are replaced by what.

Source: Kudo & Richardson 2018 (arXiv:1808.06226), section 3.2. The map is a 32-bit length, a double-array trie
(Yata's darts-clone) of the UTF-8 of the sequences, and the replacements, each ended by a zero byte.
"""

import functools
import re
import struct
from collections.abc import Iterator

from vfm.errors import UserError
from vfm.tokenizers import unicode16

# What continues a grapheme cluster (UAX #29), besides marks: joiners, halfwidth sound marks, emoji modifiers.
_EXTEND = ((0x200C, 0x200D), (0xFF9E, 0xFF9F), (0x1F3FB, 0x1F3FF))


def parse(blob: bytes) -> dict[str, str]:
    """{sequence: replacement} of a precompiled map; a damaged one raises UserError."""
    try:
        (size,) = struct.unpack_from("<I", blob)
        units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        replacements = blob[4 + size :]
        return {key.decode("utf-8"): _text(replacements, at) for key, at in _walk(units)}
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"the precompiled character map is damaged: {error}") from error


def _text(replacements: bytes, at: int) -> str:
    return replacements[at : replacements.index(b"\0", at)].decode("utf-8")


def _walk(units) -> list[tuple[bytes, int]]:
    """All (key, value) of a double-array trie."""

    def base(node: int) -> int:
        unit = units[node]
        return node ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6))

    # A node is where its label leads to from the base of its parent.
    below: dict[int, list[int]] = {}
    for node, unit in enumerate(units):
        if unit & 0xFF and not unit >> 31:
            below.setdefault(node ^ (unit & 0xFF), []).append(node)
    found, waiting = [], [(base(0), b"")]
    while waiting:
        parent, key = waiting.pop()
        for node in below.get(parent, ()):
            longer = key + bytes([units[node] & 0xFF])
            if len(longer) > 1 << 10:
                raise ValueError("it has a loop")
            if units[node] >> 8 & 1:
                found.append((longer, units[base(node)] & ((1 << 31) - 1)))
            waiting.append((base(node), longer))
    return found


def aligned(read: int, written: str) -> list[tuple[int, str]]:
    """The characters of a replacement, one for each character read as far as they go, as `tokenizers` counts them."""
    parts = [(1, char) for char in written[: read - 1]]
    parts += [(1, written[read - 1 :])]
    return parts + [(1, "")] * (read - len(parts))


class Charsmap:
    """Replaces sequences of characters as SentencePiece does: at each position the longest one in the map."""

    def __init__(self, blob: bytes):
        self.rules = parse(blob) if blob else {}
        self.single = str.maketrans({key: value for key, value in self.rules.items() if len(key) == 1})
        lengths: dict[str, set[int]] = {}
        for key in self.rules:
            lengths.setdefault(key[0], set()).add(len(key))
        self.lengths = {char: sorted(found, reverse=True) for char, found in lengths.items()}
        # A letter of ASCII is replaced only together with a mark, which is not ASCII.
        plain = "".join(re.escape(c) for c in self.lengths if not (c.isascii() and c not in self.rules))
        marked = "".join(re.escape(c) for c in self.lengths if c.isascii() and c not in self.rules)
        parts = [f"[{plain}]"] if plain else []
        parts += [f"[{marked}](?=[^\\x00-\\x7f])"] if marked else []
        self._start = re.compile("|".join(parts) or r"(?!)")

    def _found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, replacement) of all that is replaced, in order."""
        at = 0
        for match in self._start.finditer(text):
            start = match.start()
            if start < at:
                continue
            for length in self.lengths[text[start]]:
                value = self.rules.get(text[start : start + length])
                if value is not None and start + length <= len(text):
                    at = start + length
                    yield start, at, value
                    break

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """(characters read, text written) in order."""
        found, at = [], 0
        for start, end, value in self._found(text):
            found += [(1, char) for char in text[at:start]]
            found.append((end - start, value))
            at = end
        return found + [(1, char) for char in text[at:]]

    def __call__(self, text: str) -> str:
        if text.isascii():
            return text.translate(self.single)
        found, at = [], 0
        for start, end, value in self._found(text):
            found += [text[at:start], value]
            at = end
        return "".join(found) + text[at:]


class ClusterCharsmap(Charsmap):
    """As Hugging Face `tokenizers` applies the map: to short grapheme clusters as a whole, else by character.

    A cluster (a character and its marks) of less than six bytes becomes the replacement of the shortest sequence that
    it begins with, whatever follows in it.
    """

    def pieces(self, text: str) -> list[tuple[int, str]]:
        found = []
        for cluster in _clusters().findall(text):
            value = None
            if len(cluster) > 1 and len(cluster.encode("utf-8", "surrogatepass")) < 6:
                prefixes = (cluster[:n] for n in range(1, len(cluster) + 1))
                value = next((self.rules[prefix] for prefix in prefixes if prefix in self.rules), None)
            if value is not None:
                found += aligned(len(cluster), value)
            else:
                found += [(1, self.rules.get(char, char)) for char in cluster]
        return found

    def __call__(self, text: str) -> str:
        if _clusters().search(text) is None or (text.isascii() and "\r\n" not in text):
            return text.translate(self.single)
        return "".join(out for _, out in self.pieces(text))


@functools.cache
def _clusters() -> re.Pattern:
    marks = unicode16.char_class(unicode16.ranges("M") + _EXTEND)
    alone = "".join(unicode16.char_class(unicode16.ranges(name)) for name in ("Cc", "Cf", "Zl", "Zp"))
    return re.compile(rf"\r\n|[^{marks}{alone}]?[{marks}]+|.", re.DOTALL)
