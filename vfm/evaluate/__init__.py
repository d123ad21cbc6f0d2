"""Named evaluators: `EVALUATORS[name](experiment, params, variables, split, limit) -> Evaluation`.

`CHECKS[name](experiment)` raises `UserError` for a config that the evaluator cannot work with, before the training.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vfm.errors import UserError, unknown


class Evaluation(NamedTuple):
    """metrics: flat name -> number. samples: {title: (caption, rows)} for the report; a row is a list of cells."""

    metrics: dict[str, float]
    samples: dict[str, tuple[str, list[list[Any]]]]


def options(experiment, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.eval.NAME` says of an evaluator, over its defaults; `UserError` for a field that it has not."""
    given = experiment.config.eval.get(name, {})
    for field in given:
        if field not in defaults:
            raise unknown("field", field, defaults, f"config.eval.{name}")
    return {**defaults, **given}


def check_length(name: str, length: int, model) -> None:
    """Refuses passages of `config.eval.NAME.length` tokens that are longer than the model."""
    if length > model.backbone.max_len:
        raise UserError(
            f"config.eval.{name}.length={length} is longer than model.backbone.max_len={model.backbone.max_len}"
        )


def fewest(*limits: int | None) -> int:
    """The smallest of several limits, of which 0 and None are none; 0 if there is none."""
    return min((limit for limit in limits if limit), default=0)


def cell(experiment, name: str, item: Any) -> tuple:
    """An item of a modality as a cell of the report: a sound, an image, or its numbers."""
    rate = getattr(experiment.model.item_block(name), "sample_rate", None)
    if item.ndim == 1 and rate:
        return ("audio", item, rate)
    if item.ndim == 3 and item.shape[-1] in (1, 3):
        return ("image", np.clip(item, 0, 1))
    return ("text", np.array2string(item, precision=2, threshold=8))


from vfm.evaluate.answers import answers, check_answers  # noqa: E402
from vfm.evaluate.any_to_any import any_to_any, check_any_to_any  # noqa: E402
from vfm.evaluate.continuation import check_continuation, continuation  # noqa: E402
from vfm.evaluate.course import check_course, course  # noqa: E402
from vfm.evaluate.early_stopping import check_early_stopping, early_stopping  # noqa: E402
from vfm.evaluate.generation import check_generation, generation  # noqa: E402
from vfm.evaluate.in_context import check_in_context, in_context  # noqa: E402
from vfm.evaluate.joint import check_joint, joint  # noqa: E402
from vfm.evaluate.matching import check_matching, matching  # noqa: E402
from vfm.evaluate.probe import check_probe, probe  # noqa: E402
from vfm.evaluate.reconstruction import check_reconstruction, reconstruction  # noqa: E402
from vfm.evaluate.retrieval import check_retrieval, retrieval  # noqa: E402
from vfm.evaluate.spectrum import check_spectrum, spectrum  # noqa: E402
from vfm.evaluate.text import check_text, text  # noqa: E402
from vfm.evaluate.visual import check_visual, visual  # noqa: E402

EVALUATORS = {
    "answers": answers,
    "any_to_any": any_to_any,
    "continuation": continuation,
    "course": course,
    "early_stopping": early_stopping,
    "generation": generation,
    "in_context": in_context,
    "joint": joint,
    "matching": matching,
    "probe": probe,
    "reconstruction": reconstruction,
    "retrieval": retrieval,
    "spectrum": spectrum,
    "text": text,
    "visual": visual,
}
CHECKS = {
    "answers": check_answers,
    "any_to_any": check_any_to_any,
    "continuation": check_continuation,
    "course": check_course,
    "early_stopping": check_early_stopping,
    "generation": check_generation,
    "in_context": check_in_context,
    "joint": check_joint,
    "matching": check_matching,
    "probe": check_probe,
    "reconstruction": check_reconstruction,
    "retrieval": check_retrieval,
    "spectrum": check_spectrum,
    "text": check_text,
    "visual": check_visual,
}
