"""Several processes, one program: start them, agree on values, and end together.

`jax.distributed` joins the processes. A dead peer would then show as an error deep inside a collective, as
a hang of a minute and a half, or as an abort with pages of C++ log. So every process also keeps one small
connection to a coordinator (vfm/coordinator.py), which sees at once when one ends; the others then say so
in one line and end too. A process that hangs without dying is found by the heartbeat of `jax.distributed`.
"""

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
from jax._src import cloud_tpu_init
from jax._src import distributed as jax_distributed
from jax._src.lib import utils as jaxlib_utils
from jax.experimental import multihost_utils

from vfm import coordinator as coordinator_process
from vfm.errors import UserError

log = logging.getLogger(__name__)

_JOIN_SECONDS = 60  # to find the coordinator once `jax.distributed` has found it
_LEAVE_SECONDS = 5  # for the others to end too
_ERROR_SECONDS = 1  # an exception waits this long to learn whether a lost peer is its cause
_CPP_ERROR = 2  # log level of the C++ side


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 10,
) -> bool:
    """Joins this process to the others, if there are others; call it before anything touches a device.

    The processes are taken from the arguments, else from the environment, else this is the only process:

    * any launcher: `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`;
    * SLURM (srun): `SLURM_JOB_ID`, `SLURM_STEP_NODELIST`, `SLURM_NTASKS` > 1, `SLURM_PROCID`,
      `SLURM_LOCALID`;
    * GKE with TPU: `TPU_WORKER_HOSTNAMES` or `TPU_PROCESS_ADDRESSES` with several entries, `TPU_WORKER_ID`,
      and for several slices `MEGASCALE_COORDINATOR_ADDRESS`, `MEGASCALE_NUM_SLICES`, `MEGASCALE_SLICE_ID`;
    * GKE with GPU (an indexed Job or JobSet): `KUBERNETES_SERVICE_HOST`, `JOB_COMPLETION_INDEX`, and the
      package `kubernetes`;
    * a Cloud TPU VM: asked of its metadata server, unless `TPU_SKIP_MDS_QUERY` is set.

    coordinator: host:port on the machine of process 0. heartbeat_seconds: a process that is silent this
    long counts as dead. Returns whether processes were joined. Raises UserError for arguments that do not
    fit together.
    """
    given = (coordinator, num_processes, process_id)
    where = "coordinator, num_processes, process_id"
    if given == (None, None, None) and "JAX_NUM_PROCESSES" in os.environ:
        where = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
        given = _from_environment()
    if given != (None, None, None):
        if None in given:
            raise UserError(f"{where} must be given together, got {given}")
        coordinator, num_processes, process_id = given
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(f"process_id must be in 0…{num_processes - 1} (num_processes - 1), got {process_id}")
        if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"the coordinator must be host:port, got {coordinator!r}")
        if num_processes == 1:
            return False
        arguments = dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    elif cluster := detect():
        log.info("joining the processes of %s", cluster)
        where, arguments = cluster, {}
    else:
        return False
    try:
        with _coordinator_apart():
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds, **arguments)
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"the processes of {where} could not be joined: {error}") from error
    if jax_distributed.global_state.num_processes > 1:
        _watch()
    return True


def detect() -> str | None:
    """The name of the cluster environment with several processes that this process runs in, or None."""
    env = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm) and int(env["SLURM_NTASKS"]) > 1:
        return "SLURM"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes"):
            return "Kubernetes"
        log.warning("an indexed Kubernetes job without the package `kubernetes`: this process runs alone")
    if env.get("JAX_PLATFORMS", "") == "cpu" or not cloud_tpu_init.running_in_cloud_tpu_vm:
        return None
    workers = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in workers or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "GKE with TPU"
    if not workers and "TPU_SKIP_MDS_QUERY" not in env:
        return "Cloud TPU"
    return None


def _from_environment() -> tuple[str | None, int | None, int | None]:
    def number(name):
        value = os.environ.get(name)
        if value is not None and not value.isdigit():
            raise UserError(f"the environment variable {name} must be a number, got {value!r}")
        return None if value is None else int(value)

    return os.environ.get("JAX_COORDINATOR_ADDRESS"), number("JAX_NUM_PROCESSES"), number("JAX_PROCESS_ID")


def is_main() -> bool:
    """Whether this is process 0, the one that writes logs, results and reports."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until every process has reached the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value) -> list:
    """Every process's JSON value, by process; all must call it. `gather(v)[0]` is a broadcast."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    # Round up to a power of two: few different shapes are compiled.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(rows[i, :size].tobytes()) for i, size in enumerate(sizes)]


