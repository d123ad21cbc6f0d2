"""Images as tokens: every pixel is one of few colours (iGPT, Chen et al. 2020)."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from vfm.errors import UserError, unknown

SPECIAL = ("<pad>", "<bos>", "<eos>", "<to>", "<sep>")
FILE = "palette.json"
_PIXELS = 200_000  # of the training images, at most, from which colours are learned


class ImageTokenizer:
    """What tokenizers of images share: special tokens, which come first, and codes, which follow them.

    The first three special tokens are padding, begin and end; "<to>" stands between an image and its annotation, and
    "<sep>" behind a pair. item_shape: (H, W, C) of the images. length: P, the tokens of an image, in raster order.
    """

    special: tuple[str, ...]
    item_shape: tuple[int, int, int]
    num_codes: int
    length: int

    pad_id, bos_id, eos_id = 0, 1, 2

    @property
    def vocab_size(self) -> int:
        return len(self.special) + self.num_codes

    def token_id(self, name: str) -> int:
        """Id of a special token; an unknown name raises UserError."""
        if name not in self.special:
            raise unknown("special token", name, self.special, where="tokenizer field `special`")
        return self.special.index(name)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Ids int32[..., P] of images float[..., H, W, C]; images of another shape raise UserError."""
        images = np.asarray(images, np.float32)
        if images.shape[-3:] != self.item_shape:
            raise UserError(f"the tokenizer is for images of shape {self.item_shape}, not {images.shape[-3:]}")
        codes = self.to_codes(images.reshape(-1, *self.item_shape))
        return codes.reshape(*images.shape[:-3], self.length).astype(np.int32) + len(self.special)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Images float32[..., H, W, C] of ids int[..., P]; an id that is no code raises UserError."""
        ids = np.asarray(ids)
        if ids.shape[-1:] != (self.length,):
            raise UserError(f"an image is {self.length} tokens, not {ids.shape[-1:]}")
        codes = ids.reshape(-1, self.length).astype(np.int64) - len(self.special)
        if codes.size and not 0 <= codes.min() <= codes.max() < self.num_codes:
            wrong = ids.flat[int(np.flatnonzero((codes < 0) | (codes >= self.num_codes))[0])]
            raise UserError(f"token id {wrong} is no code of an image; these are {len(self.special)} to "
                            f"{self.vocab_size - 1}")  # fmt: skip
        return self.from_codes(codes).reshape(*ids.shape[:-1], *self.item_shape)

    def to_codes(self, images: np.ndarray) -> np.ndarray:
        """int[n, P] of images float32[n, H, W, C]."""
        raise NotImplementedError

    def from_codes(self, codes: np.ndarray) -> np.ndarray:
        """float32[n, H, W, C] of codes int[n, P]."""
        raise NotImplementedError


def check_special(special: Sequence[str]) -> tuple[str, ...]:
    """The special tokens, if they begin with padding, begin and end, and none is there twice."""
    special = tuple(special)
    if special[:3] != SPECIAL[:3] or len(set(special)) != len(special):
        raise UserError(f"tokenizer field `special` must begin with {SPECIAL[:3]}, each once; found {special}")
    return special


@dataclasses.dataclass(frozen=True, eq=False)
class Palette(ImageTokenizer):
    """A token for each pixel: the nearest of the colours float32[K, C]."""

    colors: np.ndarray
    item_shape: tuple[int, int, int]
    special: tuple[str, ...] = SPECIAL

    def __post_init__(self):
        object.__setattr__(self, "colors", np.asarray(self.colors, np.float32))
        object.__setattr__(self, "item_shape", tuple(map(int, self.item_shape)))
        object.__setattr__(self, "special", check_special(self.special))
        if len(self.item_shape) != 3 or self.colors.ndim != 2 or self.colors.shape[1] != self.item_shape[2]:
            raise UserError(f"palette: colours {self.colors.shape} do not fit images of shape {self.item_shape}")

    @property
    def num_codes(self) -> int:
        return len(self.colors)

    @property
    def length(self) -> int:
        return self.item_shape[0] * self.item_shape[1]

    def to_codes(self, images):
        return nearest(images.reshape(-1, self.item_shape[2]), self.colors).reshape(len(images), -1)

    def from_codes(self, codes):
        return self.colors[codes].reshape(len(codes), *self.item_shape)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What ids mean, to compare two tokenizers: names of special tokens, and bytes of colours."""
        offset = len(self.special)
        return b"".join(self.special[i].encode() if i < offset else self.colors[i - offset].tobytes() for i in ids)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the palette into a folder; `load_palette` reads it."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = {"colors": self.colors.tolist(), "item_shape": self.item_shape, "special": self.special}
        (folder / FILE).write_text(json.dumps(fields), encoding="utf-8")


