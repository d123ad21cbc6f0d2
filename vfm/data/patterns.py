"""Sequences whose later symbols can be told from the earlier ones alone: what in-context learning is measured on.

A source of this file gives {"symbols": int32[n], "shots": int32[n]}: numbers of symbols, and how many examples of each
symbol the sequence has shown before it; -1: nothing before it tells which one comes. Item i of a split is a pure
function of (seed, split, i), and all items of a source have the same `length` n.
"""

from collections.abc import Mapping

import numpy as np

from vfm.data.records import SPLITS, check_split, stream
from vfm.errors import UserError, unknown

SIZES = {"train": 1_000_000, "validation": 1000, "test": 1000}


class Sequences:
    """What the sources of this file share. sizes: {split: items}, over those of `SIZES`."""

    name = ""

    def __init__(self, split: str, length: int, symbols: int, sizes: Mapping[str, int] | None, seed: int, lowest):
        """lowest: {field: (value, the lowest that it may have)} of the whole numbers among the fields."""
        self.where = f"source {self.name!r}"
        for field, (value, least) in lowest.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{self.where}: {field}={value!r} must be a whole number >= {least}")
        self.split, self.length, self.symbols, self.seed = split, length, symbols, seed
        self.size = int({**SIZES, **(sizes or {})}[check_split(split, SPLITS, self.where)])
        self.labels = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        symbols, shots = self.draw(stream(self.seed, self.name, self.split, range(len(self))[index]))
        return {"symbols": symbols.astype(np.int32), "shots": shots.astype(np.int32)}

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The symbols and the shots of an item."""
        raise NotImplementedError


class Repeated(Sequences):
    """A block of random symbols, again and again (Olsson et al. 2022, "repeated random tokens").

    block: symbols of a block; least: where not 0, each sequence has a block of `least` to `block` symbols, so that no
    fixed distance leads to the copy. distinct: no symbol is twice in a block. copies: of the longest block.
    A symbol has as many shots as there are whole blocks before it. The first symbol of the second block is not told by
    what is before it: that the block has ended is news.
    """

    name = "repeated"

    def __init__(
        self,
        split: str,
        block: int = 48,
        least: int = 0,
        copies: int = 2,
        symbols: int = 32,
        distinct: bool = False,
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        lowest = {"block": (block, 1), "least": (least, 0), "copies": (copies, 2), "symbols": (symbols, 2)}
        super().__init__(split, block * copies, symbols, sizes, seed, lowest)
        if least > block or (distinct and symbols < block):
            raise UserError(
                f"{self.where}: block={block} must be at least least={least}, and with distinct=True at most "
                f"symbols={symbols}"
            )
        self.block, self.least, self.distinct = block, least or block, distinct

    def draw(self, rng):
        size = int(rng.integers(self.least, self.block + 1))
        block = rng.permutation(self.symbols)[:size] if self.distinct else rng.integers(self.symbols, size=size)
        place = np.arange(self.length)
        return block[place % size], np.where(place > size, place // size, -1)


class Lookup(Sequences):
    """Pairs of a key and a value, then keys again, each with the value it had: associative recall.

    keys, values: how many symbols are keys (0, 1, …) and values (those behind the keys). pairs: of different keys, with
    any values, drawn for each sequence. queries: keys that are asked for, all different. The answers have as many shots
    as there are pairs. After Arora et al. 2023, section 3.1.
    """

    name = "lookup"

    def __init__(
        self,
        split: str,
        pairs: int = 8,
        queries: int = 1,
        keys: int = 16,
        values: int = 16,
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        lowest = {"pairs": (pairs, 1), "queries": (queries, 1), "keys": (keys, 1), "values": (values, 2)}
        super().__init__(split, 2 * (pairs + queries), keys + values, sizes, seed, lowest)
        if not queries <= pairs <= keys:
            raise UserError(f"{self.where}: pairs={pairs} must be at least queries={queries} and at most keys={keys}")
        self.pairs, self.queries, self.keys, self.values = pairs, queries, keys, values

    def draw(self, rng):
        keys = rng.permutation(self.keys)[: self.pairs]
        values = self.keys + rng.integers(self.values, size=self.pairs)
        order = np.concatenate([np.arange(self.pairs), rng.permutation(self.pairs)[: self.queries]])
        shots = np.full(self.length, -1)
        shots[2 * self.pairs + 1 :: 2] = self.pairs
        return _in_turn(keys[order], values[order]), shots


FAMILIES = {"shift": "x + b", "scale": "a x", "affine": "a x + b", "table": "any"}


class Functions(Sequences):
    """Few-shot examples x f(x) of a function that is drawn for each sequence, of the numbers 0 to numbers - 1.

    family: "shift", f(x) = x + b; "scale", a x; "affine", a x + b, all modulo `numbers`, a prime, with a > 0, so that
    every function is one to one; "table": a random number for each x. An output y is the symbol numbers + y. examples:
    pairs in a sequence; distinct: their inputs are all different, so that no output can be copied.
    functions: how many are trained on; fewer are some of those that more would be. 0: all that are not held out; of
    tables, a new one for each sequence. The split "test" has other functions: the share `held_out` of a family; tables
    of its own. "train" and "validation" have the same functions with other inputs. Output k, from 0 on, has k shots.
    """

    name = "functions"

    def __init__(
        self,
        split: str,
        numbers: int = 11,
        family: str = "affine",
        examples: int = 8,
        functions: int = 0,
        held_out: float = 0.2,
        distinct: bool = False,
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        lowest = {"numbers": (numbers, 3), "examples": (examples, 1), "functions": (functions, 0)}
        super().__init__(split, 2 * examples, 2 * numbers, sizes, seed, lowest)
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES, self.where)
        if distinct and examples > numbers:
            raise UserError(f"{self.where}: examples={examples} with different inputs are more than numbers={numbers}")
        self.numbers, self.examples, self.distinct, self.tables = numbers, examples, distinct, None
        if family != "table":
            self.tables = self._family(family, functions, held_out)
        elif functions and split != "test":
            draw = lambda i: stream(seed, self.name, "table", i).integers(numbers, size=numbers)
            self.tables = np.stack([draw(i) for i in range(functions)])

    def _family(self, family: str, functions: int, held_out: float) -> np.ndarray:
        """The functions of the split, int[F, numbers]: their outputs."""
        if any(self.numbers % i == 0 for i in range(2, int(self.numbers**0.5) + 1)):
            raise UserError(f"{self.where}: numbers={self.numbers} must be a prime for the family {family!r}")
        a = [1] if family == "shift" else range(1, self.numbers)
        b = [0] if family == "scale" else range(self.numbers)
        found = stream(self.seed, self.name, "held out").permutation([(i, j) for i in a for j in b])
        most = len(found) - round(held_out * len(found))
        if not 0 < most < len(found) or functions > most:
            raise UserError(
                f"{self.where}: held_out={held_out} of the {len(found)} functions {FAMILIES[family]} leaves {most} for "
                f"training; both must have some, and functions={functions} must be at most {most}"
            )
        chosen = found[most:] if self.split == "test" else found[: functions or most]
        return (chosen[:, :1] * np.arange(self.numbers) + chosen[:, 1:]) % self.numbers

    def draw(self, rng):
        if self.tables is None:
            table = rng.integers(self.numbers, size=self.numbers)
        else:
            table = self.tables[rng.integers(len(self.tables))]
        if self.distinct:
            x = rng.permutation(self.numbers)[: self.examples]
        else:
            x = rng.integers(self.numbers, size=self.examples)
        shots = np.full(self.length, -1)
        shots[1::2] = np.arange(self.examples)
        return _in_turn(x, self.numbers + table[x]), shots


def _in_turn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a_0, b_0, a_1, b_1, …"""
    found = np.empty(2 * len(a), np.int32)
    found[0::2], found[1::2] = a, b
    return found
