"""Runs that differ only in seed and learning rate, trained in one program: the step of all is one `vmap`.

On an accelerator a small model leaves most of the device idle, and several take hardly longer than one. On a CPU one
after the other is faster (`benchmarks/together.py` shows both).
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vfm import distributed
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.train import loop
from vfm.train.preemption import Preemption
from vfm.train.training import Training
from vfm.workdir import identity, prepare

VARIES = ("seed", "optimizer.learning_rate")
SEPARATOR = "/"  # between the number of a run and the name of its metric


def likeness(config) -> str:
    """Runs with the same text can be trained together."""
    fields = {name: value for name, value in identity(config).items() if name not in VARIES}
    return json.dumps(fields, sort_keys=True)


def train(configs: Sequence[Any], workdirs: Sequence[str], devices: Sequence[jax.Device] | None = None) -> bool:
    """Trains runs, each in its folder, to their last step; False if it was stopped before, with all saved.

    Each folder is as if its run had been trained alone, but for rounding: `vfm.run.run` goes on with it, evaluates it,
    and writes its results. A run counts its share of the time as its own. Runs that have come to different steps are
    trained apart. Raises `UserError` for configs that differ in more than `VARIES`, for a mesh of several devices, and
    for all of them where the loss of one is not finite: what it names, NUMBER/loss, counts from 0 in `workdirs`.
    """
    if len({likeness(config) for config in configs}) > 1:
        raise UserError(f"runs that are trained together may differ only in {' and '.join(VARIES)}")
    experiments, paths = [Experiment(config, devices) for config in configs], []
    if experiments[0].mesh.size > 1:
        raise UserError(
            f"runs are trained together on one device, not on {experiments[0].mesh.size}: set config.study.together=1, "
            "or config.mesh to one device"
        )
    for experiment, workdir in zip(experiments, workdirs, strict=True):
        experiment.folder = prepare(workdir, experiment.config, write=distributed.is_main())
        experiment.share_datasets(experiments[0])
        paths.append(experiment.folder)
    with Preemption() as preemption, contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(Training(experiment, path, quiet=path is not paths[0]))
            for experiment, path in zip(experiments, paths, strict=True)
        ]
        for start in sorted({run.start for run in runs}):
            if not _train([run for run in runs if run.start == start], preemption):
                return False
    return True


def _train(runs: Sequence[Training], preemption: Preemption) -> bool:
    """Trains runs that are at the same step; False if it was stopped."""
    first, config = runs[0], runs[0].experiment.config
    first.logger.message(f"{len(runs)} runs in one program")
    for run in runs:
        run.start_clock(together=len(runs))
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(run.state for run in runs))
    for run in runs:
        run.state = None  # it is in the stack now
    with contextlib.closing(_batches(runs)) as batches:
        _, done = loop.train(
            state,
            _step(runs),
            batches,
            start=first.start,
            steps=config.train.steps,
            evaluate=lambda state, step: _evaluate(runs, state, step),
            eval_every=config.eval.every,
            save=lambda *args, **options: _save(runs, *args, **options),
            save_every=config.checkpoint.every,
            logger=_Loggers(runs),
            log_every=config.log.every,
            stop_requested=preemption.requested,
            each_step=lambda: [run.checkpointer.poll() for run in runs],
            memory=_joined_memory(runs),
        )
    return done == config.train.steps


def _step(runs: Sequence[Training]):
    """The step of all runs: (states, batches) -> (states, {"0/loss": …, "1/loss": …}), with leading axis run."""
    experiment = runs[0].experiment
    schedules = [run.experiment.schedule for run in runs]

    def step(number, state, batch):
        schedule = lambda step: jnp.stack([jnp.asarray(s(step), jnp.float32) for s in schedules])[number]
        return experiment.make_step(experiment.loss_fn, schedule=schedule)(state, batch)

    def all_steps(states, batches):
        states, measured = jax.vmap(step)(jnp.arange(len(runs)), states, batches)
        named = {
            f"{i}{SEPARATOR}{name}": (total[i], count[i])
            for name, (total, count) in measured.items()
            for i in range(len(runs))
        }
        return states, named

    return experiment.jit(all_steps, donate_argnums=0)


def _batches(runs: Sequence[Training]) -> Iterator[Any]:
    """The batches of all runs, stacked; each run draws its own."""
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(contextlib.closing(run.experiment.train_batches(run.start))) for run in runs]
        for batches in zip(*streams, strict=True):
            yield jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def _one(run: Training, states, number: int):
    """The state of one run, as it is when it is trained alone."""
    return jax.device_put(jax.tree.map(lambda leaf: leaf[number], states), run.experiment.shardings)


def _evaluate(runs: Sequence[Training], states, step: int) -> dict[str, float]:
    found = {}
    for i, run in enumerate(runs):
        measured = run.evaluate(_one(run, states, i), step)
        found |= {f"{i}{SEPARATOR}{name}": value for name, value in measured.items()}
    return found


def _save(runs: Sequence[Training], step: int, states, memory: dict, metrics: dict[str, float], wait: bool) -> None:
    intervals, measured = _parted(memory["interval"], len(runs)), _parted(metrics, len(runs))
    for i, run in enumerate(runs):
        run.save(step, _one(run, states, i), {"interval": intervals[i]}, measured[i], wait)


def _joined_memory(runs: Sequence[Training]) -> dict:
    """The memories of all runs as that of one loop."""
    return {
        "interval": {
            f"{i}{SEPARATOR}{name}": value
            for i, run in enumerate(runs)
            for name, value in (run.memory or {}).get("interval", {}).items()
        }
    }


def _parted(values: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """{"0/loss": …, "1/loss": …} -> [{"loss": …}, {"loss": …}]"""
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in values.items():
        number, _, name = name.partition(SEPARATOR)
        parts[int(number)][name] = value
    return parts


class _Loggers:
    """The logs of all runs as one."""

    def __init__(self, runs: Sequence[Training]):
        self.loggers = [run.logger for run in runs]

    def log(self, step: int, metrics: dict[str, float], split: str = "train") -> None:
        for logger, own in zip(self.loggers, _parted(metrics, len(self.loggers)), strict=True):
            logger.log(step, own, split)

    @contextlib.contextmanager
    def paused(self):
        with contextlib.ExitStack() as stack:
            for logger in self.loggers:
                stack.enter_context(logger.paused())
            yield
