"""A request to stop (SIGTERM of a scheduler, Ctrl-C of a person), heard between two steps."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Turns SIGTERM and the first Ctrl-C into "save, then stop"; a second Ctrl-C interrupts at once.

    Under `jax.distributed` a signal to any one process stops all of them at the same step: the notifier of
    `jax.distributed` owns SIGTERM there, and a Python handler would replace it. Use it as a context
    manager, or call `install` (in the main thread, after `vfm.distributed.initialize`) and `uninstall`.
    """

    def __init__(self):
        self._stop = False
        self._previous = {}

    def install(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if not jax.distributed.is_initialized():
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __enter__(self) -> "Preemption":
        return self.install()

    def __exit__(self, *exc) -> None:
        self.uninstall()

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step; every process calls it once per step, steps rising."""
        if not self._stop and jax.distributed.is_initialized():
            self._stop = multihost_utils.reached_preemption_sync_point(step)
        return self._stop

    def _terminate(self, number, frame) -> None:
        self._stop = True
        self._say(signal.Signals(number).name)

    def _interrupt(self, number, frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one interrupts
        if jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)
        else:
            self._stop = True
        self._say("Ctrl-C", "; press it again to stop at once")

    @staticmethod
    def _say(cause: str, more: str = "") -> None:
        # A signal handler may interrupt a print: write past Python's buffers.
        os.write(2, f"\n{cause}: a checkpoint is saved after this step, then the run stops{more}\n".encode())
