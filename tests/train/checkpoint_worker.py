"""Saves in a loop until it is killed, or until the disk is full: started by test_checkpoint.py.

Arguments: directory, largest file size in bytes (0: no limit).
"""

import resource
import sys

import jax

from vfm.errors import UserError
from vfm.train.checkpoint import Checkpointer

STEPS = 1000


def state_at(step: int) -> dict:
    """A state that is known from its step alone: 4 MB, not compressible, so a kill falls into the write."""
    return {"w": jax.random.normal(jax.random.key(step), (1024, 1024)), "key": jax.random.key(step)}


def main():
    directory, limit = sys.argv[1], int(sys.argv[2])
    with Checkpointer(directory, keep=2) as checkpointer:
        restored = checkpointer.restore(jax.eval_shape(state_at, 0))
        first = restored[2] if restored else 0
        for step in range(first + 1, STEPS):
            if step == first + 3 and limit:
                checkpointer.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # as a full disk: "File too large"
            checkpointer.save(step, state_at(step), {"position": step})
            checkpointer.poll()
            print(step, flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
