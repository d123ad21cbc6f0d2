"""Checkpoints: exact, on any mesh, kept by age and quality, and never silently wrong."""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vfm.errors import UserError
from vfm.train.checkpoint import Checkpointer
from vfm.train.preemption import Preemption

WORKER = Path(__file__).with_name("checkpoint_worker.py")


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: object
    key: jax.Array
    ema: object = None


def mesh_of(devices: int):
    return jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])


def make_state(devices: int = 8, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "block/0": {"kernel": rng.normal(size=(16, 8)).astype(np.float32)},
        "bias": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "empty": {},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(jnp.int32(seed), params, optimizer.init(params), jax.random.split(jax.random.key(seed), 8))
    mesh = mesh_of(devices)

    def place(leaf):
        sharded = leaf.ndim and leaf.shape[0] % 8 == 0
        spec = PartitionSpec("data") if sharded else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def host(state):
    def copy(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(copy, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def write(directory, steps, **options):
    with Checkpointer(directory, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(seed=step), {"position": step})


def steps_on_disk(directory):
    return sorted(int(path.name) for path in Path(directory).iterdir() if path.name.isdigit())


def files_of(step_directory):
    return sorted(path for path in Path(step_directory).rglob("*") if path.is_file())


def test_round_trip_is_exact_and_restored_arrays_can_be_donated(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(state)) is None
        checkpointer.save(3, state, {"position": [1, 2]}, {"loss": 0.5}, wait=True)
        restored, data, step = checkpointer.restore(abstract(state))
        assert (data, step) == ({"position": [1, 2]}, 3)
        assert_same(restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)
        assert jax.random.uniform(restored.key[3]) == jax.random.uniform(state.key[3])
        before = host(restored.params)
        add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
        after = add(restored.params)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x + 1, y), before, host(after))


def test_a_save_is_not_disturbed_by_steps_that_donate_the_state(tmp_path):
    tree = {"w": jnp.zeros((512, 1024))}
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree, {})
        for _ in range(20):
            tree = add(tree)
        restored, _, _ = checkpointer.restore(tree)
    np.testing.assert_array_equal(restored["w"], 0)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_restore_onto_fewer_devices(tmp_path, devices):
    write(tmp_path, [1])
    target = abstract(make_state(devices))
    with Checkpointer(tmp_path) as checkpointer:
        restored, _, _ = checkpointer.restore(target)
    assert len(restored.params["block/0"]["kernel"].sharding.device_set) == devices
    assert_same(restored, make_state(devices, seed=1))


def test_partial_restore_reads_one_branch(tmp_path):
    losses = {1: 0.3, 2: 0.1, 3: 0.2}
    with Checkpointer(tmp_path, best_metric="loss") as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(seed=step), {}, {"loss": loss})
    wanted = {"params": abstract(make_state(2)).params}
    with Checkpointer(tmp_path, best_metric="loss", read_only=True) as checkpointer:
        for which, step in (("latest", 3), ("best", 2), (1, 1)):
            tree, found = checkpointer.restore_partial(wanted, which)
            assert found == step
            assert_same(tree["params"], make_state(2, seed=step).params)
        with pytest.raises(UserError, match="step 7 is not there; steps: 1, 2, 3"):
            checkpointer.restore_partial(wanted, 7)


def test_keep_newest_and_best(tmp_path):
    losses = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3, 5: float("nan"), 6: 0.2}
    with Checkpointer(tmp_path, keep=2, keep_best=1, best_metric="loss") as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(seed=step), {}, {"loss": loss})
        checkpointer.wait()
        assert steps_on_disk(tmp_path) == steps_on_disk(tmp_path / "digests") == [2, 5, 6]
        assert (checkpointer.best_step(), checkpointer.latest_step()) == (2, 6)
        assert not checkpointer.save(6, make_state(), {})  # nothing new
    with Checkpointer(tmp_path, keep=1, keep_best=2, best_metric="loss", best_mode="max") as checkpointer:
        assert checkpointer.best_step() == 6
        checkpointer.save(7, make_state(), {})
        checkpointer.wait()
        assert steps_on_disk(tmp_path) == [2, 6, 7]


