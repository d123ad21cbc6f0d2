"""Any-to-any examples out of single-modality sources that share classes."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from vfm.data.interleave import Carry, Input, Layout, Output, Text, interleave
from vfm.data.labelled import Labelled
from vfm.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Task:
    """What a row reads and what it must give: "image+audio->text"."""

    inputs: tuple[str, ...]
    output: str

    @staticmethod
    def split(spec: str) -> tuple[tuple[str, ...], str]:
        """(inputs, output) of "a+b->c"."""
        if not isinstance(spec, str):
            raise UserError(f"task {spec!r} is no text; it must have the form 'a+b->c'")
        left, arrow, output = (part.strip() for part in spec.partition("->"))
        inputs = tuple(part.strip() for part in left.split("+"))
        if not arrow or not output or not all(inputs) or "->" in output:
            raise UserError(f"task {spec!r} must have the form 'a+b->c', such as 'image+text->audio'")
        return inputs, output

    @classmethod
    def parse(cls, spec: str, known: set[str]) -> "Task":
        """The task of a string "a+b->c"; every name must be text or a modality with a source."""
        inputs, output = cls.split(spec)
        for name in (*inputs, output):
            if name not in known:
                raise unknown("modality", name, known, where=f"task {spec!r} (is there a source for it?)")
        if len(set(inputs)) != len(inputs):
            raise UserError(f"task {spec!r} names an input twice")
        if inputs == ("text",) and output == "text":
            raise UserError(f"task {spec!r} has nothing to read: the question does not hold the answer")
        return cls(inputs, output)


class Pairs:
    """Rows that convert between modalities: items of one class, a source per modality, and its name.

    sources: {modality: source config}; each source gives labels. words: the class names, by label.
    tasks: ("image->text", "audio+text->image", …); weights: their relative frequencies (equal if empty).
    question: the text input of tasks that have `text` among their inputs and as their output; for other
    outputs the text input is the word itself. anchor: modality whose items are the epoch (the first source if
    empty); the others are drawn at random among the items of the same label. shuffle_inputs: random order of
    the inputs (in training; else the task's order). augment: {modality: fields of `augment.apply`}, in
    training; what a task is to generate stays as it is.
    train: default split == "train". task: always this one. answer=False: `example` leaves the answer out.
    opened: `sources` of another `Pairs` of the same split, to share what they hold in memory.

    Sequence: <bos>, the inputs, the marker <c> of the output modality c, then the word's tokens and <eos> as
    targets, or the signal positions of the item. Modalities of the sources that the task does not use travel
    in `inputs` without a position (not in prompts). Also `label` int32[].
    Raises UserError for a task that names no source, a source without labels, labels that do not match, and
    rows longer than the layout.
    """

    keys = frozenset({"label"})

    def __init__(
        self,
        sources: Mapping[str, Mapping],
        words: tuple[str, ...],
        tasks: tuple[str, ...],
        weights: tuple[float, ...] = (),
        question: str = "",
        anchor: str = "",
        shuffle_inputs: bool = True,
        augment: Mapping[str, Mapping[str, float]] | None = None,
        *,
        split: str,
        layout: Layout,
        tokenizer,
        train: bool | None = None,
        task: str | None = None,
        answer: bool = True,
        opened: Mapping | None = None,
    ):
        self.train = split == "train" if train is None else train
        self.layout, self.tokenizer, self.words = layout, tokenizer, tuple(words)
        self.question, self.answer = question, answer
        self.shuffle_inputs = shuffle_inputs and self.train
        self.items = Labelled(
            sources,
            self.words,
            split=split,
            layout=layout,
            where="dataset 'pairs'",
            train=self.train,
            anchor=anchor,
            augment=augment,
            opened=opened,
        )
        self.sources = self.items.sources
        self.tasks = tuple(self.parse(spec, sources) for spec in ((task,) if task else tasks))
        if not self.tasks:
            raise UserError("dataset 'pairs' has no task")
        weights = (1.0,) if task else tuple(weights) or (1.0,) * len(self.tasks)
        if len(weights) != len(self.tasks) or min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"dataset 'pairs': weights {weights} do not fit {len(self.tasks)} task(s)")
        self.thresholds = np.cumsum(weights) / sum(weights)
        self._check_length()

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        return {**interleave([], layout, tokenizer), "label": np.zeros((), np.int32)}

    def parse(self, spec: str, sources: Mapping | None = None) -> Task:
        """The task of its name, checked against the sources."""
        return Task.parse(spec, {"text", *(self.sources if sources is None else sources)})

    def _check_length(self) -> None:
        longest = max(self.words, key=lambda word: len(self.tokenizer.encode(word)), default="")
        for task in self.tasks:
            used = {*task.inputs, task.output} - {"text"}
            items = {m: np.zeros(self.layout.modality(m).item_shape, np.float32) for m in used}
            try:
                interleave(self._segments(task, task.inputs, items, longest, True), self.layout, self.tokenizer)
            except UserError as error:
                raise UserError(f"task '{'+'.join(task.inputs)}->{task.output}': {error}") from error

    def __len__(self) -> int:
        return len(self.items)

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """The row of anchor item `index`: task, partners, order and changes are drawn from `rng`."""
        task = self.tasks[0]
        if len(self.tasks) > 1:
            task = self.tasks[int(np.searchsorted(self.thresholds, rng.random(), side="right"))]
        return self._row(index, task, rng, self.answer)[0]

    def prompt(self, index: int, task: str, rng: np.random.Generator) -> dict:
        """The row without its answer, for generation, with `label` and the true `word`.

        The same rng state draws the same items as `example` of a dataset built with this `task`.
        """
        row, word = self._row(index, self.parse(task), rng, answer=False)
        return row | {"word": word}

    def _row(self, index: int, task: Task, rng: np.random.Generator, answer: bool) -> tuple[dict, str]:
        label = self.items.label(index)
        indices = {}
        for modality in self.sources:
            indices[modality] = index if modality == self.items.anchor else self.items.draw(modality, label, rng)
        order = task.inputs
        if self.shuffle_inputs:
            order = tuple(order[i] for i in rng.permutation(len(order)))
        used = {*task.inputs, task.output} if answer else set(task.inputs)
        # Inputs first: a prompt then draws the same changes of them as the row with the answer.
        first = dict.fromkeys((*task.inputs, task.output, *indices))
        items = {}
        for modality in first:
            if modality in indices and (modality in used or answer):
                items[modality] = self.items.item(modality, indices[modality], rng, change=modality != task.output)
        segments = self._segments(task, order, items, self.words[label], answer)
        segments += [Carry(m, array) for m, array in items.items() if m not in used]
        row = interleave(segments, self.layout, self.tokenizer)
        row["label"] = np.asarray(label, np.int32)
        return row, self.words[label]

    def _segments(self, task: Task, order, items: Mapping, word: str, answer: bool) -> list:
        segments = [Text([self.tokenizer.bos_id])]
        for name in order:
            if name == "text":
                segments.append(Text(self.question if task.output == "text" else word))
            else:
                segments.append(Input(name, items[name]))
        segments.append(Text([self.tokenizer.token_id(f"<{task.output}>")]))
        if task.output != "text":
            segments.append(Output(task.output, items[task.output] if answer else None))
        elif answer:
            segments += [Text(word, target=True), Text([self.tokenizer.eos_id], target=True)]
        return segments
