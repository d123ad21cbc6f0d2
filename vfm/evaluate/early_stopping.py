"""The best validation loss of a training, and how far the last one is from the loss on what was learnt from."""

from vfm import distributed
from vfm.errors import UserError
from vfm.evaluate import Evaluation, options
from vfm.train.logging import read_history

DEFAULTS = {"rows": 256}


def check_early_stopping(experiment) -> None:
    """Refuses `rows` that are no number of rows."""
    rows = options(experiment, "early_stopping", DEFAULTS)["rows"]
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise UserError(f"config.eval.early_stopping.rows={rows!r} must be a whole number >= 0")


def early_stopping(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Of the course of a training, at its end (with the test split):

      early_stopping_loss     the lowest validation loss, as if training had been stopped there; its tokens are those of
                              `config.eval.limit` rows, every `config.eval.every` steps
      early_stopping_step     where that was
      early_stopping_gap      the last validation loss less that of `rows` rows of the training split: what was learnt
                              by heart. Also positive where the two splits differ in kind

    config.eval.early_stopping = {"rows": 256}, 0: all. Nothing is chosen by it: the run ends with its last
    parameters.
    """
    rows = options(experiment, "early_stopping", DEFAULTS)["rows"]
    if split != experiment.config.eval.test_split:
        return Evaluation({}, {})
    learnt = experiment.evaluate_loss(params, variables, "train", rows)["loss"]
    if not distributed.is_main():  # the only process that has the file
        return Evaluation({}, {})
    path = experiment.folder / "metrics.jsonl"
    history = [line for line in read_history(path) if line["split"] == "validation" and line.get("loss") is not None]
    if not history:
        raise UserError(f"{path} has no validation loss: the evaluator 'early_stopping' is for a run that was trained")
    best = min(history, key=lambda line: line["loss"])
    return Evaluation(
        {
            "early_stopping_loss": best["loss"],
            "early_stopping_step": best["step"],
            "early_stopping_gap": history[-1]["loss"] - learnt,
        },
        {},
    )
