"""Stages: what is loaded from where, what stays random, what must not move; and every refusal in one line."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from vfm import run as run_lib
from vfm import tree
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.interop import huggingface
from vfm.train import stages
from vfm.train.checkpoint import Checkpointer

ALIGN = r"(?!input_projectors_image/).*"  # all but the projector
TUNE = r"(?!input_projectors_image/|backbone/).*"
ONE = {"train.steps": 2, "eval.limit": 16, "eval.test_limit": 16, "checkpoint.every": 0, "log.tensorboard": False}
ONE |= {"optimizer.schedule.warmup_steps": 0, "optimizer.learning_rate": 0.01}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def config(**changes):
    """image -> text alone: the sequence is short, and nothing is generated."""
    c = tiny.get_config()
    del c.model.output_projectors.image, c.model.decoders.image
    del c.model.encoders.audio, c.model.input_projectors.audio, c.data.sources.audio
    c.data.tasks = ("image->text",)
    c.lock()
    c.update_from_flattened_dict({**ONE, **changes})
    return c


def train(folder, **changes):
    """(results, experiment) of a run on one device."""
    e = Experiment(config(**changes), jax.devices()[:1])
    e.folder = run_lib.prepare(str(folder), e.config, write=True)
    return run_lib.train(e, e.folder), e


def parameters(e, folder):
    state = tiny.state(e, folder)
    return tree.flatten(state.params), tree.flatten(state.ema)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder of a run from which the others start, its parameters' average, and its experiment."""
    e = Experiment(config(), jax.devices()[:1])
    folder = run_lib.prepare(str(tmp_path_factory.mktemp("start")), e.config, write=True)
    state = e.init_state()
    average = jax.tree.map(lambda leaf: 1.5 * leaf, state.params)
    with Checkpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(2, state.replace(ema=average), {}, wait=True)
    return folder, tree.flatten(average), e


def blocks(before, after):
    """The blocks of the parameters that differ."""
    assert before.keys() == after.keys()
    return {path.split("/")[0] for path, leaf in after.items() if not np.array_equal(leaf, before[path])}


def freeze(folder, regex):
    return {"init.path": str(folder), "optimizer.frozen": (regex,)}


@pytest.fixture(scope="module")
def aligned(started, tmp_path_factory):
    """The folder of the first stage, from the run before, and its results and experiment."""
    folder = tmp_path_factory.mktemp("align")
    return folder, *train(folder, **freeze(started[0], ALIGN))


def test_two_stages_change_what_they_should_and_nothing_else(started, aligned, tmp_path):
    before = started[1]
    tuned = (tmp_path, *train(tmp_path, **freeze(aligned[0], TUNE)))
    projector = "input_projectors_image"
    for (folder, results, e), row, learned in ((aligned, ALIGN, {projector}), (tuned, TUNE, {projector, "backbone"})):
        for after in parameters(e, folder):  # and their average
            assert blocks(before, after) == learned
        before = after
        still = {path: leaf for path, leaf in after.items() if path.split("/")[0] not in learned}
        record = json.loads((folder / stages.RECORD).read_text())
        assert record["frozen"] == {"rows": [row], "parameters": tree.count(still), "sha256": tree.digest(still)}
        assert results["parameters_frozen"] == tree.count(still) < results["parameters"]
        assert record["random"] == [] and set(record["loaded"]) == set(after)
        assert f"{tree.count(still):,} parameters are frozen" in (folder / "report.html").read_text()


def test_a_run_whose_frozen_parameters_moved_ends_in_an_error(started, aligned, tmp_path):
    """They are compared with those of its very start, also when it was stopped and resumed."""
    folder = tmp_path / "align"
    shutil.copytree(aligned[0], folder)
    (folder / "results.json").unlink()
    record = json.loads((folder / stages.RECORD).read_text())
    record["frozen"]["sha256"] = "0" * 64
    (folder / stages.RECORD).write_text(json.dumps(record))
    with pytest.raises(RuntimeError, match="frozen parameters moved: .*had SHA-256 000000000000 at the start"):
        train(folder, **freeze(started[0], ALIGN))
    assert not (folder / "results.json").exists()


def test_one_bit_of_one_frozen_parameter_is_seen(aligned):
    folder, _, e = aligned
    state, record = tiny.state(e, folder), stages.read(folder)
    stages.verify(record, state.params, state.ema)
    for moved, frozen in (("backbone", True), ("input_projectors_image", False)):
        params = tree.flatten(state.params)
        path = next(path for path in params if path.startswith(moved) and path.endswith("kernel"))
        params[path] = params[path].at[(0,) * params[path].ndim].set(np.nextafter(params[path].ravel()[0], 9))
        with pytest.raises(RuntimeError, match="moved") if frozen else contextlib.nullcontext():
            stages.verify(record, state.ema, tree.unflatten(params))


def test_a_run_that_goes_on_with_other_rows_counts_from_there(aligned):
    folder, _, e = aligned
    state, record = tiny.state(e, folder), stages.read(folder)
    assert stages.resume(e, state, record) == record
    found = stages.resume(e, state, {**record, "frozen": {**record["frozen"], "rows": ["backbone/.*"]}})
    assert found == record  # whose digest is that of these parameters
    assert stages.resume(e, state, {})["frozen"] == record["frozen"]


def begun(**changes):
    """(random parameters, parameters after the start, record), flat."""
    e = Experiment(config(**changes), jax.devices()[:1])
    random = e.init_state()
    state, record = stages.begin(e, random)
    if jax.tree.leaves(state.ema):
        for average, leaf in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_array_equal(average, leaf)
            assert average.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()
    return tree.flatten(random.params), tree.flatten(state.params), record


