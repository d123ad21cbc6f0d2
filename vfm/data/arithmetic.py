"""Questions with one right answer, which are made: sums, sums modulo p, and relations over several hops.

All are sources for the data set `questions`; items are {"prompt", "answer", "final", "task"}: `final` is what counts of
an answer, behind whatever steps come first. Splits never share a question.
"""

from collections.abc import Mapping

import numpy as np

from vfm.data.records import SPLITS, check_split, stream
from vfm.errors import UserError, unknown

FORMS = ("plain", "reversed", "scratchpad")
MARKER = ">"  # between the steps of an answer and what counts of it
OPERATIONS = {
    "+": lambda a, b, p: (a + b) % p,
    "-": lambda a, b, p: (a - b) % p,
    "*": lambda a, b, p: (a * b) % p,
    "/": lambda a, b, p: a * pow(b, -1, p) % p,
}
FRACTIONS = {"train": 0.5, "validation": 0.25, "test": 0.25}


class Addition:
    """Sums of two numbers of `digits` digits, as text of single digits.

    form: what the answer to "128+367=" is:

      plain       "495"
      reversed    "594": the lowest digit first, so that each needs only what was written before it and two digits of
                  the question (Lee et al. 2023, arXiv:2307.03381)
      scratchpad  "8+7+0=15,2+6+1=09,1+3+0=04>495": for each place both digits, the carry, and their sum (Nye et al.
                  2021, arXiv:2112.00114)

    lengths: "exact", both numbers have `digits` digits; "up_to": each has any number of digits from 1 on, all equally
    often as long as there are new ones, and the task of an item is that of the longer number. examples: of the training
    split; sizes: of the others. Questions are drawn from `seed` without repetition: the test and validation splits are
    the same for any number of examples, and fewer examples are the first ones of more. Forms share their questions.
    Raises UserError for more questions than there are.
    """

    labels = None

    def __init__(
        self,
        split: str,
        digits: int = 3,
        form: str = "plain",
        examples: int = 10_000,
        lengths: str = "exact",
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        where = "source 'addition'"
        check_split(split, SPLITS, where)
        if form not in FORMS:
            raise unknown("form", form, FORMS, where)
        if lengths not in ("exact", "up_to"):
            raise unknown("lengths", lengths, ("exact", "up_to"), where)
        if not 1 <= digits <= 18 or examples < 1:
            raise UserError(f"{where}: digits={digits} must be from 1 to 18, examples={examples} at least 1")
        self.form, self.lengths = form, lengths
        wanted = {"test": 1000, "validation": 500, **(sizes or {}), "train": examples}
        lowest = 10 ** (digits - 1) if lengths == "exact" and digits > 1 else 0
        there = (10**digits - lowest) ** 2
        if (needed := sum(wanted.values())) > 0.8 * there:
            split_sizes = ", ".join(f"{size} for {name}" for name, size in wanted.items())
            raise UserError(
                f"{where}: {needed} questions ({split_sizes}) of the {there} with {digits} digit(s) are more than four "
                "of five; take fewer, or more digits"
            )
        blocks = _distinct(wanted, digits, lengths, seed)
        self.pairs = blocks[split]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        a, b = map(int, self.pairs[index])
        total = str(a + b)
        answer = {"plain": total, "reversed": total[::-1], "scratchpad": _scratchpad(a, b)}[self.form]
        item = {"prompt": f"{a}+{b}=", "answer": answer, "final": total[::-1] if self.form == "reversed" else total}
        if self.lengths == "up_to":
            item["task"] = f"{len(str(max(a, b)))}_digits"
        return item


def _distinct(wanted: Mapping[str, int], digits: int, lengths: str, seed: int) -> dict[str, np.ndarray]:
    """Distinct pairs of numbers for each split, int64[n, 2]: blocks of one endless sequence for each split, without
    what the splits before have."""
    blocks, taken = {}, set()
    for split in ("test", "validation", "train"):
        rng, found = stream(seed, "addition", digits, lengths, split), []
        while len(found) < wanted[split]:
            count = 1024  # not what is wanted, so that more examples begin with the same ones
            if lengths == "up_to":
                size = rng.integers(1, digits + 1, size=(count, 2))
                pairs = rng.integers(np.where(size > 1, 10 ** (size - 1), 0), 10**size)
            else:
                pairs = rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits, size=(count, 2))
            for pair in map(tuple, pairs.tolist()):
                if pair not in taken:
                    taken.add(pair)
                    found.append(pair)
        # What was drawn beyond the number is free for the splits that follow.
        taken.difference_update(found[wanted[split] :])
        blocks[split] = np.asarray(found[: wanted[split]], np.int64)
    return blocks


def _scratchpad(a: int, b: int) -> str:
    """The sum place by place, the lowest first, then the marker and the sum."""
    width, carry, lines = len(str(max(a, b))), 0, []
    for x, y in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return f"{','.join(lines)}{MARKER}{a + b}"


