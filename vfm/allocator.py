"""The memory allocator of the C library, under programs of XLA on a CPU."""

import ctypes
import importlib.metadata
import importlib.util
import os

# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees. -> whether it does from now on.

    A step of a program of XLA takes its buffers anew and frees them. glibc gives large ones back to the system at once,
    which has to fill them with zeros, page by page, when the next step takes them: a tenth to a third of a training
    step (`benchmarks.train_step --allocator=system`). What the process holds stays at its peak, which can be higher,
    for buffers leave gaps: 1.86 GB in place of 1.33 GB in a run of `configs/lm.py` without remat.

    Only for Linux with glibc, without a plug-in of JAX for an accelerator, where buffers are the device's; and not if
    the environment sets the allocator (`MALLOC_…`). To be called before JAX is imported.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or _has_accelerator():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another system or C library
        return False
    wanted = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST))
    return all(mallopt(option, value) == 1 for option, value in wanted)


def _has_accelerator() -> bool:
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None
