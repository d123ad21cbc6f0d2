"""Fitted laws as one JSON file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vfm import report
from vfm.errors import UserError, unknown
from vfm.scaling_laws.fitting import Fit
from vfm.scaling_laws.forms import FORMS

VERSION = 1
# Which laws a file may hold: of one variable each, of N and D, and the gap between training and validation loss where
# data are seen more than once (form "product" of D_over_N, unique tokens per parameter, and epochs).
LAWS = ("N", "D", "C", "joint", "gap")
# Which parameters N counts.
COUNTS = ("non_embedding", "total")


class Laws(NamedTuple):
    """What a file holds. laws: {name in LAWS: Fit}; count: in COUNTS; flops: FLOPs of a parameter and a token that C
    was computed with; about: text or numbers on where the runs are from (study, data, tokenizer, versions)."""

    laws: dict[str, Fit]
    count: str
    flops: float
    about: dict[str, Any]


def save(
    path, laws: Mapping[str, Fit], *, count: str, flops: float = 6.0, about: Mapping[str, Any] | None = None
) -> None:
    """Writes laws, with their draws, atomically. Raises UserError for names that are not in LAWS or COUNTS."""
    _check(laws, count, "scaling_laws.save")
    fits = {name: {field: _short(value) for field, value in vars(law).items()} for name, law in laws.items()}
    content = {"scaling_laws": VERSION, "count": count, "flops": flops, "about": dict(about or {}), "laws": fits}
    report.write_json(path, content)


def load(path) -> Laws:
    """Reads what `save` wrote. Raises UserError for a file that is missing or is another."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the laws {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    version = content.get("scaling_laws") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(f"{path} is no file of scaling laws of version {VERSION}, as experiments.scaling writes it")
    try:
        laws = {name: _fit(values) for name, values in content["laws"].items()}
        found = Laws(laws, content["count"], float(content["flops"]), content["about"])
        if not (np.isfinite(found.flops) and found.flops > 0):
            raise ValueError(f"flops={found.flops} must be positive")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: a law is not whole: {type(error).__name__} {error}") from None
    _check(found.laws, found.count, str(path))
    return found


def _check(laws: Mapping[str, Fit], count: str, where: str) -> None:
    for name in laws:
        if name not in LAWS:
            raise unknown("law", name, LAWS, where)
    if count not in COUNTS:
        raise unknown("count of parameters", count, COUNTS, where)


def _fit(values: Mapping[str, Any]) -> Fit:
    arrays = ("x", "loss", "runs", "centre", "theta", "draws")
    fields = {field.name: values[field.name] for field in dataclasses.fields(Fit)}
    found = {name: np.array(value) if name in arrays else value for name, value in fields.items()}
    made = Fit(**{**found, "variables": tuple(found["variables"])})
    P, V = len(FORMS[made.form].parameters), len(made.variables)
    if any(found[name].dtype.kind not in "fiu" for name in arrays):
        raise ValueError(f"arrays of {made.form} that are no numbers")
    if made.theta.shape != (P,) or made.draws.shape[1:] != (P,) or made.x.shape != (len(made.loss), V):
        raise ValueError(f"arrays of {made.form} with wrong shapes")
    return made


def _short(value):
    """Arrays with 9 digits: draws need no more."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.vectorize(lambda x: float(f"{x:.9g}"), otypes=[float])(value).tolist()
    return value
