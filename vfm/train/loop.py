"""The train loop: evaluate -> checkpoint -> step -> log the step before. It knows no model and no objective."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from vfm import metrics
from vfm.errors import UserError


def train(
    state: Any,
    train_step: Callable[[Any, Any], tuple[Any, dict]],
    batches: Iterator[Any],
    *,
    start: int,
    steps: int,
    evaluate: Callable[[Any, int], dict[str, float]],
    eval_every: int,
    save: Callable[..., None],
    save_every: int,
    logger,
    log_every: int,
    stop_requested: Callable[[int], bool],
    each_step: Callable[[], None] = lambda: None,
    memory: dict | None = None,
) -> tuple[Any, int]:
    """Trains from step `start` to `steps`; returns the state and the number of steps done (fewer when stopped).

    Args:
      train_step: (state, batch) -> (state, {name: (sum, count)}); it may donate the state.
      batches: one batch per step, from step `start` on.
      evaluate: (state, step) -> metrics, every `eval_every` steps and at the end. 0: only at the end.
      save: (step, state, memory, metrics=, wait=), every `save_every` steps, at the end, and when stopped. `metrics`
        are those of an evaluation at this very step, else {}: the best checkpoint is one that was evaluated. `memory`
        is what the loop itself must remember to log the same lines after a resume: JSON, given back as `memory`.
      stop_requested: asked before every step; True saves and returns (preemption).
      each_step: called once per step, for work in the background to report its errors.

    Metrics are read one step late, so that the device never waits for the host. A loss that is not finite raises
    `UserError` with the step and the last finite metrics; that step is not saved.
    """
    memory = memory or {}
    interval: dict[str, tuple[float, float]] = {k: tuple(v) for k, v in memory.get("interval", {}).items()}
    pending: dict | None = None
    last_finite = "none yet"

    def read(step: int) -> None:
        """Takes in the metrics of `step`, and logs those of the interval that it ends."""
        nonlocal interval, pending, last_finite
        if pending is None:
            return
        measured = metrics.fetch(pending)
        pending = None
        means = metrics.finalize(measured)
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"step {step}: {', '.join(bad)} not finite; last finite metrics ({last_finite}). Lower the "
                "learning rate, clip gradients, or look at the data of this step"
            )
        last_finite = f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(means.items()))
        interval = metrics.add(interval, measured)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            logger.log(step + 1, metrics.finalize(interval))
            interval = {}

    def evaluated(step: int) -> dict[str, float]:
        read(step - 1)
        with logger.paused():
            found = evaluate(state, step)
        logger.log(step, found, split="validation")
        return found

    def keep(step: int, validation: dict[str, float], wait: bool = False) -> None:
        read(step - 1)
        with logger.paused():
            save(step, state, {"interval": interval}, metrics=validation, wait=wait)

    saved = start or None  # a fresh run has nothing on disk yet
    for step in range(start, steps):
        validation = {}
        if eval_every and step > start and step % eval_every == 0:
            validation = evaluated(step)
        if save_every and step > start and step % save_every == 0:
            keep(step, validation)
            saved = step
        if stop_requested(step):
            if step != saved:
                keep(step, validation, wait=True)
            return state, step
        batch = next(batches)
        state, measured = train_step(state, batch)
        read(step - 1)
        pending = measured
        each_step()
    read(steps - 1)
    if start < steps:
        keep(steps, evaluated(steps), wait=True)
    jax.block_until_ready(state)
    return state, steps