def test_a_flipped_byte_in_any_file_is_found(tmp_path, caplog):
    write(tmp_path / "good", [1, 2])
    files = [path.relative_to(tmp_path / "good" / "2") for path in files_of(tmp_path / "good" / "2")]
    assert sum("ocdbt.process_0/d" in str(file) for file in files) >= 2  # the arrays' bytes
    rng = random.Random(0)
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", directory)
        content = bytearray((directory / "2" / file).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (directory / "2" / file).write_bytes(content)
        caplog.clear()
        with Checkpointer(directory) as checkpointer:
            restored, data, step = checkpointer.restore(abstract(make_state()))
        assert (step, data) == (1, {"position": 1}), file
        assert_same(restored, make_state(seed=1))
        assert [r.getMessage() for r in caplog.records if f"file {file} differs" in r.getMessage()], file
        assert files_of(directory / "corrupt" / "2")  # set aside, not deleted
        shutil.rmtree(directory)


def _truncate(step):
    path = max(files_of(step), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, message",
    [
        (_truncate, "bytes, not"),
        (lambda step: (step / "state" / "manifest.ocdbt").unlink(), "file state/manifest.ocdbt is missing"),
        (lambda step: (step / "extra").write_text(""), "file extra has no digest"),
        (lambda step: shutil.rmtree(step.parent / "digests" / "2"), "has no digests"),
        (
            lambda step: (step.parent / "digests" / "2" / "files.json").write_text("{"),
            "digest files are damaged",
        ),
    ],
)
def test_other_damage_is_found(tmp_path, caplog, damage, message):
    write(tmp_path, [1, 2])
    damage(tmp_path / "2")
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.restore_partial({"step": abstract(make_state()).step})[1] == 1
    assert steps_on_disk(tmp_path) == [1, 2]  # reading alone moves nothing
    caplog.clear()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(make_state()))[2] == 1
        (record,) = [record for record in caplog.records if record.name.startswith("vfm")]
        assert message in record.getMessage() and "step 2" in record.getMessage()
        checkpointer.save(2, make_state(seed=2), {}, wait=True)  # the run comes to this step again
        assert checkpointer.restore(abstract(make_state()))[2] == 2


def test_an_interrupted_commit_does_not_count(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path, [1, 2])
    (tmp_path / "digests" / "2" / "process_0-of-1.json").unlink()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert checkpointer.restore(abstract(make_state()))[2] == 1
        messages = [(r.levelname, r.getMessage()) for r in caplog.records if r.name.startswith("vfm")]
        assert len(messages) == 1 and messages[0][0] == "INFO" and "not committed" in messages[0][1]
        assert (tmp_path / "incomplete" / "2").is_dir()
        checkpointer.save(2, make_state(seed=2), {}, wait=True)
        assert not (tmp_path / "incomplete" / "2").exists()
    # Killed in its very first commit, a run starts from the beginning.
    (tmp_path / "first").mkdir()
    write(tmp_path / "first", [1])
    (tmp_path / "first" / "digests" / "1" / "files.json").unlink()
    with Checkpointer(tmp_path / "first") as checkpointer:
        assert checkpointer.restore(abstract(make_state())) is None


def test_no_good_step_is_an_error_and_not_a_fresh_start(tmp_path):
    write(tmp_path, [1, 2])
    for step in (1, 2):
        path = tmp_path / str(step) / "data" / "metadata"
        path.write_bytes(path.read_bytes().replace(b"position", b"positiom"))
    for _ in range(2):  # also when the same command is started again
        with (
            Checkpointer(tmp_path) as checkpointer,
            pytest.raises(UserError, match="no good checkpoint is left .*to start from the beginning") as error,
        ):
            checkpointer.restore(abstract(make_state()))
        assert "\n" not in str(error.value)
    assert steps_on_disk(tmp_path / "corrupt") == [1, 2]


def test_another_model_is_refused_by_name(tmp_path):
    write(tmp_path, [1])
    target = abstract(make_state())
    kernel = target.params["block/0"]["kernel"]
    other = target.replace(
        params={"block/0": {"kernel": jax.ShapeDtypeStruct((16, 9), kernel.dtype)},
                "bias": target.params["bias"],
                "scale": jax.ShapeDtypeStruct((4,), jnp.float32)}
    )  # fmt: skip
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError) as error:
        checkpointer.restore(other)
    text = str(error.value)
    assert "params/block/0/kernel: float32[16,8] in the checkpoint, float32[16,9] in the model" in text
    assert "params/scale: float32[4] in the model, not in the checkpoint" in text
    assert steps_on_disk(tmp_path) == [1]  # nothing is wrong with the step itself
    half = target.replace(step=jax.ShapeDtypeStruct((), jnp.int16))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError, match=r"step: int32\[\] .* int16\[\]"),
    ):
        checkpointer.restore(half)


