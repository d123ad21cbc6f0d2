"""One of several real processes: started by test_distributed.py.

Arguments: task, coordinator, number of processes, process id, directory.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vfm import distributed
from vfm.errors import UserError
from vfm.train.checkpoint import Checkpointer
from vfm.train.preemption import Preemption


def state_at(step: int, mesh) -> dict:
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def make():
        w = jnp.sin(jnp.arange(3072.0) + step).reshape(48, 64)  # cheap to compile
        return {
            "w": w,
            "keys": jax.random.wrap_key_data(jnp.arange(24, dtype=jnp.uint32).reshape(12, 2) + step),
        }

    state = jax.jit(make, out_shardings=sharding)()
    everywhere = NamedSharding(mesh, PartitionSpec())
    return state | {"step": jax.make_array_from_callback((), everywhere, lambda _: np.int32(step))}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a, b) -> bool:
    """Whether two global states are equal, on every process."""

    def equal(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return jnp.array_equal(x, y)

    return bool(jax.jit(lambda a, b: jnp.stack(jax.tree.leaves(jax.tree.map(equal, a, b))).all())(a, b))


def main():
    task, coordinator, count, process, directory = sys.argv[1:]
    joined = distributed.initialize(coordinator, int(count), int(process))
    assert joined == (int(count) > 1) and jax.process_count() == int(count)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), (jax.sharding.AxisType.Auto,))

    if task == "gather":
        value = {"process": jax.process_index(), "text": "é" * 100 * jax.process_index()}
        everyone = distributed.gather(value)
        assert [v["process"] for v in everyone] == list(range(int(count))), everyone
        assert len(everyone[-1]["text"]) == 100 * (int(count) - 1)
        distributed.sync("gathered")
        if distributed.is_main():
            time.sleep(1)  # the others are done long before
        print("done", flush=True)
    elif task == "save":
        with Checkpointer(directory) as checkpointer:
            for step in (1, 2, 3):
                checkpointer.save(step, state_at(step, mesh), {"position": step})
        print("done", flush=True)
    elif task == "restore":
        with Checkpointer(directory) as checkpointer:
            state, data, step = checkpointer.restore(abstract(state_at(0, mesh)))
            assert same(state, state_at(step, mesh)) and data == {"position": step}
        print("restored", step, flush=True)
    elif task in ("collective", "between", "error", "user_error", "exit"):
        total = jax.jit(lambda x: x.sum())
        w = state_at(0, mesh)["w"]
        for step in range(100_000):
            total(w).block_until_ready()
            print("step", step, flush=True)
            if task == "between":
                time.sleep(0.2)
            if step == 5 and process == "1":
                if task == "error":
                    raise RuntimeError("a bug in one process")
                if task == "exit":
                    distributed.close(3)
            if step == 5 and task == "user_error":
                time.sleep(0.5 * int(process))  # told a little later, but still told
                try:
                    raise UserError("the same mistake in every process")
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
                    distributed.close(2)
    elif task == "stop":
        with Preemption() as preemption, Checkpointer(directory) as checkpointer:
            restored = checkpointer.restore(abstract(state_at(0, mesh)))
            step = restored[2] if restored else 0
            while not preemption.requested(step):
                step += 1
                print("step", step, flush=True)
                time.sleep(0.02)
            checkpointer.save(step, state_at(step, mesh), {"position": step}, wait=True)
        print("stopped", step, flush=True)


if __name__ == "__main__":
    main()
    distributed.close()
    if sys.argv[1] == "gather" and sys.argv[4] == "1":
        time.sleep(0.5)  # the others end earlier, and that is no reason to stop
