"""Named evaluators: `EVALUATORS[name](experiment, params, variables, split, limit) -> Evaluation`.

`CHECKS[name](experiment)` raises `UserError` for a config that the evaluator cannot work with, before the training.
"""

from typing import Any, NamedTuple


class Evaluation(NamedTuple):
    """metrics: flat name -> number. samples: {title: (caption, rows)} for the report; a row is a list of cells."""

    metrics: dict[str, float]
    samples: dict[str, tuple[str, list[list[Any]]]]


from vfm.evaluate.any_to_any import any_to_any, check_any_to_any  # noqa: E402
from vfm.evaluate.text import check_text, text  # noqa: E402

EVALUATORS = {"any_to_any": any_to_any, "text": text}
CHECKS = {"any_to_any": check_any_to_any, "text": check_text}
