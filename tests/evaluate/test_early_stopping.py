"""The best validation loss of a training."""

import json

import pytest
from ml_collections import ConfigDict

from vfm.errors import UserError
from vfm.evaluate.early_stopping import check_early_stopping, early_stopping


class Finished:
    """What the evaluator asks of an experiment."""

    def __init__(self, folder, **fields):
        self.folder = folder
        self.config = ConfigDict({"eval": {"test_split": "test", "early_stopping": fields}})

    def evaluate_loss(self, params, variables, split, rows):
        assert (split, rows) == ("train", 7)
        return {"loss": 1.0}


def test_the_lowest_validation_loss_counts(tmp_path):
    lines = [(5, "validation", 2.5), (10, "train", 0.1), (10, "validation", 2.0), (15, "validation", 2.25)]
    text = "".join(json.dumps({"step": s, "split": split, "loss": loss}) + "\n" for s, split, loss in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    run = Finished(tmp_path, rows=7)
    check_early_stopping(run)
    assert early_stopping(run, None, None, "validation", 3).metrics == {}
    assert early_stopping(run, None, None, "test", 3).metrics == {
        "early_stopping_loss": 2.0, "early_stopping_step": 10, "early_stopping_gap": 1.25
    }  # fmt: skip


def test_a_run_that_was_not_trained_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no validation loss"):
        early_stopping(Finished(tmp_path, rows=7), None, None, "test", 3)
    with pytest.raises(UserError, match="rows=-1 must be a whole number"):
        check_early_stopping(Finished(tmp_path, rows=-1))
    with pytest.raises(UserError, match="unknown field 'row'"):
        check_early_stopping(Finished(tmp_path, row=1))
