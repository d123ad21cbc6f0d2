"""Random changes of a training item, by modality."""

from collections.abc import Mapping

import numpy as np

from vfm.errors import UserError, unknown

FIELDS = ("shift", "scale", "rotate", "gain_db")


def check(augment: Mapping[str, Mapping[str, float]], ranks: Mapping[str, int]) -> None:
    """Refuses a modality or a field that is not known, and pictures' changes for what is no picture."""
    for modality, fields in augment.items():
        if modality not in ranks:
            raise unknown("modality", modality, ranks, where="field `augment`")
        for field, value in fields.items():
            if field not in FIELDS:
                raise unknown("field", field, FIELDS, where=f"augment.{modality}")
            if field in ("scale", "rotate") and ranks[modality] != 3:
                raise UserError(f"augment.{modality}.{field} needs items [H, W, C], found rank {ranks[modality]}")
            if value < 0 or (field == "scale" and value >= 1):
                raise UserError(f"augment.{modality}.{field}={value} is out of range")


def apply(array: np.ndarray, rng: np.random.Generator, fields: Mapping[str, float]) -> np.ndarray:
    """A changed copy of an item, float32 of the same shape; what moves in from outside is zero.

    shift: up to so many places, whole numbers, along H and W of [H, W, C], or along the first axis otherwise.
    scale: factor in [1 - scale, 1 + scale]; rotate: up to so many degrees; both bilinear about the centre.
    gain_db: up to so many dB louder or softer. All draws are uniform.
    """
    if fields.get("scale") or fields.get("rotate"):
        array = _affine(array, rng, fields.get("scale", 0.0), fields.get("rotate", 0.0))
    if fields.get("shift"):
        most = int(fields["shift"])
        for axis in range(2 if array.ndim == 3 else 1):
            array = _shift(array, int(rng.integers(-most, most + 1)), axis)
    if fields.get("gain_db"):
        array = array * np.float32(10 ** (rng.uniform(-1, 1) * fields["gain_db"] / 20))
    return array


def _shift(array: np.ndarray, by: int, axis: int) -> np.ndarray:
    if by == 0:
        return array
    out, size = np.zeros_like(array), array.shape[axis]
    keep = max(size - abs(by), 0)
    to, frm = [slice(None)] * array.ndim, [slice(None)] * array.ndim
    to[axis] = slice(size - keep, size) if by > 0 else slice(0, keep)
    frm[axis] = slice(0, keep) if by > 0 else slice(size - keep, size)
    out[tuple(to)] = array[tuple(frm)]
    return out


def _affine(array: np.ndarray, rng: np.random.Generator, scale: float, rotate: float) -> np.ndarray:
    from scipy.ndimage import affine_transform

    factor, angle = 1 + rng.uniform(-scale, scale), np.deg2rad(rng.uniform(-rotate, rotate))
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / factor
    centre = (np.array(array.shape[:2]) - 1) / 2
    offset = centre - matrix @ centre
    planes = [
        affine_transform(array[..., c], matrix, offset, order=1, output=np.float32) for c in range(array.shape[-1])
    ]
    return np.stack(planes, axis=-1)
