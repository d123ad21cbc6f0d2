"""Weight maps: which tensor of a published checkpoint is which parameter, and in what layout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Form(NamedTuple):
    """A layout: `load(tensor, shape)` gives our array of one layer, `save(array)` gives the tensor back."""

    load: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda tensor, shape: tensor, lambda array: array)
# A bias of heads: [N·K] <-> [N, K].
FLAT = Form(lambda tensor, shape: tensor.reshape(shape), lambda array: array.reshape(-1))
# torch.nn.Linear stores [out, in]; ours are [*in, *out], with one dimension of input …
LINEAR = Form(lambda tensor, shape: tensor.T.reshape(shape), lambda array: array.reshape(array.shape[0], -1).T)
# … or two: [N, K, D] of the attention's output.
LINEAR_OUT = Form(lambda tensor, shape: tensor.T.reshape(shape), lambda array: array.reshape(-1, array.shape[-1]).T)
# GPT-2's Conv1D stores [in, out].
CONV1D = Form(lambda tensor, shape: tensor.reshape(shape), lambda array: array.reshape(array.shape[0], -1))
CONV1D_OUT = Form(lambda tensor, shape: tensor.reshape(shape), lambda array: array.reshape(-1, array.shape[-1]))
# Gemma's norms multiply by 1 + weight.
PLUS_ONE = Form(
    lambda tensor, shape: tensor + np.ones((), tensor.dtype), lambda array: array - np.ones((), array.dtype)
)


class Tensor(NamedTuple):
    """One tensor of a checkpoint, or with `{i}` one per layer, with `{e}` one per expert.

    name: in the checkpoint. paths: our parameters; several where the checkpoint has them fused. fused: how:
    "rows": one after the other along the first axis, "columns": along the last; "heads": along the first axis, head by
    head, all parts of a head together.
    """

    name: str
    paths: tuple[str, ...]
    form: Form = SAME
    fused: str = "rows"

    def split(self, tensor: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """The parts of a (fused) tensor in our layout; `shapes` are those of one layer."""
        count = len(self.paths)
        if count == 1:
            pieces = [tensor]
        elif self.fused == "heads":
            N, K = shapes[0][-2:]
            by_head = tensor.reshape(N, count, K, *tensor.shape[1:])
            pieces = [by_head[:, part].reshape(N * K, *tensor.shape[1:]) for part in range(count)]
        else:
            outputs = slice(1 if self.form in (LINEAR, CONV1D) else 0, None)  # the dimensions behind the input
            ends = np.cumsum([int(np.prod(shape[outputs])) for shape in shapes])
            pieces = np.split(tensor, ends[:-1], axis=0 if self.fused == "rows" else -1)
        return [self.form.load(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        pieces = [self.form.save(array) for array in arrays]
        if len(pieces) == 1:
            return pieces[0]
        if self.fused == "heads":
            N = arrays[0].shape[-2]
            heads = [piece.reshape(N, -1, *piece.shape[1:]) for piece in pieces]
            return np.concatenate(heads, axis=1).reshape(-1, *pieces[0].shape[1:])
        return np.concatenate(pieces, axis=0 if self.fused == "rows" else -1)

    def indices(self, depth: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, leading index into our parameters) of every tensor that this row stands for."""
        layers = range(depth) if "{i}" in self.name else (None,)
        for i in layers:
            for e in range(experts) if "{e}" in self.name else (None,):
                yield self.name.format(i=i, e=e), tuple(k for k in (i, e) if k is not None)


class Family(NamedTuple):
    """How the checkpoints of one `model_type` are read and written.

    read: (config.json, head) -> config.model. head: "lm", "mlm", "pretraining", "classification", or "none".
    write: `config.model` with every field -> config.json, or None; the caller checks that reading it gives the
      same model. tensors: `config.model` with every field -> the weight map.
    encoders: names of the encoders of its models. heads: name of an architecture in config.json -> head. prefix: of the
      names under a head, which a checkpoint without head leaves out. ignored: regexes of tensors that are none.
    """

    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    write: Callable[[Mapping[str, Any], str], dict[str, Any] | None]
    tensors: Callable[[Mapping[str, Any]], list[Tensor]]
    heads: Mapping[str, str]
    prefix: str
    ignored: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ("text",)
