"""Visual sentences: images as tokens of one sequence."""

from collections.abc import Mapping, Sequence

import numpy as np

from vfm.data.annotate import Task, check_task
from vfm.data.interleave import Layout, Text, interleave
from vfm.data.records import CorruptRecord
from vfm.data.sources import build_source
from vfm.errors import UserError, unknown
from vfm.tokenizers.palette import ImageTokenizer

TARGETS = ("all", "annotations")
ALIGNED = ("positions", "token_types")


class VisualSentences:
    """Rows of images as tokens: <bos> image (iGPT, Chen et al. 2020), or the visual sentences of LVM (Bai et al. 2024).

    source: config of a source whose items have `image`. tasks: names of annotations (see `annotate.Task`); (): a row is
    one image. With tasks a row is `pairs` examples and a query, all of one task that is drawn for the row:
    <bos> (image <to> annotation <sep>) × (pairs + 1). Row i asks for the annotation of item i; the images of the
    examples are drawn, none twice and none that of the query. held_out: the tasks of the splits other than "train"; ():
    the same.
    targets: which tokens are predicted, "all" (but <bos>) or "annotations" alone.
    shuffled: the control. Every example's annotation is that of some other image under a task of its own, so that the
    examples tell nothing of the query's task.
    aligned: a token of an annotation has the position of its image's token at the same place (`positions` int32[T]),
    and `token_types` int32[T] tell them apart (1: an annotation): set model.backbone.num_token_types=2.
    answer=False: the row ends before the annotation of the query, nothing is predicted, and `answer` int32[P] holds its
    tokens. For one row and generator, query, task and the first n examples are the same for any number of pairs.
    `labels`: those of the source's items, or None. Raises UserError for a tokenizer that is not one of images, fields
    that do not fit, and rows that are too long; a damaged image raises CorruptRecord.
    """

    keys = frozenset()

    def __init__(
        self,
        source: Mapping,
        pairs: int = 0,
        tasks: Sequence[str] = (),
        held_out: Sequence[str] = (),
        targets: str = "all",
        shuffled: bool = False,
        aligned: bool = False,
        *,
        split: str,
        layout: Layout,
        tokenizer,
        answer: bool = True,
        opened: Mapping | None = None,
    ):
        where = "dataset 'visual_sentences'"
        if not isinstance(tokenizer, ImageTokenizer):
            raise UserError(f"{where} needs a tokenizer of images: config.tokenizer.name=palette or codes")
        if targets not in TARGETS:
            raise unknown("targets", targets, TARGETS, where)
        if pairs < 0 or (pairs and not tasks):
            raise UserError(f"{where}: pairs={pairs} examples of an annotation need `tasks`, and 0 or more of them")
        for name in (*tasks, *held_out):
            check_task(name)
        self.layout, self.tokenizer, self.targets, self.aligned = layout, tokenizer, targets, aligned
        self.pairs, self.shuffled, self.answer, self.held_out = pairs, shuffled, answer, split != "train"
        self.tasks = tuple(held_out if held_out and self.held_out else tasks)
        self.sources = dict(opened or {"image": build_source(source, split)})
        self.source = self.sources["image"]
        self.labels = getattr(self.source, "labels", None)
        self.colors = getattr(tokenizer, "colors", None)
        if len(self.source) <= pairs:
            raise UserError(f"{where}: {pairs} examples and a query need more than the {len(self.source)} images "
                            f"of the {split} split")  # fmt: skip
        length = 1 + (2 * tokenizer.length + 2) * (pairs + 1) if tasks else 1 + tokenizer.length
        if length > layout.length:
            raise UserError(
                f"{where}: {f'{pairs + 1} pairs' if tasks else 'an image'} of {tokenizer.length} tokens per image and "
                f"the tokens between them are {length}, longer than config.data.length={layout.length}"
            )

    @staticmethod
    def blank(cfg: Mapping, layout: Layout, tokenizer) -> dict:
        """A row of zeros with the arrays of every example, from the config alone: nothing is read."""
        row = interleave([], layout, tokenizer)
        return row | ({name: np.zeros_like(row["tokens"]) for name in ALIGNED} if cfg.get("aligned") else {})

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> dict:
        """Row `index`: tokens, targets, loss_mask, input_mask; task and examples are drawn from `rng`."""
        tokenizer = self.tokenizer
        bos = Text([tokenizer.bos_id])
        if not self.tasks:
            ids = tokenizer.encode(self._image(index))
            return self._placed(interleave([bos, Text(ids, target=self.answer)], self.layout, tokenizer))
        images, annotations = self._pairs(index, rng)
        ids = tokenizer.encode(np.stack([*images, *annotations]))
        to, sep = ([tokenizer.token_id(name)] for name in ("<to>", "<sep>"))
        every = self.answer and self.targets == "all"
        segments = [bos]
        for image, annotation in zip(ids[: len(images)], ids[len(images) :]):
            segments += [
                Text([*image, *to], target=every),
                Text(annotation, target=self.answer),
                Text(sep, target=every),
            ]
        row = self._placed(interleave(segments if self.answer else segments[:-2], self.layout, tokenizer))
        return row if self.answer else {**row, "answer": ids[-1]}

    def _placed(self, row: dict) -> dict:
        """The row with `aligned` positions: each image is P tokens behind a special one."""
        if self.aligned:
            step, at = self.tokenizer.length + 1, np.arange(self.layout.length)
            pair, annotation = np.divmod(at // step, 2) if self.tasks else (at // step, 0 * at)
            row |= {"positions": pair * step + at % step, "token_types": annotation}
            row |= {name: (row[name] * row["input_mask"]).astype(np.int32) for name in ALIGNED}
        return row

    def _pairs(self, index: int, rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Images and annotations, the query's last."""
        query = self._image(index)
        task = self._task(rng, query)
        images, annotations, used = [], [], [index]
        for _ in range(self.pairs):
            image = self._other(used, rng)
            if self.shuffled:
                annotations.append(self._task(rng, query)(self._other(used, rng, keep=False)))
            else:
                annotations.append(task(image))
            images.append(image)
        return [*images, query], [*annotations, task(query)]

    def _task(self, rng: np.random.Generator, image: np.ndarray) -> Task:
        name = self.tasks[int(rng.integers(len(self.tasks)))]
        return Task(name, rng, image.shape, self.colors, self.held_out)

    def _other(self, used: list[int], rng: np.random.Generator, keep: bool = True) -> np.ndarray:
        """An image that is none of `used`, to which it is added."""
        free = len(self.source) - len(used)
        if free < 1:
            raise UserError("dataset 'visual_sentences': the split has too few images for shuffled pairs")
        # The number among those that are free, then its place among all.
        chosen = int(rng.integers(free))
        for taken in sorted(used):
            chosen += chosen >= taken
        if keep:
            used.append(chosen)
        return self._image(chosen)

    def _image(self, index: int) -> np.ndarray:
        item = self.source[index]
        if "image" not in item:
            raise UserError(f"dataset 'visual_sentences': the source gives {', '.join(sorted(item))}, no 'image'")
        image = np.asarray(item["image"], np.float32)
        if not np.isfinite(image).all():
            raise CorruptRecord(f"image {index} of the source holds numbers that are not finite")
        return image
