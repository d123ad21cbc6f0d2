"""Checkpoints: written in the background, verified when read, restored onto any mesh.

    <directory>/<step>/         state (arrays, orbax), data and metrics (JSON): one committed step
    <directory>/digests/<step>/ sha256 of every file of the step (vfm/train/digests.py)
    <directory>/corrupt/<step>  a damaged step, set aside, never deleted
    <directory>/incomplete/<step>  an interrupted commit, kept until the same step is committed again

A step counts only when all its digests are written; older steps are deleted only after that. So a process
killed at any moment leaves the last committed step whole.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vfm import distributed
from vfm.errors import UserError, unknown
from vfm.train import digests

log = logging.getLogger(__name__)

# Orbax tells every phase of every save through absl's logger. What goes wrong is raised, and told once, here.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)

_TEMPORARY = ".orbax-checkpoint-tmp"
_TRASH = "trash."
_STORAGE = re.compile(  # how the C++ side of orbax words the errors of a file system
    r"No space left on device|Disk quota exceeded|File too large|Permission denied|Read-only file system|"
    r"Input/output error|Stale file handle",
    re.IGNORECASE,
)


class Checkpointer:
    """Saves and restores training states in a directory; all processes make the same calls in one order.

    directory: on a file system that all processes share. keep: how many of the newest steps stay.
    keep_best: how many of the best stay as well, by `best_metric` of the `metrics` given to `save`;
    best_mode: "min" or "max". read_only: for reading beside a run that writes; nothing is moved or deleted.
    Raises UserError for a directory that cannot be written. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: str = "min",
        read_only: bool = False,
    ):
        if "://" in str(directory):
            raise UserError(f"checkpoints need a directory on a (shared) file system, got {directory}")
        if keep < 1 or keep_best < 0:
            raise UserError(f"checkpoint: needs keep >= 1 and keep_best >= 0, got {keep} and {keep_best}")
        if best_mode not in ("min", "max"):
            raise unknown("checkpoint.best_mode", best_mode, ("min", "max"))
        self.directory = Path(directory).absolute()
        self._keep, self._keep_best = keep, keep_best
        self._best_metric, self._best_mode, self._read_only = best_metric, best_mode, read_only
        self._measured = False  # whether the best metric was given in this run
        self._last: int | None = None  # the step that was saved or restored last
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if not read_only and distributed.is_main():
            with self._storage("cannot be used"):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clean()
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    # ------------------------------------------------------------------------------------------ writing

    def save(self, step: int, state, data: dict, metrics: dict[str, float] | None = None, wait: bool = False) -> bool:
        """Starts to write the step and returns once the arrays are copied from the devices.

        state: pytree of arrays (of typed random keys too). data: JSON, such as the position in the data.
        metrics: of this step, for keep-best. Waits first for a save that still runs. Returns False, and
        writes nothing, when this step was the last one saved or restored. Raises UserError (no space, no
        permission, a step that exists).
        """
        if self._read_only:
            raise ValueError("a read-only Checkpointer cannot save")
        self._join()
        if step == self._last:
            return False
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        if self._best_metric in metrics:
            self._measured = True
        elif metrics and self._best_metric is not None and not self._measured and self.best_step() is None:
            # It was never there: a misspelled name.
            raise unknown("checkpoint.best_metric", self._best_metric, metrics)
        path = self.directory / str(step)
        if path.exists():
            raise UserError(f"{path} exists already: restore from {self.directory}, or use an empty directory")
        with self._storage(f"of step {step} could not be written"):
            if distributed.is_main():
                digests.begin(self.directory, step)
            # Orbax takes arrays only, not NumPy scalars.
            state = jax.tree.map(lambda x: x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x), state)
            self._orbax.save(
                path,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data),
                    metrics=ocp.args.JsonSave(metrics),
                ),
            )
        self._last = step
        self._thread = threading.Thread(target=self._commit, args=(step,), name="checkpoint")
        self._thread.start()
        if wait:
            self.wait()
        return True

    def poll(self) -> None:
        """Raises the error of a save that failed in the background. Cheap: for every step."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()

    def wait(self) -> None:
        """Waits until the last save is committed; raises its error. The process may end after this."""
        self._join()

    def close(self) -> None:
        """Waits for the last save and frees the threads of orbax."""
        try:
            self._join()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *exc) -> None:
        # When an error is under way already, it is the one to tell.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _commit(self, step: int) -> None:
        """In the background: the rest of the write, then the digests, then the deletion of old steps."""
        try:
            with self._storage(f"of step {step} could not be written"):
                self._orbax.wait_until_finished()
                if distributed.is_main():
                    digests.write_list(self.directory, step)
                digests.write_share(self.directory, step, jax.process_index(), jax.process_count())
                if distributed.is_main():
                    digests.wait_committed(self.directory, step)
                    self._collect(step)
        except Exception as error:
            self._error = error

    def _collect(self, step: int) -> None:
        """Deletes the steps that are neither among the newest nor among the best."""
        steps = self._committed()
        kept = {step, *steps[: self._keep], *self._ranked(steps)[: self._keep_best]}
        for old in set(steps) - kept:
            # Out of sight first: a half-deleted step must not look like a damaged one.
            trash = self.directory / f"{_TRASH}{old}"
            os.replace(self.directory / str(old), trash)
            shutil.rmtree(digests.folder(self.directory, old))
            shutil.rmtree(trash)
        shutil.rmtree(self.directory / "incomplete" / str(step), ignore_errors=True)

    def _clean(self) -> None:
        """Deletes what a killed run left half written or half deleted."""
        for path in self.directory.iterdir():
            if _TEMPORARY in path.name or path.name.startswith(_TRASH):
                shutil.rmtree(path)
        for path in (self.directory / "digests").glob("*"):
            if not (self.directory / path.name).exists():
                shutil.rmtree(path)

    # ------------------------------------------------------------------------------------------ reading

    def latest_step(self) -> int | None:
        """The newest committed step, or None. Its files are verified only when it is restored."""
        return max(self._committed(), default=None)

    def best_step(self) -> int | None:
        """The committed step with the best `best_metric`, or None."""
        return next(iter(self._ranked(self._committed())), None)

    def restore(self, abstract_state) -> tuple[object, dict, int] | None:
        """The newest good step as (state, data, step), or None when nothing was ever committed.

        abstract_state: pytree of jax.ShapeDtypeStruct with shardings, of any mesh and any number of
        processes. A damaged step is set aside, which is told, and the one before it is used. Raises
        UserError when no good step is left, or when the state on disk has other arrays than abstract_state
        (naming them).
        """
        step = self._verified("latest")
        if step is None:
            return None
        path = self.directory / str(step)
        abstract_state = jax.tree.map(_abstract, abstract_state)
        self._check_fit(path, abstract_state, partial=False)
        with self._storage(f"of step {step} could not be read"):
            restored = self._orbax.restore(
                path,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()),
            )
        self._last = step
        return restored.state, restored.data, step

    def restore_partial(self, abstract, step: str | int = "latest") -> tuple[object, int]:
        """Some branches of a state, such as {"params": …}, and their step; for evaluation.

        abstract: nested dict of jax.ShapeDtypeStruct with shardings; another floating dtype than on disk is
        cast to. step: "latest", "best" or a number. Raises UserError when there is no such step, or when it
        is damaged.
        """
        found = self._verified(step)
        if found is None:
            raise UserError(f"there is no checkpoint in {self.directory}; train first")
        path = self.directory / str(found)
        abstract = jax.tree.map(_abstract, abstract)
        self._check_fit(path, abstract, partial=True)
        with (
            self._storage(f"of step {found} could not be read"),
            contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader,
        ):
            args = ocp.checkpoint_utils.construct_restore_args(abstract)
            restored = reader.restore(
                path / "state",
                args=ocp.args.PyTreeRestore(item=abstract, restore_args=args, partial_restore=True),
            )
        return restored, found

    def _verified(self, wanted: str | int) -> int | None:
        """The wanted step, or the next best one that is good; the same on every process."""
        self._join()
        plan = distributed.gather(self._plan(wanted) if distributed.is_main() else None)[0]
        faults = []
        for step, fault in plan:
            if fault == "incomplete":
                log.info("checkpoint of step %d in %s was not committed; it is not used", step, self.directory)
                self._set_aside(step, "incomplete")
                continue
            if fault is None:
                me, count = jax.process_index(), jax.process_count()
                share = distributed.gather(digests.check_share(self.directory, step, me, count))
                fault = next(filter(None, share), None)
            if fault is None:
                return step
            faults.append(f"step {step}: {fault}")
            self._set_aside(step, "corrupt")
            if distributed.is_main():
                where = "" if self._read_only else f"; it was moved to {self.directory / 'corrupt'}"
                log.warning("checkpoint of step %d in %s is damaged: %s%s", step, self.directory, fault, where)
        aside = self.directory / "corrupt"
        if isinstance(wanted, int):
            known = ", ".join(map(str, sorted(self._committed()))) or "none"
            reason = faults[0] if faults else f"step {wanted} is not there"
            raise UserError(f"no good checkpoint of step {wanted} in {self.directory}: {reason}; steps: {known}")
        if faults or (aside.is_dir() and any(aside.iterdir())):
            raise UserError(
                f"no good checkpoint is left in {self.directory} ({'; '.join(faults) or f'see {aside}'}); "
                "to start from the beginning, delete or rename this directory"
            )
        return None

    def _plan(self, wanted: str | int) -> list[tuple[int, str | None]]:
        """The steps to try in order, each with what can be seen without reading the files' contents."""
        steps = self._steps()
        if wanted == "best":
            if self._best_metric is None:
                raise UserError("the best checkpoint is asked for, but checkpoint.best_metric is not set")
            steps = self._ranked(steps)
        elif isinstance(wanted, int):
            steps = [wanted] if wanted in steps else []
        elif wanted != "latest":
            raise unknown("checkpoint", wanted, ("latest", "best", "a step number"))
        plan = []
        for step in steps:
            try:
                plan.append((step, digests.check_list(self.directory, step)))
            except digests.Incomplete:
                plan.append((step, "incomplete"))
        return plan

    def _set_aside(self, step: int, name: str) -> None:
        if self._read_only or not distributed.is_main():
            return
        target = self.directory / name / str(step)
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{step}.{number}")
        target.parent.mkdir(exist_ok=True)
        os.replace(self.directory / str(step), target)
        with contextlib.suppress(FileNotFoundError):
            os.replace(digests.folder(self.directory, step), target / "digests")

    def _steps(self) -> list[int]:
        """All steps on disk, newest first."""
        if not self.directory.is_dir():
            return []
        return sorted((int(path.name) for path in self.directory.iterdir() if path.name.isdigit()), reverse=True)

    def _committed(self) -> list[int]:
        return [step for step in self._steps() if digests.committed(self.directory, step)]

    def _ranked(self, steps: list[int]) -> list[int]:
        """The steps that have a finite best_metric, best first, of equal ones the newer first."""
        if self._best_metric is None:
            return []
        sign = 1 if self._best_mode == "min" else -1
        ranked = []
        for step in steps:
            try:
                metrics = json.loads((self.directory / str(step) / "metrics" / "metadata").read_bytes())
                value = float(metrics.get(self._best_metric, math.nan))
            except (OSError, ValueError, AttributeError):
                value = math.nan  # verification says what is wrong with the step
            if math.isfinite(value):
                ranked.append((sign * value, -step))
        return [-step for _, step in sorted(ranked)]

    def _check_fit(self, path: Path, abstract, partial: bool) -> None:
        """Compares the arrays on disk with those asked for; raises UserError with the first differences."""
        with self._storage(f"{path.name} could not be read"):
            handler = ocp.PyTreeCheckpointHandler()
            saved = _leaves(handler.metadata(path / "state").tree)
            handler.close()
        wanted = _leaves(abstract)
        differences = []
        # Parameters first: the optimizer's state differs wherever they do.
        for name in sorted(
            wanted if partial else wanted | saved, key=lambda name: (not name.startswith("params"), name)
        ):
            if name not in saved:
                differences.append(f"{name}: {_show(wanted[name])} in the model, not in the checkpoint")
            elif name not in wanted:
                differences.append(f"{name}: {_show(saved[name])} in the checkpoint, not in the model")
            elif saved[name][0] != wanted[name][0] or (saved[name][1] != wanted[name][1] and not partial):
                differences.append(
                    f"{name}: {_show(saved[name])} in the checkpoint, {_show(wanted[name])} in the model"
                )
        if differences:
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise UserError(f"the checkpoint {path} does not fit the model: {'; '.join(differences[:3])}{more}")

    @contextlib.contextmanager
    def _storage(self, what: str):
        """Turns the errors of a file system into one line; lets all others pass."""
        _ignore_closed_loops()  # before the first write: their threads are quicker than the error
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, OSError) or _STORAGE.search(str(error)):
                found = _STORAGE.search(str(error))
                reason = getattr(error, "strerror", None) or (found[0] if found else str(error))
                raise UserError(f"the checkpoint {what} (in {self.directory}): {reason}") from error
            raise


def _ignore_closed_loops() -> None:
    """After a failed write the others beside it end on an event loop that orbax has closed, each with a traceback."""
    previous = sys.unraisablehook
    if getattr(previous, "ignores_closed_loops", False):
        return

    def hook(info):
        if not (isinstance(info.exc_value, RuntimeError) and "Event loop is closed" in str(info.exc_value)):
            previous(info)

    hook.ignores_closed_loops = True
    sys.unraisablehook = hook


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path → (shape, dtype) of every array; a typed random key counts as the integers it holds."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = (tuple(leaf.shape), str(leaf.dtype))
    return leaves


def _show(array: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = array
    return f"{dtype}[{','.join(map(str, shape))}]"
