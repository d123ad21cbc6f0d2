"""Runs that are trained in one program: each is the run that it is alone."""

import json

import jax
import numpy as np
import pytest

from tests import tiny
from vfm import tree
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.run import run
from vfm.train import preemption, together
from vfm.train.training import open_checkpoints

RATES, SEEDS = (1e-3, 3e-3, 3e-3), (0, 0, 1)


@pytest.fixture(autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def configs():
    found = []
    for rate, seed in zip(RATES, SEEDS, strict=True):
        c = tiny.get_config("text")
        c.seed, c.optimizer.learning_rate = seed, rate
        c.train.update(steps=6, ema=0.5)
        c.log.every, c.eval.every = 4, 4
        c.eval.update(limit=16, test_limit=16)
        found.append(c)
    return found


def weights(config, folder):
    experiment = Experiment(config, jax.devices()[:1])
    with open_checkpoints(experiment, folder, read_only=True) as checkpoints:
        state, position, step = checkpoints.restore(experiment.abstract_state)
    return tree.flatten({"params": state.params, "ema": state.ema}), position, step


def test_runs_trained_together_are_those_trained_alone(tmp_path, monkeypatch):
    one = jax.devices()[:1]
    alone, joined = ([tmp_path / kind / str(i) for i in range(3)] for kind in ("alone", "together"))
    results = [run(c, str(folder), one) for c, folder in zip(configs(), alone, strict=True)]
    # Stopped once on the way, between two lines of the log.
    asked = []
    monkeypatch.setattr(preemption.Preemption, "requested", lambda self, step: step == 3 and not asked.append(step))
    assert not together.train(configs(), list(map(str, joined)), one) and asked == [3]
    monkeypatch.setattr(preemption.Preemption, "requested", lambda self, step: False)
    assert together.train(configs(), list(map(str, joined)), one)
    for config, a, b, expected in zip(configs(), alone, joined, results, strict=True):
        (theirs, *_), (ours, position, step) = weights(config, a), weights(config, b)
        assert step == 6 and position["seed"] == config.seed
        for path in theirs:
            np.testing.assert_allclose(ours[path], theirs[path], rtol=2e-3, atol=2e-5, err_msg=path)
        lines = [tiny.history(folder) for folder in (a, b)]
        keys = [[(line["step"], line["split"], sorted(line)) for line in log] for log in lines]
        assert keys[0] == keys[1]
        for here, there in zip(*lines, strict=True):
            np.testing.assert_allclose(here["loss"], there["loss"], rtol=1e-4)
        found = run(config, str(b), one)  # evaluates what is trained
        assert found["step"] == 6 and abs(found["test_loss"] - expected["test_loss"]) < 1e-3
        assert json.loads((b / "results.json").read_text())["test_loss"] == found["test_loss"]
    moved = [weights(config, folder)[0] for config, folder in zip(configs(), joined, strict=True)]
    path = next(path for path in moved[0] if path.endswith("kernel"))
    assert all(np.abs(moved[i][path] - moved[j][path]).max() > 1e-3 for i, j in ((0, 1), (1, 2)))


def test_what_cannot_be_trained_together_is_refused(tmp_path):
    first, second, _ = configs()
    second.train.batch_size = 8
    with pytest.raises(UserError, match="may differ only in seed and optimizer.learning_rate"):
        together.train([first, second], [str(tmp_path / "a"), str(tmp_path / "b")])
    first, second, _ = configs()
    with pytest.raises(UserError, match="together on one device, not on 8: set config.study.together=1"):
        together.train([first, second], [str(tmp_path / "a"), str(tmp_path / "b")])