def refused(**changes):
    """The same, which ends before any parameter is touched."""
    e = Experiment(config(**changes), jax.devices()[:1])
    stages.begin(e, e.abstract_state)


def test_rows_say_what_is_loaded_from_where(started):
    folder, theirs, _ = started
    rows = (
        (r"(encoders_image/.*)/query/(\w+)", r"\1/key/\2"),  # under another path
        r"encoders_image/.*",
        (r"backbone/(.*)", "", str(folder)),  # a folder of its own
    )
    random, found, record = begun(**{"init.path": str(folder), "init.match": rows, "seed": 7})
    assert blocks(random, found) == {"encoders_image", "backbone"}
    for path, leaf in found.items():
        source = path.replace("/query/", "/key/") if path.startswith("encoders_image") else path
        if path.startswith(("encoders_image", "backbone")):
            np.testing.assert_array_equal(leaf, theirs[source])
            assert record["loaded"][path] == f"{folder}, step 2: {source}"
        else:
            assert path in record["random"]
    # One array there may be two of ours: each has a buffer of its own.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in found.values()]
    assert len(set(pointers)) == len(pointers)
    (line, rest) = stages.tell(record)
    assert line.startswith(f"loaded {len(record['loaded'])} parameter arrays from {folder}, step 2: backbone, encoders")
    assert "at their random start: decoders_text, encoders_text, input_projectors_image" in rest


@pytest.fixture(scope="module")
def published(started, tmp_path_factory):
    """A folder in the library's format with the text blocks of a model, and their parameters."""
    folder, (_, average, e) = tmp_path_factory.mktemp("published"), started
    alone = type(e.model)(
        "text", {"text": e.model.encoders["text"]}, {}, e.model.backbone, {}, {"text": e.model.decoders["text"]}
    )
    params = tree.unflatten({path: leaf for path, leaf in average.items() if "_image/" not in path})
    huggingface.save(str(folder), alone, {"params": params})
    return folder, params


def test_a_folder_of_published_weights_under_one_block(published):
    """Placed under a model whose other blocks stay random."""
    folder, params = published
    rows = ((r"backbone/(.*)", r"backbone/\1"), r"(en|de)coders_text/.*")
    random, found, record = begun(**{"init.path": str(folder), "init.match": rows, "seed": 7})
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(found[path], leaf)
    assert set(record["random"]) == {path for path in found if path.split("/")[0].endswith("image")}
    assert blocks(random, found) == {"backbone", "encoders_text", "decoders_text"}


def test_without_a_path_nothing_is_loaded(tmp_path):
    random, found, record = begun()
    stages.write(tmp_path, record)
    assert not any(tmp_path.iterdir()) and stages.read(tmp_path) == {}
    assert all(found[path] is leaf for path, leaf in random.items())
    assert record == {"loaded": {}, "random": list(random)} and stages.tell(record) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init.match": (".*",)}, r"the row '\.\*' has no folder; set config.init.path"),
        ({"init.path": "x", "init.match": ("encoder/.*",)}, "config.init.match: the row 'encoder/.*' matches no param"),
        ({"init.path": "x", "init.match": (("a", "b", "c", "d"),)}, "is neither a regex, .regex, path., nor"),
        ({"init.path": "x", "init.match": ("(",)}, "is not a regular expression"),
        ({"init.path": "x", "init.match": (("backbone/.*", r"\1"),)}, "cannot be filled in for 'backbone"),
    ],
)
def test_rows_that_make_no_sense_are_refused_before_anything_is_read(changes, message):
    with pytest.raises(UserError, match=message):
        Experiment(config(**changes), jax.devices()[:1])


def test_an_unknown_field_is_refused():
    with pytest.raises(UserError, match="unknown field 'paths' in config.init; did you mean 'path'"):
        stages.wanted({"paths": "x"}, {"params": {}})


def test_what_is_not_there_is_refused(started, tmp_path):
    folder = str(started[0])
    cases = [
        ({"init.path": str(tmp_path)}, "is neither the folder of a run .checkpoints/. nor one of published weights"),
        ({"init.path": folder, "init.checkpoint": "77"}, "no good checkpoint of step 77"),
        (
            {"init.path": folder, "init.match": ((r"backbone/(.*)", r"bckbone/\1"),)},
            "does not fit the model: ema/bckbone/.* in the model, not in the checkpoint",
        ),
        (
            {"init.path": folder, "model.backbone.mlp_dim": 40},
            r"does not fit the model: ema/backbone/.*/mlp/down/.*\[2,32,16\] in the checkpoint, .*\[2,40,16\]",
        ),
        # The same number of ids, of which each stands for another byte.
        ({"init.path": folder, "tokenizer.special": tiny.SPECIAL[:-1]}, r"id 5 is b'' in .*, and b'\\x00' in config"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as error:
            refused(**changes)
        assert "\n" not in str(error.value)


def test_what_published_weights_do_not_have_is_refused(published):
    folder = str(published[0])
    with pytest.raises(UserError, match="has no parameter 'encoders_image/.*; (did you mean|it has backbone)"):
        refused(**{"init.path": folder})
    with pytest.raises(UserError, match=r"backbone/.* has shape \(2, 40, 16\), but backbone/.* has \(2, 32, 16\)"):
        refused(**{"init.path": folder, "init.match": ("backbone/.*",), "model.backbone.mlp_dim": 40})
