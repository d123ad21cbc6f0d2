"""Families of tasks on words, told in natural language: what instruction tuning in small can be measured with.

The name of a family is that of its steps, one or none of each kind: an order of letters, a change of each letter, a
sign in front, a sign behind ("reverse", "reverse+uppercase+dot"); or it is a task of another kind that shares no step
with these ("count_vowels").
"""

import dataclasses
import itertools
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vfm.data.records import check_split, hash_split, stream
from vfm.errors import UserError, unknown

ALPHABET = "abcdefghij"
VOWELS = "aei"
INSTRUCTIONS = ("given", "withheld", "shuffled")
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.1, "unrelated": 0.1}  # of the texts


def _nothing(rng: np.random.Generator, text: str) -> dict:
    return {}


@dataclasses.dataclass(frozen=True)
class Operation:
    """phrasings: how it is asked for, with {parameters}; apply(text, **parameters) -> answer; draw(rng, text) -> the
    parameters of one question; takes: "word" (letters that differ), "repeats" (letters that may repeat) or "words"."""

    phrasings: tuple[str, ...]
    apply: Callable[..., str]
    draw: Callable[[np.random.Generator, str], dict] = _nothing
    takes: str = "word"


def _letters(old: str, new: str) -> Callable[[str], str]:
    table = str.maketrans(old, new)
    return lambda text: text.translate(table)


def _swap_pairs(text: str) -> str:
    return "".join(text[i : i + 2][::-1] for i in range(0, len(text), 2))


def _swap_ends(text: str) -> str:
    return text[-1] + text[1:-1] + text[0] if len(text) > 1 else text


# Which letters, and in which order.
ORDERS = {
    "copy": Operation(("copy", "repeat"), lambda t: t),
    "reverse": Operation(("reverse", "backwards"), lambda t: t[::-1]),
    "rotate": Operation(("rotate", "first last"), lambda t: t[1:] + t[:1]),
    "rotate_back": Operation(("rotate back", "last first"), lambda t: t[-1:] + t[:-1]),
    "swap_ends": Operation(("swap ends", "trade ends"), _swap_ends),
    "swap_pairs": Operation(("swap pairs", "neighbours"), _swap_pairs),
    "sort": Operation(("sort", "in order"), lambda t: "".join(sorted(t))),
    "every_second": Operation(("every other", "skip one"), lambda t: t[1::2]),
    "drop_first": Operation(("drop first", "cut start"), lambda t: t[1:]),
    "drop_last": Operation(("drop last", "cut end"), lambda t: t[:-1]),
}
# What each letter becomes.
CHANGES = {
    "uppercase": Operation(("capitals", "upper case"), str.upper),
    "next": Operation(("shift", "next letter"), _letters(ALPHABET, ALPHABET[1:] + "k")),
    "numbers": Operation(("numbers", "in digits"), _letters(ALPHABET, string.digits)),
    "hide_vowels": Operation(("hide vowels", "x the vowels"), _letters(VOWELS, "x" * len(VOWELS))),
    "mirror": Operation(("mirrored", "a is j"), _letters(ALPHABET, ALPHABET[::-1])),
}
# What stands in front of it, and behind it.
STARTS = {
    "star": Operation(("star first", "add a star"), lambda t: f"*{t}"),
    "dash": Operation(("dash first", "add a dash"), lambda t: f"-{t}"),
}
ENDS = {
    "dot": Operation(("dot last", "add a dot"), lambda t: f"{t}."),
    "bang": Operation(("bang last", "add a bang"), lambda t: f"{t}!"),
}
STEPS = {"orders": ORDERS, "changes": CHANGES, "starts": STARTS, "ends": ENDS}  # of a family in this order


def _letter(rng: np.random.Generator, text: str) -> dict:
    return {"letter": str(rng.choice(list(ALPHABET)))}


def _replacement(rng: np.random.Generator, text: str) -> dict:
    old = str(rng.choice(list(text)))
    return {"old": old, "new": str(rng.choice(list(ALPHABET.replace(old, ""))))}