def close(status: int = 0) -> None:
    """Leaves the other processes; in a single process it does nothing.

    With status 0 it takes leave and waits for all others to do so (also done at a normal end of the
    interpreter). With any other status it does not return: the process ends with it at once, and the others
    stop.
    """
    global _watcher
    if status and _watcher is not None:
        _watcher.link.write("failing")
        _exit(status)
    elif jax.distributed.is_initialized():
        if _watcher is not None:
            _watcher.leave()
        jax.distributed.shutdown()
        _watcher = None


# ---------------------------------------------------------------------------------------------- liveness

_watcher = None


@contextlib.contextmanager
def _coordinator_apart():
    """Within it, the coordination service gets a process of its own; jax has no option for that."""
    module = jax_distributed._jax
    original = module.get_distributed_runtime_service
    module.get_distributed_runtime_service = _Coordinator
    try:
        yield
    finally:
        module.get_distributed_runtime_service = original


class _Coordinator:
    """Stands for the coordination service in process 0: starts the coordinator, waits for its end."""

    def __init__(self, address: str, count: int, **options):
        # By file and without its folder on the path: no module here may hide a standard one.
        command = [sys.executable, "-P", coordinator_process.__file__, json.dumps([address, count, options])]
        quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}  # what goes wrong, every process tells itself
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=quiet,
            start_new_session=True,
        )
        state, _, self.access = self.process.stdout.readline().strip().partition(" ")
        if state != "ready":
            raise OSError(self.access or "the coordinator did not start")

    def shutdown(self) -> None:
        if _watcher is not None:
            with contextlib.suppress(OSError):
                _watcher.link.sock.shutdown(socket.SHUT_RDWR)  # close alone does not end a read in progress
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_LEAVE_SECONDS)


class _Watcher(threading.Thread):
    """Ends this process, with one line, when the coordinator tells that another one ended."""

    def __init__(self, link: coordinator_process.Link, host: str, num_processes: int):
        super().__init__(name="peers", daemon=True)
        self.link, self.host, self.num_processes = link, host, num_processes
        self.lost = False  # a peer is lost, and this process ends within moments
        self.left = False

    def leave(self) -> None:
        self.left = True
        self.link.write("bye")

    def run(self) -> None:
        while self.link.read():
            for line in self.link.said:
                word, _, name = line.partition(" ")
                self.lost = True
                if word == "stopped":
                    process, _, host = name.partition(" ")
                    self.stop(f"process {process} of {self.num_processes} ({host})")
            self.link.said.clear()
        if not self.left:
            self.stop(f"the coordinator ({self.host})")

    def stop(self, who: str) -> None:
        self.lost = True
        clear = "\r\033[K" if os.isatty(2) else ""
        line = (
            f"{clear}error: {who} stopped; this process stops too; "
            "start the same command again to resume from the last checkpoint\n"
        )
        os.write(2, line.encode())
        os._exit(1)  # nothing else can end a process whose main thread waits in a collective


def _exit(status: int) -> None:
    # The interpreter's own end would wait for the dead in the shutdown barrier of jax.distributed.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _watch() -> None:
    """Connects this process to the coordinator and starts the watcher."""
    global _watcher
    state = jax_distributed.global_state
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    if state.service is not None:
        state.client.key_value_set("vfm/coordinator", f"{state.service.access} {socket.gethostname()}")
    access = state.client.blocking_key_value_get("vfm/coordinator", _JOIN_SECONDS * 1000)
    port, token, name = access.split(" ", 2)
    try:
        sock = socket.create_connection((host, int(port)), timeout=_JOIN_SECONDS)
    except OSError as error:
        raise UserError(f"process {state.process_id} cannot reach {host}:{port}: {error}") from error
    sock.settimeout(None)
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "0":  # 0: all logs are wanted
        # When a peer dies, the C++ side warns of its closed sockets in many lines, before or among ours.
        jaxlib_utils.absl_set_min_log_level(_CPP_ERROR)
    _watcher = watcher = _Watcher(coordinator_process.Link(sock), name, state.num_processes)
    watcher.link.write(f"{token} {state.process_id} {socket.gethostname()}")
    watcher.start()
    atexit.register(close)  # runs before the exit handler of jax, which waits for all processes
    previous = sys.excepthook

    def excepthook(kind, value, trace):
        time.sleep(_ERROR_SECONDS)
        while watcher.lost:  # a failed collective: the watcher tells the cause and ends the process
            time.sleep(_ERROR_SECONDS)
        watcher.link.write("failing")
        previous(kind, value, trace)
        _exit(1)

    sys.excepthook = excepthook
