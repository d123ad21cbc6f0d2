"""Perceptual distance: how far two items are apart in the feature maps of a convolutional network (LPIPS).

The section `perceptual` of an objective says which network:

    path        folder of a run, whose encoder of the modality is taken, trained by any objective; or a file of VGG16 in
                torchvision's layout, for images in [0, 1] (see `vfm.interop.lpips`)
    encoder     the name of the encoder in that run; "": that of the modality
    checkpoint  of a run: "latest" or a step
    heads       a file of LPIPS's weights of the channels; "": 1 each
    random      without a path: the fields of a convolutional encoder, {"name": "vgg", …}; its weights stay random.
                Its distances follow edges and textures, but know nothing of the data
    seed        of the random weights
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm.blocks import TABLES, build_block
from vfm.errors import UserError, unknown
from vfm.interop import lpips
from vfm.train.trained_encoder import open_encoder, restore_encoder

FIELDS = {"path": "", "encoder": "", "checkpoint": "latest", "heads": "", "random": None, "seed": 0}


def distance(a: Sequence[jax.Array], b: Sequence[jax.Array], heads: Sequence[jax.Array] | None = None) -> jax.Array:
    """Distance of two items by their feature maps float[B, h, w, D] of each layer: float32[B] (LPIPS, eq. 1).

    The features of each place are brought to length 1; the squared differences, times the weights float[D] of the
    channels in `heads` (None: 1), are added over the channels, averaged over the places, and added over the layers.
    """
    total = jnp.zeros(())
    for layer, (x, y) in enumerate(zip(a, b, strict=True)):
        difference = jnp.square(_unit(x) - _unit(y))
        if heads is not None:
            difference = difference * heads[layer].astype(jnp.float32)[None, None, None]
        total = total + difference.sum(axis=-1).mean(axis=(1, 2))
    return total


def _unit(x):
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    # Places where all features are 0 are common after a ReLU. There the value is 0, and so is the gradient.
    return jnp.where(square > 1e-20, x / (jnp.sqrt(jnp.maximum(square, 1e-20)) + 1e-10), 0.0)


class Perceptual:
    """The perceptual network of an objective.

    variables: what it reads, without a gradient: {"params", "batch_stats", "heads"}. A call gives the distance of items
    and others, float[B, *item_shape] each: float32[B].
    """

    def __init__(self, cfg: Mapping[str, Any], name: str, item_shape: tuple[int, ...], where: str):
        """cfg: the section of this module's docstring, for items of the modality `name`. Raises `UserError` for fields
        that are unknown or do not fit, and for files that are missing."""
        fields = {**FIELDS}
        for field, value in dict(cfg).items():
            if field not in FIELDS:
                raise unknown("field", field, FIELDS, where)
            fields[field] = value
        if not fields["path"] and not fields["random"]:
            raise UserError(f"{where} needs a path (a run, or a file of VGG16), or random (an encoder)")
        if len(item_shape) not in (2, 3):
            raise UserError(f"{where}: items of shape {tuple(item_shape)} are no images")
        size, channels = tuple(item_shape[:2]), (*item_shape, 1)[2]
        self._mean = self._std = None
        path = pathlib.Path(fields["path"]).expanduser()
        if not fields["path"]:
            shape = {"image_size": size, "channels": channels}
            block = build_block(TABLES["encoders"], {**shape, **dict(fields["random"])}, f"{where}.random")
            self.encoder = _maps(block, size, f"{where}.random")
            variables = jax.device_get(jax.jit(lambda key: self._init(key))(jax.random.key(fields["seed"])))
        elif path.is_dir():
            theirs = fields["encoder"] or name
            config, block = open_encoder(path, theirs, f"{where}.path")
            self.encoder = _maps(block, size, where)
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            variables = restore_encoder(path, config, self.encoder, theirs, everywhere, fields["checkpoint"])
            variables = jax.device_get(variables)
        else:
            self.encoder, params = lpips.vgg16(str(path), size, where)
            variables, self._mean, self._std = {"params": params}, lpips.MEAN, lpips.STD
        if self.encoder.channels not in (channels, 3 if channels == 1 else channels):
            raise UserError(f"{where}: the network takes {self.encoder.channels} channels, but items have {channels}")
        if fields["heads"]:
            maps = jax.eval_shape(lambda v: self._features(v, jnp.zeros((1, *item_shape))), variables)
            weights = lpips.heads(fields["heads"], tuple(x.shape[-1] for x in maps), f"{where}.heads")
            variables["heads"] = {str(layer): weight for layer, weight in enumerate(weights)}
        self.variables: dict[str, Any] = variables

    def __call__(self, variables: Mapping[str, Any], items: jax.Array, others: jax.Array) -> jax.Array:
        heads = variables.get("heads")
        if heads is not None:
            heads = [heads[str(layer)] for layer in range(len(heads))]
        return distance(self._features(variables, items), self._features(variables, others), heads)

    def _features(self, variables, items) -> tuple[jax.Array, ...]:
        items = items[..., None] if items.ndim == 3 else items
        if items.shape[-1] != self.encoder.channels:
            items = jnp.repeat(items, self.encoder.channels, axis=-1)  # a grey image
        if self._mean is not None:
            mean, std = (np.float32(x)[None, None, None] for x in (self._mean, self._std))
            items = (items - mean) / std
        own = {name: leaves for name, leaves in variables.items() if name != "heads"}
        return self.encoder.apply(own, items, train=False)[1]["stages"]

    def _init(self, key) -> dict[str, Any]:
        return dict(self.encoder.init(key, jnp.zeros((1, *self.encoder.item_shape)), train=False))


def _maps(block, size: tuple[int, int], where: str):
    """A convolutional encoder without a classifier, for items of any size: its parameters are those of its own."""
    if not {"stages", "image_size", "num_classes"} <= set(block.__dataclass_fields__):
        raise UserError(
            f"{where}: {type(block).__name__} has no feature maps; the network must be convolutional: 'vgg' or 'resnet'"
        )
    return block.clone(image_size=size, num_classes=None)