def _place(rng: np.random.Generator, text: str) -> dict:
    return {"n": int(rng.integers(1, len(text) + 1))}


# Tasks of other kinds.
OTHERS = {
    "count_letters": Operation(("how many letters", "count the letters"), lambda t: str(len(t))),
    "count_vowels": Operation(
        ("how many vowels", "count the vowels"), lambda t: str(sum(c in VOWELS for c in t)), takes="repeats"
    ),
    "count_words": Operation(("how many words", "count the words"), lambda t: str(len(t.split())), takes="words"),
    "count_letter": Operation(
        ("how many {letter}", "count each {letter}"), lambda t, letter: str(t.count(letter)), _letter, "repeats"
    ),
    "has_letter": Operation(
        ("is there a {letter}", "does it have {letter}"), lambda t, letter: "yes" if letter in t else "no", _letter
    ),
    "letter_at": Operation(("letter number {n}", "which letter is at {n}"), lambda t, n: t[n - 1], _place),
    "earliest": Operation(("earliest in the alphabet", "the letter nearest a"), min),
    "latest": Operation(("latest in the alphabet", "the letter nearest z"), max),
    "first_letters": Operation(
        ("first letter of each word", "initials"), lambda t: "".join(w[0] for w in t.split()), takes="words"
    ),
    "last_letters": Operation(
        ("last letter of each word", "final letters"), lambda t: "".join(w[-1] for w in t.split()), takes="words"
    ),
    "join": Operation(("join the words", "remove the spaces"), lambda t: t.replace(" ", ""), takes="words"),
    "last_word_first": Operation(
        ("words backwards", "last word first"), lambda t: " ".join(t.split()[::-1]), takes="words"
    ),
    "longest_word": Operation(
        ("the longest word", "which word is longest"), lambda t: max(t.split(), key=len), takes="words"
    ),
    "shortest_word": Operation(
        ("the shortest word", "which word is shortest"), lambda t: min(t.split(), key=len), takes="words"
    ),
    "without_repeats": Operation(
        ("remove duplicates", "each letter once"), lambda t: "".join(dict.fromkeys(t)), takes="repeats"
    ),
    "without_letter": Operation(
        ("leave out {letter}", "delete every {letter}"), lambda t, letter: t.replace(letter, ""), _letter, "repeats"
    ),
    "replace": Operation(
        ("replace {old} by {new}", "write {new} for {old}"),
        lambda t, old, new: t.replace(old, new),
        _replacement,
        "repeats",
    ),
    "spell": Operation(("spell it", "put dashes between"), "-".join),
    "double": Operation(("double each letter", "every letter twice"), lambda t: "".join(c + c for c in t)),
}

OPERATIONS = {name: operation for table in (*STEPS.values(), OTHERS) for name, operation in table.items()}
JOINS = (", ", " and ")  # before the last step of an instruction


