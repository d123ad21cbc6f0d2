import pytest

from tests import tiny
from vfm.errors import UserError
from vfm.evaluate.course import first_steps
from vfm.experiment import Experiment


def test_whole_curves():
    history = [
        {"step": step, "split": split, "accuracy": step / 100, "loss": None if step == 20 else 1.0}
        for step in (10, 20, 30)
        for split in ("train", "validation")
    ]
    found = first_steps(history, {"accuracy": {"every": 20}, "loss": {"every": 1}, "train_accuracy": {"at_least": 0.2}})
    assert found == {
        "course_accuracy_at_20": 0.2,
        "course_loss_at_10": 1.0,
        "course_loss_at_30": 1.0,
        "course_train_accuracy_first_step": 20,
    }


def test_refusals():
    c = tiny.config("text")
    c.unlock()
    c.eval.evaluators, c.eval.course = ("course",), {"loss": {"every": 0.5}}
    with pytest.raises(UserError, match="config.eval.course.loss.every=0.5 must be a whole number"):
        Experiment(c)
