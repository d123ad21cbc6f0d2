"""Eight fake CPU devices and strict rank promotion for every test."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # A slow machine must not abort a simulated collective (the default kills the process after a minute).
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=60",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # The tests compile more than they compute.
    "--xla_backend_optimization_level=0",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by the marks
def pytest_collection_modifyitems(config, items):
    """Marks the tests of slow.txt as slow."""
    lines = Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").splitlines()
    names = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in names:
            item.add_marker(pytest.mark.slow)
    for name in sorted(names):  # tests with parameters out of files that are not there are none
        file, _, test = name.partition("::")
        source = Path(__file__).parents[1] / file
        if not source.is_file() or f"def {test.partition('[')[0]}(" not in source.read_text(encoding="utf-8"):
            raise pytest.UsageError(f"tests/slow.txt names a test that is not there: {name}")
