"""Features in which sets of items are compared: raw values, a judge's, or those of a network of the user's own."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from vfm import data
from vfm.errors import UserError
from vfm.evaluate.judge import Judge
from vfm.train.trained_encoder import open_encoder, restore_encoder

OWN = ("pixels", "judge")  # the spaces that need no run


class Items(NamedTuple):
    """raw float[n, *item_shape], and labels int[n] or None."""

    raw: np.ndarray
    labels: np.ndarray | None


class Space(NamedTuple):
    """features: items float[n, *item_shape] -> float[n, D]. judge: the classifier whose features they are, or None."""

    features: Callable[[np.ndarray], np.ndarray]
    judge: Judge | None = None


def shown(items: np.ndarray) -> np.ndarray:
    """bool[B, N]: which items of a row are there; one that is absent is all zeros."""
    return np.any(items != 0, axis=tuple(range(2, items.ndim)))


def real_items(experiment, dataset, name: str, limit: int | None) -> Items:
    """The items of a modality in so many rows of a data set (0, None: all), with the labels of their rows."""
    raw, labels = [], []
    for host, _ in experiment.eval_batches(dataset, limit):
        items = host["inputs"][name]
        keep = shown(items) & (host["example_mask"] > 0)[:, None]
        raw.append(items[keep])
        if "label" in host:
            labels.append(of_rows(host["label"], keep))
    return Items(np.concatenate(raw), np.concatenate(labels) if labels else None)


def of_rows(labels: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The labels [B] or [B, N] of rows, or of their items, for the items of keep bool[B, N]."""
    return np.broadcast_to(labels.reshape(len(labels), -1), keep.shape)[keep]


def training_items(experiment, name: str, limit: int | None, **overrides) -> Items:
    """Items of the training split, not augmented. overrides: of the data set, such as its task."""
    return real_items(experiment, experiment.dataset("train", train=False, **overrides), name, limit)


def check_space(experiment, name: str, choice: str, where: str) -> None:
    """Refuses features that cannot be had: `judge` for data without labels, and a folder that is no run."""
    kind = data.DATASETS.get(experiment.config.data.name)
    if kind is None or not {"train", "opened"} <= {*inspect.signature(kind).parameters}:
        raise UserError(
            f"{where.rpartition('.')[0]} needs data whose rows hold items, such as config.data.name='items', not "
            f"{experiment.config.data.name!r}"
        )
    if choice == "judge":
        if "label" not in kind.keys:
            raise UserError(
                f"{where}='judge' needs data with labels, and the dataset {experiment.config.data.name!r} has none"
            )
    elif choice != "pixels":
        _open(choice, name, experiment, where)


def space(experiment, name: str, choice: str, where: str, training: Items) -> Space:
    """The features that `choice` names, for items of a modality.

      "pixels"   the raw values
      "judge"    of a `Judge` fitted on the training items
      a folder   of a run: the encoder of this modality there, what it gives for an item or the mean of its features

    Raises UserError as `check_space` does.
    """
    if choice == "pixels":
        return Space(lambda items: np.asarray(items, np.float64).reshape(len(items), -1))
    if choice == "judge":
        if training.labels is None:
            raise UserError(f"{where}='judge' needs data with labels")
        judge = Judge(training.raw, training.labels)
        return Space(judge.features, judge)
    return Space(_encoder(choice, name, experiment, where))


def _open(folder: str, name: str, experiment, where: str):
    """(config, encoder) of a run, whose items must be those here."""
    config, encoder = open_encoder(folder, name, f"{where} ({', '.join(OWN)} or a folder)")
    wanted = experiment.layout.modality(name).item_shape
    if tuple(encoder.item_shape) != tuple(wanted):
        raise UserError(
            f"{where}={folder!r}: its encoders.{name} takes items of shape {tuple(encoder.item_shape)}, and those here "
            f"have {tuple(wanted)}"
        )
    return config, encoder


def _encoder(folder: str, name: str, experiment, where: str) -> Callable[[np.ndarray], np.ndarray]:
    config, encoder = _open(folder, name, experiment, where)
    place = jax.sharding.NamedSharding(experiment.mesh, jax.sharding.PartitionSpec())
    variables = restore_encoder(folder, config, encoder, name, place)

    @jax.jit
    def encode(variables, items):
        features, out = encoder.apply(variables, items, train=False)
        return out["pooled"] if "pooled" in out else features.mean(axis=1)

    def features(items: np.ndarray) -> np.ndarray:
        size, parts = experiment.config.eval.batch_size, []
        for begin in range(0, len(items), size):
            part = np.asarray(items[begin : begin + size], np.float32)
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.float32)])
            parts.append(np.asarray(encode(variables, filled))[: len(part)])
        return np.concatenate(parts)

    return features
