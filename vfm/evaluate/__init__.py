"""Named evaluators: `EVALUATORS[name](experiment, params, variables, split, limit) -> Evaluation`."""

from typing import Any, NamedTuple


class Evaluation(NamedTuple):
    """metrics: flat name -> number. samples: {title: (caption, rows)} for the report; a row is a list of cells."""

    metrics: dict[str, float]
    samples: dict[str, tuple[str, list[list[Any]]]]


from vfm.evaluate.any_to_any import any_to_any  # noqa: E402

EVALUATORS = {"any_to_any": any_to_any}