class Modular:
    """All questions a ∘ b modulo a prime p: "3 + 5 =", with answer "8"; numbers are words, for single tokens each.

    operation: "+", "-", "*", or "/", which has no question with b = 0. fractions: share of the table in each split
    (Power et al. 2022, arXiv:2201.02177). signs: False leaves out the operation and "=", which say nothing where there
    is but one operation.
    """

    labels = None

    def __init__(
        self,
        split: str,
        modulus: int = 59,
        operation: str = "+",
        fractions: Mapping[str, float] | None = None,
        signs: bool = True,
        seed: int = 0,
    ):
        where, fractions = "source 'modular'", dict(fractions or FRACTIONS)
        check_split(split, fractions, where)
        if operation not in OPERATIONS:
            raise unknown("operation", operation, OPERATIONS, where)
        if modulus < 2 or any(modulus % q == 0 for q in range(2, int(modulus**0.5) + 1)):
            raise UserError(f"{where}: modulus={modulus} must be a prime number")
        self.modulus, self.operation, self.signs = modulus, operation, signs
        table = [(a, b) for a in range(modulus) for b in range(modulus) if operation != "/" or b]
        order = stream(seed, "modular", modulus, operation).permutation(len(table))
        self.pairs = [table[i] for i in order[_part(split, fractions, len(table), where)]]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        a, b = self.pairs[index]
        answer = str(OPERATIONS[self.operation](a, b, self.modulus))
        prompt = f"{a} {self.operation} {b} =" if self.signs else f"{a} {b}"
        return {"prompt": prompt, "answer": answer, "final": answer}


def _part(split: str, fractions: Mapping[str, float], count: int, where: str) -> slice:
    """The place of a split among `count` questions in random order."""
    if min(fractions.values()) < 0 or not 0 < sum(fractions.values()) <= 1 + 1e-9:
        raise UserError(f"{where}: fractions {fractions} must be at least 0 and at most 1 together")
    ends = np.rint(np.cumsum([0.0, *fractions.values()]) * count).astype(int)
    place = list(fractions).index(split)
    return slice(ends[place], ends[place + 1])


class Relations:
    """Facts of one hop and questions of two over a random graph: "7 father mother =", who is the mother of 7's father?

    Every relation leads from each of `entities` (numbers, words each) to one of them, at random: each is reached from
    exactly one (a permutation). The training split has all questions of one hop and those of two hops that fall in
    `fractions["train"]`; the others have questions of two hops alone, none of which was trained on, while both of its
    facts were. chain: the answer of a question names what it passes first: "12 > 3".
    Tasks: one_hop, two_hop. repeat: how often the training split has each one-hop fact.

    unchained: share of the pairs of relations that are never chained: with `chain` the training split has no questions
    of two hops of these, and the other splits have them alone (without `chain` too, so that they ask the same). both:
    with `chain`, the training split also has the questions of two hops of all pairs with direct answers (the chained
    ones are the task two_hop_chain), and the other splits have direct answers.
    """

    labels = None

    def __init__(
        self,
        split: str,
        entities: int = 30,
        relations: tuple[str, ...] = ("father", "mother", "friend", "neighbour"),
        fractions: Mapping[str, float] | None = None,
        chain: bool = False,
        repeat: int = 1,
        unchained: float = 0.0,
        both: bool = False,
        seed: int = 0,
    ):
        where, fractions = "source 'relations'", dict(fractions or FRACTIONS)
        check_split(split, fractions, where)
        if entities < 2 or not relations or len(set(relations)) != len(relations) or repeat < 1:
            raise UserError(
                f"{where}: entities={entities} must be at least 2, repeat={repeat} at least 1, and relations="
                f"{relations} different names"
            )
        pairs = [(one, two) for one in relations for two in relations]
        held = round(unchained * len(pairs))
        if unchained and not 0 < held < len(pairs):
            raise UserError(
                f"{where}: unchained={unchained} of {len(pairs)} pairs of relations must be at least one, and not all"
            )
        if both and not chain:
            raise UserError(f"{where}: both=True needs chain=True")
        rng = stream(seed, "relations", entities, len(relations))
        self.graph = {name: rng.permutation(entities) for name in relations}
        paths = [(start, one, two) for start in range(entities) for one in relations for two in relations]
        order = rng.permutation(len(paths))
        asked = [paths[i] for i in order[_part(split, fractions, len(paths), where)]]
        order = stream(seed, "relations", "unchained", len(pairs)).permutation(len(pairs))
        never = {pairs[i] for i in order[:held]}
        chained = [path for path in asked if path[1:] not in never]
        if split == "train":
            facts = [(start, name) for start in range(entities) for name in relations]
            direct = asked if both or not chain else []
            found = [(path, "one_hop", False) for path in facts * repeat]
            found += [(path, "two_hop", False) for path in direct]
            if chain:
                found += [(path, "two_hop_chain" if both else "two_hop", True) for path in chained]
        else:
            kept = [path for path in asked if path[1:] in never] if never else asked
            found = [(path, "two_hop", chain and not both) for path in kept]
        self.questions = found

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict:
        (start, *path), task, chain = self.questions[index]
        passed, at = [], start
        for name in path:
            at = int(self.graph[name][at])
            passed.append(str(at))
        answer = f" {MARKER} ".join(passed) if chain else passed[-1]
        return {"prompt": f"{start} {' '.join(path)} =", "answer": answer, "final": passed[-1], "task": task}