def related(most: int, steps: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The families of at most so many steps: one or none of each kind of `STEPS`.

    steps: {kind: the ones that there are}; (): all.
    """
    choices = []
    for kind, known in STEPS.items():
        for name in steps.get(kind, ()):
            if name not in known:
                raise unknown("step", name, known, f"source 'task_families' (field `{kind}`)")
        choices.append(("", *(name for name in steps.get(kind) or known if name != "copy")))
    made = [tuple(filter(None, names)) for names in itertools.product(*choices)]
    return tuple("+".join(names) or "copy" for names in made if len(names) <= most)


def choose(
    families: int, held_out: int, draw: int, most: int, steps: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(families to train on, families held out) out of those of `related`, at random by `draw`.

    Held out are families of several steps. The choice of fewer families is the beginning of that of more. Raises
    `UserError` for more families than there are.
    """
    where = "source 'task_families'"
    every = related(most, steps)
    several = [name for name in every if "+" in name]
    rng = stream(draw, "task_families", "choice")
    if not 0 < held_out <= len(several):
        raise UserError(f"{where}: held_out={held_out} must be from 1 to {len(several)}, the families of several steps")
    held = tuple(rng.permutation(several).tolist()[:held_out])
    rest = [name for name in every if name not in held]
    if not 0 < families <= len(rest):
        raise UserError(f"{where}: families={families} must be from 1 to {len(rest)}, those that are not held out")
    return tuple(rng.permutation(rest).tolist()[:families]), held


def question(family: str, rng: np.random.Generator, text: str) -> tuple[str, str]:
    """(instruction, answer) of a family for a text; parameters and phrasing are drawn."""
    said = []
    for name in family.split("+"):
        operation = OPERATIONS[name]
        parameters = operation.draw(rng, text)
        said.append(str(rng.choice(operation.phrasings)).format(**parameters))
        text = operation.apply(text, **parameters)
    return str(rng.choice(JOINS)).join(filter(None, (", ".join(said[:-1]), said[-1]))), text


def text_for(family: str, rng: np.random.Generator, length: int) -> str:
    """What the first step of a family takes: `length` letters, or words of different lengths."""
    takes = OPERATIONS[family.split("+")[0]].takes
    if takes == "words":
        sizes = rng.permutation([2, 3, 4])[: rng.integers(2, 4)]
        return " ".join("".join(rng.choice(list(ALPHABET), size, replace=False)) for size in sizes)
    return "".join(rng.choice(list(ALPHABET), length, replace=takes == "repeats"))


class TaskFamilies:
    """Questions of several families: {"prompt": "INSTRUCTION: TEXT=", "answer", "task": the family}.

    Splits: "train" and "validation" are of the families trained on, "test" of the ones held out, and "unrelated" of all
    tasks of other kinds (`OTHERS`). A text is in one split alone. The families of a split take turns.

    families: how many are trained on; held_out: how many are held out; draw: the seed of this choice, see `choose`.
    orders, changes, starts, ends: the steps that families are made of, of each kind one or none; (): all. most_steps:
      of a family.
    lengths: (least, most) letters of a text. sizes: {split: questions}. seed: of the questions.
    instruction: "given"; "withheld": prompts are "TEXT="; "shuffled": the instruction is one of a family of the split
      that is drawn at random, and says nothing of the answer.
    """

    def __init__(
        self,
        split: str,
        families: int = 16,
        held_out: int = 8,
        draw: int = 0,
        orders: tuple[str, ...] = (),
        changes: tuple[str, ...] = (),
        starts: tuple[str, ...] = (),
        ends: tuple[str, ...] = (),
        most_steps: int = 3,
        lengths: tuple[int, int] = (5, 5),
        sizes: Mapping[str, int] | None = None,
        instruction: str = "given",
        seed: int = 0,
    ):
        where = "source 'task_families'"
        self.split = check_split(split, SHARES, where)
        if instruction not in INSTRUCTIONS:
            raise unknown("instruction", instruction, INSTRUCTIONS, where)
        if len(lengths) != 2 or not 3 <= lengths[0] <= lengths[1] <= len(ALPHABET):
            raise UserError(f"{where}: lengths={tuple(lengths)} must rise from at least 3 to at most {len(ALPHABET)}")
        trained, held = choose(
            families, held_out, draw, most_steps, dict(orders=orders, changes=changes, starts=starts, ends=ends)
        )
        self.families = {"test": held, "unrelated": tuple(OTHERS)}.get(split, trained)
        self.lengths, self.instruction, self.seed = tuple(lengths), instruction, seed
        self.size = int({"train": 20_000, "validation": 1000, "test": 1000, "unrelated": 1000, **(sizes or {})}[split])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        family = self.families[index % len(self.families)]
        rng = stream(self.seed, "task_families", self.split, index)
        length = int(rng.integers(self.lengths[0], self.lengths[1] + 1))
        said, text, answer = "", "", ""
        while not answer or hash_split(text, SHARES) != self.split:
            text = text_for(family, rng, length)
            said, answer = question(family, rng, text)
        if self.instruction == "shuffled":
            other = self.families[rng.integers(len(self.families))]
            said, _ = question(other, rng, text_for(other, rng, length))
        lead = "" if self.instruction == "withheld" else f"{said}: "
        return {"prompt": f"{lead}{text}=", "answer": answer, "task": family}
