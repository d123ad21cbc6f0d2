"""Weight maps: which tensor of a published checkpoint is which parameter, and in what layout."""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vfm.errors import UserError


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
    # In float32, as the published code: in bfloat16 the sum loses what the weight has.
    lambda tensor, shape: tensor.astype(np.float32) + 1,
    lambda array: (np.asarray(array, np.float32) - 1).astype(array.dtype),
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


def read_config(folder: pathlib.Path, name: str = "config.json") -> dict[str, Any]:
    """The object in a JSON file; `UserError` for a file that is missing or is none."""
    file = folder / name
    if not folder.is_dir():
        raise UserError(f"interop: {folder} is not a folder; give one with config.json and *.safetensors")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"interop: {file} does not exist") from None
    except ValueError as error:
        raise UserError(f"interop: {file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"interop: {file} holds a {type(found).__name__}, not an object")
    return found


class Files:
    """The tensors of a folder by name, read when asked for."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"interop: {index} is damaged: {error}") from None
        else:
            files = sorted(file.name for file in folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"interop: {folder} has no *.safetensors file")
        self.open: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        for file in files:
            self.where |= dict.fromkeys(self._open(file).keys(), file)

    def _open(self, file: str):
        from safetensors import SafetensorError, safe_open

        if file not in self.open:
            path = self.folder / file
            if not path.is_file():
                raise UserError(f"interop: {path} does not exist; the index names it")
            try:
                self.open[file] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"interop: {path} is not a safetensors file: {error}") from None
        return self.open[file]

    @property
    def names(self) -> list[str]:
        """As they stand in the files."""
        return list(self.where)

    def find(self, name: str, prefix: str) -> str:
        """The name in the files of a tensor of the weight map, where `@` is the prefix, or nothing.

        Files older than safetensors call scale and bias of norms gamma and beta.
        """
        for full in dict.fromkeys((name.replace("@", prefix), name.replace("@", ""))):
            older = full.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            for spelling in (full, older):
                if spelling in self.where:
                    return spelling
        raise UserError(f"{self.folder}: the tensor {name.replace('@', prefix)} is missing")

    def read(self, name: str) -> np.ndarray:
        return self._open(self.where[name]).get_tensor(name)
