"""When a metric came to its level: on lines written by hand, and names that no line has."""

import json
import types

import pytest
from ml_collections import ConfigDict

from vfm.errors import UserError
from vfm.evaluate.course import check_course, course, first_steps

LINES = [
    {"step": 10, "split": "train", "loss": 2.0, "token_accuracy": 0.5, "time": 1.0},
    {"step": 10, "split": "validation", "loss": None, "token_accuracy": 0.2, "time": 1.0},
    {"step": 20, "split": "train", "loss": 1.0, "token_accuracy": 0.95, "time": 1.0},
    {"step": 20, "split": "validation", "loss": 0.4, "token_accuracy": 0.3, "time": 1.0},
    {"step": 30, "split": "validation", "loss": 0.5, "token_accuracy": 0.96, "time": 1.0},
    {"step": 40, "split": "validation", "loss": 0.3, "token_accuracy": 0.9, "time": 1.0},
]


def experiment(levels, folder=None):
    config = ConfigDict({"eval": {"course": levels, "split": "validation", "test_split": "test"}})
    return types.SimpleNamespace(config=config, folder=folder)


def test_the_first_step_at_a_level_and_no_key_where_it_never_was():
    levels = {"token_accuracy": {"at_least": 0.95}, "train_token_accuracy": {"at_least": 0.95}}
    levels |= {"loss": {"at_most": 0.4}, "train_loss": {"at_most": 0.1}}
    assert first_steps(LINES, levels) == {
        "course_token_accuracy_first_step": 30,
        "course_train_token_accuracy_first_step": 20,
        "course_loss_first_step": 20,
    }


def test_a_level_and_the_whole_curve():
    levels = {"loss": {"at_most": 0.4, "every": 20}, "token_accuracy": {"every": 40}}
    assert first_steps(LINES, levels) == {
        "course_loss_at_20": 0.4,
        "course_loss_first_step": 20,
        "course_loss_at_40": 0.3,
        "course_token_accuracy_at_40": 0.9,
    }


def test_it_is_given_at_the_end_and_unknown_names_are_told_before(tmp_path):
    ours = experiment({"loss": {"at_most": 0.4}}, tmp_path)
    ask = lambda ours, split: course(ours, None, None, split, None).metrics
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert ask(ours, "validation") == {} and ask(ours, "test") == {"course_loss_first_step": 20}
    wrong = experiment({"token_acuracy": {"at_least": 1.0}}, tmp_path)
    with pytest.raises(
        UserError, match="unknown metric 'token_acuracy' in config.eval.course; did you mean 'token_acc"
    ):
        ask(wrong, "validation")
    path.write_text(json.dumps(LINES[0]) + "\n")  # validation has not been asked yet
    assert ask(wrong, "validation") == {}
    path.unlink()
    with pytest.raises(UserError, match="cannot read .*metrics.jsonl"):
        ask(ours, "test")


@pytest.mark.parametrize(
    "levels, words",
    [
        ({}, "needs config.eval.course"),
        ({"loss": 0.3}, "config.eval.course.loss=0.3 must have at_least or at_most, or every"),
        ({"loss": {}}, "must have at_least or at_most, or every"),
        ({"loss": {"at_least": 1.0, "at_most": 2.0}}, "must have at_least or at_most, or every"),
        ({"loss": {"at_last": 1.0}}, "unknown field 'at_last' in config.eval.course.loss; did you mean 'at_least'"),
        ({"loss": {"at_least": "1"}}, "config.eval.course.loss.at_least='1' must be a number"),
        ({"loss": {"every": 0}}, "every=0 must be a whole number of steps >= 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_levels_that_are_none_are_refused(levels, words):
    with pytest.raises(UserError, match=words):
        check_course(experiment(levels))
    check_course(experiment({"loss": {"at_most": 0.3, "every": 20}}))
