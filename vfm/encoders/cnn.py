"""Convolutional image encoders, VGG and ResNet: the places of the last feature map are the tokens, rows first."""

import flax.linen as nn
import jax

from vfm.encoders import check_item
from vfm.errors import UserError, unknown
from vfm.layers.norm import BatchNorm

NORMS = ("none", "batch", "group")
STEMS = ("large", "small")
# Field values of published sizes, for configs: {"name": "resnet", **RESNET50, "image_size": (224, 224), "channels": 3}.
VGG11 = dict(stages=(1, 1, 2, 2, 2), widths=(64, 128, 256, 512, 512), norm="none")
VGG16 = dict(stages=(2, 2, 3, 3, 3), widths=(64, 128, 256, 512, 512), norm="none")
_RESNET = dict(widths=(64, 128, 256, 512), stem="large", norm="batch")
RESNET18 = dict(stages=(2, 2, 2, 2), bottleneck=False, **_RESNET)
RESNET50 = dict(stages=(3, 4, 6, 3), bottleneck=True, **_RESNET)
# He et al. 2015, eq. 10, over the outputs: the variance of the gradient stays through ReLU.
_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class CNNFields(nn.Module):
    """The fields that VGG and ResNet share.

    image_size, channels: `item_shape` is (H, W, C); an image of another shape raises `UserError`
    stages: convolutions (VGG) or blocks (ResNet) per stage. widths: channels of each stage
    norm: "none", "batch" (see `BatchNorm`: its averages are in the collection `batch_stats`, and items that only fill a
      batch count in them), or "group" (Wu & He 2018), with `groups` groups, which has no state and looks at one item
    num_classes: a classifier stands on top, and gives out["logits"] float[B, num_classes]; None: there is none

    out["stages"]: the last feature map of each stage, float[B, h, w, D], in VGG before the pooling.
    """

    image_size: tuple[int, int] = (8, 8)
    channels: int = 1
    stages: tuple[int, ...] = (1, 1)
    widths: tuple[int, ...] = (16, 32)
    norm: str = "group"
    groups: int = 8
    num_classes: int | None = None
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (*self.image_size, self.channels)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def check(self, image: jax.Array) -> None:
        """Refuses fields that do not fit each other, and images of another shape."""
        what = type(self).__name__
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS, f"model.encoders ({what})")
        if len(self.stages) != len(self.widths):
            raise UserError(
                f"{what}: stages={tuple(self.stages)} and widths={tuple(self.widths)} must be of one length"
            )
        if self.norm == "group":
            for width in self.widths:
                if width % self.groups:
                    raise UserError(f"{what}: groups={self.groups} does not divide the {width} channels of a stage")
        check_item(self, image)

    def convolve(self, x: jax.Array, width: int, size: int, name: str, *, stride: int = 1) -> jax.Array:
        """A square convolution with zeros around, as many on all sides: rows and columns / stride, rounded up."""
        pad = ((size - 1) // 2, (size - 1) // 2)
        return nn.Conv(
            width,
            (size, size),
            strides=(stride, stride),
            padding=(pad, pad),
            use_bias=self.norm == "none",
            kernel_init=_init,
            dtype=self.dtype,
            name=name,
        )(x)

    def normalise(self, x: jax.Array, name: str, *, train: bool, zero: bool = False) -> jax.Array:
        """The norm that the fields say. zero: its scale starts at zero."""
        init = nn.initializers.zeros if zero else nn.initializers.ones
        if self.norm == "batch":
            return BatchNorm(scale_init=init, dtype=self.dtype, name=name)(x, train=train)
        if self.norm == "group":
            return nn.GroupNorm(
                self.groups, epsilon=1e-5, scale_init=init, use_fast_variance=False, dtype=self.dtype, name=name
            )(x)
        return x

    def classify(self, pooled: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classes")(pooled)


class VGG(CNNFields):
    """VGG (Simonyan & Zisserman 2015): image float[B, H, W, C] -> (float[B, h · w, D], out); D is the last width.

    Stages of 3×3 convolutions with ReLU, each followed by 2×2 max pooling, so that h = H / 2^stages. With `num_classes`
    the paper's head stands on the last feature map: two layers of `head_dim` with ReLU and dropout, and the classes.
    out["pooled"] float[B, D]: the mean of the features. Fields: `CNNFields`.
    """

    norm: str = "none"
    head_dim: int = 4096
    head_dropout: float = 0.5

    @property
    def width(self) -> int:
        return self.widths[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last feature map."""
        grid = tuple(side // 2 ** len(self.stages) for side in self.image_size)
        if not all(grid):
            raise UserError(f"VGG: images of {tuple(self.image_size)} are too small for {len(self.stages)} stages")
        return grid

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool):
        self.check(image)
        B, P = image.shape[0], self.num_tokens
        x, maps = image.astype(self.dtype), []
        for stage, (count, width) in enumerate(zip(self.stages, self.widths)):
            for i in range(count):
                name = f"{stage}_{i}"
                x = self.convolve(x, width, 3, f"conv_{name}")
                x = nn.relu(self.normalise(x, f"norm_{name}", train=train))
            maps.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(B, P, self.width)
        out = {"pooled": x.mean(axis=1), "stages": tuple(maps)}
        if self.num_classes is not None:
            if not 0 <= self.head_dropout < 1:
                raise UserError(f"VGG: head_dropout={self.head_dropout} must be a share, from 0 to less than 1")
            h = x.reshape(B, -1)
            for i in range(2):
                h = nn.relu(nn.Dense(self.head_dim, dtype=self.dtype, name=f"hidden_{i}")(h))
                h = nn.Dropout(self.head_dropout, name=f"dropout_{i}")(h, deterministic=not train)
            out["logits"] = self.classify(h)
        return x, out


class ResNet(CNNFields):
    """Residual network (He et al. 2016a): image float[B, H, W, C] -> (float[B, h · w, D], out).

    Fields: `CNNFields`, and
      bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions, the last of which has four times the stage's width (D is four
        times the last width); the 3×3 one has the stride ("v1.5"). False: two 3×3 convolutions
      stem: "large": 7×7 convolution of stride 2 and 3×3 max pooling of stride 2, so that h = H / 2^(stages + 1);
        "small": one 3×3 convolution, for small images (section 4.2): h = H / 2^(stages - 1). Sides are rounded up.

    out["pooled"] float[B, D]: the mean of the features, on which the classifier stands. The scale of each block's last
    norm starts at zero (Goyal et al. 2017, section 5.1): the blocks start as the identity.
    """

    bottleneck: bool = False
    stem: str = "small"

    @property
    def width(self) -> int:
        return self.widths[-1] * (4 if self.bottleneck else 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last feature map."""
        halvings = len(self.stages) - 1 + 2 * (self.stem == "large")
        return tuple(-(-side // 2**halvings) for side in self.image_size)

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool):
        self.check(image)
        if self.stem not in STEMS:
            raise unknown("stem", self.stem, STEMS, "model.encoders (ResNet)")
        B, P = image.shape[0], self.num_tokens
        large = self.stem == "large"
        x = image.astype(self.dtype)
        x = self.convolve(x, self.widths[0], 7 if large else 3, "conv_stem", stride=2 if large else 1)
        x = nn.relu(self.normalise(x, "norm_stem", train=train))
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        maps = []
        for stage, (count, width) in enumerate(zip(self.stages, self.widths)):
            for i in range(count):
                stride = 2 if stage and not i else 1
                x = self._block(x, width, stride, f"{stage}_{i}", train)
            maps.append(x)
        x = x.reshape(B, P, self.width)
        out = {"pooled": x.mean(axis=1), "stages": tuple(maps)}
        if self.num_classes is not None:
            out["logits"] = self.classify(out["pooled"])
        return x, out

    def _block(self, x, width, stride, name, train):
        last = width * (4 if self.bottleneck else 1)
        layers = ((3, stride, width), (3, 1, last))
        if self.bottleneck:
            layers = ((1, 1, width), (3, stride, width), (1, 1, last))
        y = x
        for i, (size, step, channels) in enumerate(layers):
            end = i == len(layers) - 1
            y = self.convolve(y, channels, size, f"conv_{name}_{i}", stride=step)
            y = self.normalise(y, f"norm_{name}_{i}", train=train, zero=end)
            y = y if end else nn.relu(y)
        if stride > 1 or x.shape[-1] != last:
            x = self.convolve(x, last, 1, f"conv_{name}_shortcut", stride=stride)
            x = self.normalise(x, f"norm_{name}_shortcut", train=train)
        return nn.relu(x + y)