def load_palette(folder: str | pathlib.Path) -> Palette:
    """The palette of a folder; `UserError` for a damaged file."""
    file = pathlib.Path(folder) / FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Palette(np.asarray(fields["colors"], np.float32), tuple(fields["item_shape"]), tuple(fields["special"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"palette {str(file)!r} cannot be read: {error}") from error


def train_palette(
    images: Iterable[np.ndarray], *, vocab_size: int, special: Sequence[str] = SPECIAL, iterations: int = 100
) -> Palette:
    """k-means of the pixels of images float[H, W, C], all of one shape: vocab_size colours less the special tokens.

    The same images give the same palette. Where there are no more different colours than that, it holds all of them.
    Pixels beyond 200,000 are thinned out evenly. Raises UserError for no images, and for those of different shapes.
    """
    special = check_special(special)
    count, shape, found = vocab_size - len(special), None, []
    if count < 1:
        raise UserError(f"a palette of vocab_size={vocab_size} has no room for colours beside {len(special)} specials")
    for image in images:
        if shape not in (None, image.shape):
            raise UserError(f"a palette needs images of one shape; found {shape} and {image.shape}")
        shape = image.shape
        found.append(np.asarray(image, np.float32).reshape(-1, shape[-1]))
    if shape is None:
        raise UserError("a palette needs images to learn its colours from; the source has none")
    pixels = np.concatenate(found)
    pixels = pixels[:: -(-len(pixels) // _PIXELS)]
    return Palette(kmeans(pixels, count, iterations), shape, special)


def kmeans(points: np.ndarray, count: int, iterations: int = 100) -> np.ndarray:
    """At most `count` centres float32[K, C] of points float[n, C], sorted: Lloyd's algorithm from k-means++
    (Arthur & Vassilvitskii 2007). Points that are equal count as often as they are there; the draws are fixed."""
    values, weight = np.unique(np.asarray(points, np.float64), axis=0, return_counts=True)
    if len(values) <= count:
        return values.astype(np.float32)
    rng = np.random.default_rng(0)
    centres = values[[rng.choice(len(values), p=weight / weight.sum())]]
    near = np.square(values - centres).sum(axis=1)
    while len(centres) < count:
        chosen = values[rng.choice(len(values), p=near * weight / (near * weight).sum())]
        centres = np.concatenate([centres, chosen[None]])
        near = np.minimum(near, np.square(values - chosen[None]).sum(axis=1))
    belongs = None
    for _ in range(iterations):
        before, belongs = belongs, nearest(values, centres)
        if before is not None and (before == belongs).all():
            break
        mass = np.bincount(belongs, weight, count)
        sums = np.stack([np.bincount(belongs, weight * column, count) for column in values.T], axis=1)
        # A centre without points stays where it is.
        centres = np.where(mass[:, None] > 0, sums / np.maximum(mass, 1)[:, None], centres)
    return np.unique(centres.astype(np.float32), axis=0)


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """int[n]: the nearest of centres [K, C] to each point [n, C]; the first of equally near ones."""
    found = []
    for part in np.array_split(points, -(-len(points) // 4096) or 1):
        found.append(np.square(part[:, None] - centres[None]).sum(axis=2).argmin(axis=1))
    return np.concatenate(found)
