"""Perceptual networks as published: VGG16 in torchvision's layout, and the heads of LPIPS (Zhang et al. 2018)."""

import pathlib
from typing import Any

import numpy as np

from vfm.encoders.cnn import VGG, VGG16
from vfm.errors import UserError

# What torchvision's networks take for images in [0, 1]; that of LPIPS for [-1, 1] is the same.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read(path: str, where: str) -> dict[str, np.ndarray]:
    """The tensors of a `.pth` file (needs torch) or `.safetensors` file, by name."""
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{where}: there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return dict(load_file(file))
        import torch

        return {name: x.float().numpy() for name, x in torch.load(file, map_location="cpu", weights_only=True).items()}
    except ImportError as error:
        raise UserError(f"{where}: {file} needs the package {error.name}") from None
    except Exception as error:  # whatever a damaged file makes the library raise
        raise UserError(f"{where}: {file} cannot be read: {str(error).splitlines()[0]}") from None


def vgg16(path: str, image_size: tuple[int, int], where: str) -> tuple[VGG, dict[str, Any]]:
    """(the encoder for RGB images of that size, its parameters) of a state dict "features.N.weight", "features.N.bias".

    The layers N count convolutions, ReLUs and poolings; the classifier is left out. Raises `UserError` for another
    layout.
    """
    tensors, params, at, before = read(path, where), {}, 0, 3
    for stage, (count, width) in enumerate(zip(VGG16["stages"], VGG16["widths"])):
        for i in range(count):
            weight, bias = (_take(tensors, f"features.{at}.{name}", path, where) for name in ("weight", "bias"))
            if weight.shape != (width, before, 3, 3) or bias.shape != (width,):
                raise UserError(
                    f"{where}: features.{at} in {path} has shapes {weight.shape} and {bias.shape}, and that of VGG16 "
                    f"{(width, before, 3, 3)} and {(width,)}"
                )
            params[f"conv_{stage}_{i}"] = {"kernel": weight.transpose(2, 3, 1, 0), "bias": bias}
            at, before = at + 2, width
        at += 1
    return VGG(image_size=image_size, channels=3, **VGG16), params


def heads(path: str, widths: tuple[int, ...], where: str) -> tuple[np.ndarray, ...]:
    """The weights of the channels of each layer, float[D], of a state dict "linK.model.1.weight" float[1, D, 1, 1]."""
    tensors, found = read(path, where), []
    for layer, width in enumerate(widths):
        name = f"lin{layer}.model.1.weight"
        weight = _take(tensors, name, path, where)
        if weight.shape != (1, width, 1, 1):
            raise UserError(f"{where}: {name} in {path} has shape {weight.shape}, not {(1, width, 1, 1)}")
        found.append(weight.reshape(-1))
    return tuple(found)


def _take(tensors, name: str, path: str, where: str) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{where}: {path} has no {name!r}; it has {', '.join(sorted(tensors)[:4])}, …")
    return tensors[name]
