"""What is set of the C library's allocator, and where nothing is."""

import os
import subprocess
import sys

import pytest

from vfm import allocator

# Page faults of buffers that a thread takes and frees again and again, as programs of XLA do; then whether the
# allocator was set. Each is too small for numpy to ask for huge pages.
PROGRAM = """
import resource, sys, threading
import numpy as np
from vfm.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
found = []
def work():
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffers = [np.ones(2**18) for _ in range(40)]
        del buffers
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(sum(found[1:]), kept)
"""


def measured(which, **environment):
    command = [sys.executable, "-c", PROGRAM, which]
    out = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout
    faults, kept = out.split()
    return int(faults), kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_freed_memory_is_taken_again_without_page_faults():
    faults, kept = measured("kept")
    if kept == "False":
        pytest.skip("another C library, or an accelerator's plug-in")
    assert faults < 100
    assert measured("system")[0] > 5 * 100


def test_an_allocator_that_the_environment_sets_is_left_alone():
    assert measured("kept", MALLOC_ARENA_MAX="2")[1] == "False"


def test_nothing_is_set_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(allocator, "_has_accelerator", lambda: True)
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_has_accelerator", lambda: False)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
