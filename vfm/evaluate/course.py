"""When a metric of the training first came to a level."""

import math
from collections.abc import Mapping, Sequence

from vfm import distributed
from vfm.errors import UserError, unknown
from vfm.evaluate import Evaluation
from vfm.train.logging import TIME_FIELDS, read_history

LEVELS = ("at_least", "at_most", "every")


def check_course(experiment) -> None:
    """Refuses a config without levels, and levels that are none."""
    levels = experiment.config.eval.get("course", {})
    if not levels:
        raise UserError(
            "the evaluator 'course' needs config.eval.course, such as {'token_accuracy': {'at_least': 0.95}}"
        )
    for name, level in levels.items():
        where = f"config.eval.course.{name}"
        if not hasattr(level, "items") or not level or {"at_least", "at_most"} <= {*level}:
            raise UserError(f"{where}={level!r} must have at_least or at_most, or every, such as {{'at_least': 0.95}}")
        for field, value in level.items():
            if field not in LEVELS:
                raise unknown("field", field, LEVELS, where)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{where}.{field}={value!r} must be a number")
            if field == "every" and (value < 1 or value != int(value)):
                raise UserError(f"{where}.every={value!r} must be a whole number of steps >= 1")


def course(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Of the course of the training, as metrics.jsonl has it:

      course_METRIC_first_step   the first step at which the metric was at its level; left out where it never was
      course_METRIC_at_STEP      its values at the steps that are multiples of a number, for whole curves

    config.eval.course = {METRIC: {"at_least": 0.95}}, or {"at_most": …}, or {"every": 100}, or such a level and every;
    a metric of validation, or with "train_" before its name one of training. It is asked at the end, with the test
    split; during training only for unknown names, as soon as metrics.jsonl has lines of both kinds. Raises UserError
    for a metric that is none.
    """
    levels = experiment.config.eval.course
    if not distributed.is_main():  # the only process that has the file
        return Evaluation({}, {})
    history = read_history(experiment.folder / "metrics.jsonl")
    if {line["split"] for line in history} >= {"train", "validation"}:
        known = {_name(line["split"], key) for line in history for key in line if key not in _ABOUT}
        for name in levels:
            if name not in known:
                raise unknown("metric", name, known, "config.eval.course")
    at_end = split == experiment.config.eval.test_split
    return Evaluation(first_steps(history, levels) if at_end else {}, {})


_ABOUT = ("step", "split", *TIME_FIELDS)


def _name(split: str, metric: str) -> str:
    return f"train_{metric}" if split == "train" else metric


def first_steps(history: Sequence[Mapping], levels: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What `course` gives, of the lines of a metrics.jsonl."""
    found: dict[str, float] = {}
    for line in history:
        for key, value in line.items():
            level = levels.get(_name(line["split"], key)) if key not in _ABOUT else None
            if level is None or value is None:  # null: not finite
                continue
            name = f"course_{_name(line['split'], key)}"
            if "every" in level and line["step"] % level["every"] == 0:
                found[f"{name}_at_{line['step']}"] = value
            if ("at_least" in level and value >= level["at_least"]) or (
                "at_most" in level and value <= level["at_most"]
            ):
                found.setdefault(f"{name}_first_step", line["step"])
    return found
