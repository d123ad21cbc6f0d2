"""Questions and their answers as rows, with solved examples in front where they are wanted."""

import collections
from collections.abc import Mapping

import numpy as np

from vfm.data.interleave import Layout, interleave
from vfm.data.sources import build_source
from vfm.errors import UserError, unknown

LOSSES = ("answer", "all")


class Questions:
    """Rows <bos> prompt answer <eos> of a source whose items are {"prompt": text, "answer": text}.

    Items may also have `task`, a name, and `final`, the part of the answer that counts (the last line of a chain of
    thought, say).
    shots: solved examples in front of each question, each of them prompt, answer, separator. They are drawn from the
    split `shots_split` of the source `shots_source` (by default: the source of the questions), without the question
    itself, each at most once; with `shots_tasks` only from those of the question's task.
    loss: what is to be predicted: "answer", the answer of the last question and <eos>; "all", everything behind <bos>.
    Example: tokens, targets, loss_mask, input_mask, and empty entries for the layout's modalities; the shots are drawn
    from the generator. `items` and `ids` hold all questions, `longest_prompt` and `longest_answer` count tokens, with
    <bos> and <eos>, those of solved examples too.
    Raises UserError for a source without questions, too few examples for the shots, and rows longer than the layout.
    """

    def __init__(
        self,
        source: Mapping,
        *,
        split: str,
        layout: Layout,
        tokenizer,
        shots: int = 0,
        separator: str = "\n",
        loss: str = "answer",
        shots_source: Mapping | None = None,
        shots_split: str = "train",
        shots_tasks: bool = False,
    ):
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES, "dataset 'questions'")
        if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
            raise UserError(f"dataset 'questions': shots={shots!r} must be a whole number >= 0")
        self.layout, self.tokenizer, self.shots, self.loss = layout, tokenizer, shots, loss
        self.items, self.ids = _read(source, split, tokenizer)
        self._pools: dict[str, np.ndarray] = {}
        self._solved: list[list[int]] = []
        self._longest_shown = 0
        if shots:
            self._read_shots(source, split, shots_source, shots_split, shots_tasks, separator)
        self._check_length(split)

    def _read_shots(self, source, split, shots_source, shots_split, shots_tasks, separator) -> None:
        own = not shots_source or shots_source == source
        items, ids = (self.items, self.ids) if own and shots_split == split else _read(
            shots_source or source, shots_split, self.tokenizer
        )  # fmt: skip
        between = self.tokenizer.encode(separator)
        self._solved = [[*prompt, *answer, *between] for prompt, answer in ids]
        self._longest_shown = max(len(answer) for _, answer in ids)
        # The places of each question among the examples: none of them may stand in front of itself.
        places: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            places.setdefault(item["prompt"], []).append(i)
        self._own = [places.get(item["prompt"], []) for item in self.items]
        names = [item.get("task", "") if shots_tasks else "" for item in items]
        self._pools = {name: np.flatnonzero([name == other for other in names]) for name in set(names)}
        self._pool_of = [item.get("task", "") if shots_tasks else "" for item in self.items]
        for name in sorted(set(self._pool_of)):
            copies = collections.Counter(items[i]["prompt"] for i in self._pools.get(name, ()))
            found = copies.total() - max(copies.values(), default=1) + 1
            if found <= self.shots:
                of = f" of task {name!r}" if name else ""
                raise UserError(
                    f"dataset 'questions': shots={self.shots} needs more than {self.shots} examples{of} in the split "
                    f"{shots_split!r}; it has {found}"
                )

    def _check_length(self, split: str) -> None:
        sizes = np.array([len(prompt) + len(answer) for prompt, answer in self.ids])
        self.longest_prompt = 1 + max(len(prompt) for prompt, _ in self.ids)
        # A model that follows its examples may write as much as they do.
        self.longest_answer = 1 + max(self._longest_shown, *(len(answer) for _, answer in self.ids))
        before = self.shots * max(map(len, self._solved), default=0)
        self.longest_prompt += before
        worst = int(sizes.argmax())
        used = int(sizes[worst]) + 2 + before
        if used > self.layout.length:
            item, extra = self.items[worst], f" and {before} of {self.shots} solved example(s)" if before else ""
            raise UserError(
                f"dataset 'questions': the longest row of the {split} split has {used} tokens (<bos>, "
                f"{item['prompt']!r}, {item['answer']!r}, <eos>{extra}), more than the layout's length "
                f"{self.layout.length}; raise config.data.length"
            )

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        return interleave([], layout, tokenizer)

    def __len__(self) -> int:
        return len(self.items)

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """Row `index`; `rng` draws its solved examples."""
        prompt, answer = self.ids[index]
        ids = [self.tokenizer.bos_id, *self._examples(index, rng), *prompt]
        known = 1 if self.loss == "all" else len(ids)
        ids += [*answer, self.tokenizer.eos_id]
        row, n = interleave([], self.layout, self.tokenizer), len(ids)
        row["tokens"][:n] = ids
        row["targets"][: n - 1] = ids[1:]
        row["loss_mask"][known - 1 : n - 1] = 1
        row["input_mask"][:n] = True
        return row

    def _examples(self, index: int, rng: np.random.Generator | None) -> list[int]:
        """The tokens of the solved examples in front of a question."""
        if not self.shots:
            return []
        pool, own = self._pools[self._pool_of[index]], self._own[index]
        # More than are wanted, should the question itself be among them.
        drawn = pool[rng.choice(len(pool), min(self.shots + max(len(own), 1), len(pool)), replace=False)]
        return [i for j in drawn[~np.isin(drawn, own)][: self.shots] for i in self._solved[j]]


def _read(source: Mapping, split: str, tokenizer) -> tuple[list[dict], list[tuple[list[int], list[int]]]]:
    """All items of a source, and the ids of prompt and answer of each."""
    records = build_source(source, split)
    items = [records[i] for i in range(len(records))]
    if not items:
        raise UserError(f"dataset 'questions': the {split} split of source {source['name']!r} has no questions")
    for field in ("prompt", "answer"):
        if field not in items[0]:
            raise UserError(f"source {source['name']!r} gives {', '.join(sorted(items[0]))}, no {field!r}")
    return items, [(tokenizer.encode(item["prompt"]), tokenizer.encode(item["answer"])) for item in items]
