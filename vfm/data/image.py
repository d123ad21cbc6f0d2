"""Image sources: scikit-learn's handwritten digits, and folders of image files."""

from collections.abc import Mapping

import numpy as np

from vfm.data.records import SPLITS, CorruptRecord, check_split, class_files
from vfm.errors import UserError, unknown

MODES = ("RGB", "L")
# How images were prepared for published models: whether the shorter side is resized and the middle cut out, or both
# sides are; the filter; mean and standard deviation of the channels, from 0 to 1.
STYLES = {
    "clip": (True, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "vit": (False, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "siglip": (False, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class Digits:
    """The 1,797 handwritten digits that ship with scikit-learn.

    Item: image float32[8, 8, 1] in [0, 1], label int. Splits are about 70/10/20 % by a seeded permutation.
    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
    """

    def __init__(self, split: str, seed: int = 0):
        from sklearn.datasets import load_digits

        check_split(split, SPLITS, "source 'digits'")
        data = load_digits()
        order = np.random.default_rng(seed).permutation(len(data.target))
        first, second = round(0.7 * len(order)), round(0.8 * len(order))
        rows = {"train": order[:first], "validation": order[first:second], "test": order[second:]}[split]
        self.rows = rows  # positions in load_digits(), for those who want to check that splits are disjoint
        self.images = (data.images[rows, :, :, None] / 16.0).astype(np.float32)
        self.labels = data.target[rows].astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index])}


class ImageFolder:
    """Image files in class sub-folders: dir/<split>/<class>/<file>, or dir/<class>/<file> with `fractions`.

    mode: "RGB" (C=3) or "L" (grey, C=1). size: (H, W) to resize to, bilinear; () keeps each file's own size.
    fractions: {split: share}, to split by the hash of the path. classes: class names in label order.
    Item: image float32[H, W, C] in [0, 1], label int. A file that cannot be decoded raises CorruptRecord.
    """

    def __init__(
        self,
        split: str,
        dir: str,
        mode: str = "RGB",
        size: tuple[int, ...] = (),
        classes: tuple[str, ...] = (),
        fractions: Mapping[str, float] | None = None,
    ):
        if mode not in MODES:
            raise unknown("image mode", mode, MODES, where="source 'image_folder'")
        self.mode, self.size = mode, check_size(size, "source 'image_folder'")
        self.paths, self.labels, self.class_names = class_files(
            "source 'image_folder'", dir, split, EXTENSIONS, classes, fractions
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        return {"image": read_image(self.paths[index], self.mode, self.size), "label": int(self.labels[index])}


def read_image(path, mode: str, size: tuple[int, ...]) -> np.ndarray:
    """float32[H, W, C] in [0, 1] of an image file; one that cannot be decoded raises CorruptRecord."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image_array(image, mode, size)
    # PIL raises any of them for damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise CorruptRecord(f"image file {str(path)!r} cannot be read: {error}") from error


def image_array(image, mode: str, size: tuple[int, ...]) -> np.ndarray:
    """float32[H, W, C] in [0, 1] of a PIL image; 16-bit greys keep their depth. Raises ValueError for pixels that are
    floating-point numbers, whose range a file does not tell."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; write them as 8 or 16 bits, or take source 'npz'")
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion to 8 bits would clip it
        image = Image.fromarray(np.asarray(image).astype(np.float32) / 65535.0, mode="F")
        scale = 1.0
    else:
        image, scale = image.convert(mode), 255.0
    if size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    array = np.asarray(image, np.float32) / scale
    array = array[..., None] if array.ndim == 2 else array
    return np.repeat(array, 3, axis=-1) if mode == "RGB" and array.shape[-1] == 1 else array


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[H, W, C], bilinear, as uint8[*size, C]."""
    from PIL import Image

    plane = lambda c: Image.fromarray(image[..., c]).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.stack([np.asarray(plane(c)) for c in range(image.shape[-1])], axis=-1)


def check_size(size, where: str) -> tuple[int, ...]:
    """The field `size` of a source of images: () or (H, W)."""
    size = tuple(size)
    if size and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
        raise UserError(f"{where}: size={size} must be (H, W), or () for each image's own size")
    return size


def preprocess(image: np.ndarray, size: int, style: str = "clip") -> np.ndarray:
    """uint8[H, W, 3] as a published model of images takes it: float32[size, size, 3]; `style`: see `STYLES`."""
    from PIL import Image

    if style not in STYLES:
        raise unknown("style", style, STYLES, "image preprocessing")
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"preprocess takes an image uint8[H, W, 3], not {image.dtype}{list(image.shape)}")
    cut, interpolation, mean, std = STYLES[style]
    shorter = min(image.shape[:2])
    rows, columns = (size * side // shorter for side in image.shape[:2]) if cut else (size, size)
    resized = Image.fromarray(image).resize((columns, rows), Image.Resampling[interpolation.upper()])
    top, left = (rows - size) // 2, (columns - size) // 2
    array = np.asarray(resized, np.float32)[top : top + size, left : left + size] / np.float32(255)
    return (array - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
