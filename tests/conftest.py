"""Eight fake CPU devices and strict rank promotion for every test."""

import os

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