def test_bad_arguments_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for directory, options, message in [
        (tmp_path / "file" / "below", {}, "cannot be used"),
        ("gs://bucket/run", {}, "shared"),
        (tmp_path, {"keep": 0}, "keep >= 1 .* got 0"),
        (tmp_path, {"best_mode": "mim"}, "did you mean 'min'"),
    ]:
        with pytest.raises(UserError, match=message):
            Checkpointer(directory, **options)
    with (
        Checkpointer(tmp_path / "new", best_metric="eval_los") as checkpointer,
        pytest.raises(UserError, match="unknown checkpoint.best_metric 'eval_los'; did you mean 'eval_loss'"),
    ):
        checkpointer.save(1, make_state(), {}, {"eval_loss": 1.0})
    write(tmp_path / "run", [1])
    with Checkpointer(tmp_path / "run") as checkpointer, pytest.raises(UserError, match="exists already"):
        checkpointer.save(1, make_state(), {})


def run_worker(*args, **options):
    # The same flags but for the devices: other optimisations may round otherwise.
    flags = re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), *sys.path])}
    command = [sys.executable, str(WORKER), *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_kill_in_the_middle_of_a_write(tmp_path):
    rng, last = random.Random(1), 0
    target = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32), "key": jax.eval_shape(jax.random.key, 0)}
    for _ in range(3):
        process = run_worker(tmp_path / "run", 0)
        for line in process.stdout:
            if int(line) >= last + 3:
                break
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert not errors
        # A second reader looks at a copy: the next worker must cope with the leftovers itself.
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with Checkpointer(tmp_path / "copy") as checkpointer:
            restored, data, step = checkpointer.restore(target)
        shutil.rmtree(tmp_path / "copy")
        assert step > last and data == {"position": step}
        key = jax.random.key(step)
        assert_same(restored, {"w": jax.random.normal(key, (1024, 1024)), "key": key})
        last = step
    assert not (tmp_path / "run" / "corrupt").exists()


def test_leftovers_of_a_killed_run_are_cleaned(tmp_path):
    write(tmp_path, [1])
    for name in ("2.orbax-checkpoint-tmp", "trash.0", "digests/2"):
        (tmp_path / name / "state").mkdir(parents=True)
    with Checkpointer(tmp_path, read_only=True):
        assert (tmp_path / "2.orbax-checkpoint-tmp").exists()  # a writer may be at work
    with Checkpointer(tmp_path):
        assert sorted(os.listdir(tmp_path)) == ["1", "digests"] and os.listdir(tmp_path / "digests") == ["1"]


def test_full_disk_is_one_line_and_keeps_the_last_step(tmp_path):
    process = run_worker(tmp_path, 10_000)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("\n") == 1 and errors.startswith("error: the checkpoint of step 3 could not be written")
    assert "File too large" in errors and str(tmp_path) in errors
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 2


def test_a_failed_write_is_raised_by_poll(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {}, wait=True)
        monkeypatch.setattr("vfm.train.digests.write_share", full)
        checkpointer.save(2, make_state(), {})
        with pytest.raises(UserError, match="step 2 could not be written .*: No space left on device"):
            for _ in range(1000):
                checkpointer.poll()
                time.sleep(0.01)
        monkeypatch.undo()
        assert checkpointer.restore(abstract(make_state()))[2] == 1


def test_old_steps_stay_until_the_new_one_is_committed(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, make_state(seed=1), {}, wait=True)
        monkeypatch.setattr("vfm.train.digests.write_share", lambda *args: 1 / 0)
        checkpointer.save(2, make_state(seed=2), {})
        with pytest.raises(ZeroDivisionError):  # a bug is not dressed up as bad input
            checkpointer.wait()
        assert steps_on_disk(tmp_path) == [1, 2]
        assert checkpointer.restore(abstract(make_state()))[2] == 1


def test_metrics_and_data_are_plain_json(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {"a": [1, {"b": None}]}, {"loss": np.float32(0.5)}, wait=True)
        assert checkpointer.restore(abstract(make_state()))[1] == {"a": [1, {"b": None}]}
    assert json.loads((tmp_path / "1" / "metrics" / "metadata").read_text()) == {"loss": 0.5}


def test_preemption_in_one_process(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with Preemption() as preemption:
            assert not preemption.requested(1)
            signal.raise_signal(number)
            assert preemption.requested(2) and preemption.requested(3)
            if number == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        assert capfd.readouterr().err.count("a checkpoint is saved") == 1
