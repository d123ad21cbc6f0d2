"""One run under training: what it goes on from, what it measures and saves on the way, and its log."""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import jax

from vfm import distributed, tree
from vfm.errors import UserError, unknown
from vfm.experiment import Experiment, evaluation_params
from vfm.plan import abstract_batch, step_flops
from vfm.train import stages
from vfm.train.checkpoint import Checkpointer
from vfm.train.logging import Logger, peak_flops
from vfm.train.step import make_eval_step
from vfm.workdir import record


def open_checkpoints(experiment: Experiment, path: Path, read_only: bool = False) -> Checkpointer:
    """The checkpoints in a run's folder, kept as `config.checkpoint` says."""
    cfg = experiment.config.checkpoint
    return Checkpointer(
        path / "checkpoints",
        keep=cfg.keep,
        keep_best=cfg.keep_best,
        best_metric=cfg.best_metric or None,
        best_mode=cfg.best_mode,
        read_only=read_only,
    )


class Training:
    """A run from its last good checkpoint, or from its start; a context manager, which closes checkpoints and log.

    state, start (the step), memory (of `train.loop`): where it goes on. quiet: shows no progress. Raises `UserError`
    for data, a metric or a checkpoint that do not fit the config.
    """

    def __init__(self, experiment: Experiment, path: Path, *, quiet: bool = False):
        self.experiment, self.path, self.quiet = experiment, path, quiet
        config = experiment.config
        experiment.check_data("train", config.eval.split, config.eval.test_split)
        _check_best_metric(experiment)

    def __enter__(self) -> "Training":
        with contextlib.ExitStack() as stack:
            self.checkpointer = stack.enter_context(open_checkpoints(self.experiment, self.path))
            position = self._begin()
            self.logger = stack.enter_context(contextlib.closing(self._logger()))
            self._closing = stack.pop_all()
        self.memory, self._before = position.get("log"), position.get("seconds", 0.0)
        self.start_clock()
        return self

    def __exit__(self, *exc) -> None:
        self._closing.__exit__(*exc)

    def _begin(self) -> dict[str, Any]:
        """Restores or makes the state; the position that was saved with it."""
        experiment, config = self.experiment, self.experiment.config
        restored = self.checkpointer.restore(experiment.abstract_state)
        self.state, position, self.start = restored or (experiment.init_state(), {}, 0)
        if self.start > config.train.steps:
            raise UserError(f"the checkpoint is at step {self.start}, beyond config.train.steps={config.train.steps}")
        if restored:
            self.origin = stages.resume(experiment, self.state, stages.read(self.path))
        else:
            self.state, self.origin = stages.begin(experiment, self.state)
        if distributed.is_main():
            record(self.path, config)
            stages.write(self.path, self.origin)
        return position

    def _logger(self) -> Logger:
        experiment, config = self.experiment, self.experiment.config
        steps, size = config.train.steps, config.train.batch_size
        logger = Logger(
            self.path,
            start_step=self.start,
            total_steps=steps,
            examples_per_step=size,
            tokens_per_step=size * config.data.length,
            tensorboard=config.log.tensorboard,
            is_main=distributed.is_main(),
            stream=io.StringIO() if self.quiet else None,
            **_utilisation(experiment),
        )
        mesh = {name: parts for name, parts in experiment.mesh.shape.items() if parts > 1}
        logger.message(
            f"{tree.count(self.state.params):,} parameters on {experiment.mesh.size} device(s), mesh {mesh or 1}; "
            + (f"resuming at step {self.start} of {steps}" if self.start else f"training {steps} steps")
            + "; compiling the first"
        )
        for line in stages.tell(self.origin):
            logger.message(line)
        return logger

    def start_clock(self, together: int = 1) -> None:
        """Counts the time of training from now on; of `together` runs in one program, each has its share of it."""
        self._started, self._together = time.time(), together

    def seconds(self) -> float:
        """Of training, all starts together."""
        return self._before + (time.time() - self._started) / self._together

    def evaluate(self, state, step: int) -> dict[str, float]:
        """What is measured on the validation split at a step."""
        experiment, config = self.experiment, self.experiment.config
        params = evaluation_params(state)
        found = experiment.evaluate_loss(params, state.variables, config.eval.split, config.eval.limit)
        # The last evaluation is on the test split, unless the best checkpoint is chosen by an evaluator's metric.
        best = config.checkpoint.best_metric
        if step < config.train.steps or (best and best not in found):
            for _, evaluator in experiment.evaluators():
                found |= evaluator(experiment, params, state.variables, config.eval.split, config.eval.limit).metrics
        return found

    def save(self, step: int, state, memory: dict, metrics: dict[str, float], wait: bool) -> None:
        """Saves a step, see `train.loop`."""
        config = self.experiment.config
        position = {
            "next_step": step,
            "seed": config.seed,
            "batch_size": config.train.batch_size,
            "seconds": self.seconds(),
            "log": memory,
        }
        self.checkpointer.save(step, state, position, metrics, wait=wait)


def _check_best_metric(experiment) -> None:
    """Refuses a `checkpoint.best_metric` that validation cannot give. What evaluators give is not known yet."""
    name = experiment.config.checkpoint.best_metric
    if name and name != "loss" and not experiment.config.eval.evaluators:
        state = experiment.abstract_state
        measured, _ = jax.eval_shape(
            make_eval_step(experiment.loss_fn), state.params, state.variables, abstract_batch(experiment)
        )
        if name not in measured:
            raise unknown("metric", name, ["loss", *measured], "config.checkpoint.best_metric")


def _utilisation(experiment) -> dict[str, float]:
    """FLOPs of a step and peak FLOP/s of all devices, where the device's peak is known (not on CPU)."""
    peak = peak_flops(jax.devices()[0])
    if peak is None:
        return {}
    return {"flops_per_step": step_flops(experiment), "peak_flops": peak * experiment.mesh.size}
