"""Control branch of a generative decoder (ControlNet): what it reads, what it leaves alone, and what it is good for."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import diffusion as config_file
from tests import tiny
from vfm import model as model_lib
from vfm import run as run_lib
from vfm import tree
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.train import stages

NETWORK = {"name": "dit", "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "frequencies": 16}
DECODER = {"name": "diffusion", "item_shape": (8, 8, 1), "network": {**NETWORK, "patch_size": 4},
           "process": {"name": "gaussian", "timesteps": 100, "prediction": "v"}}  # fmt: skip
CONTROL = {"network": {**DECODER["network"], "control_depth": 2}, "control": {"from": "mask"}}
BASE = {"centre": "image", "dtype": "float32", "backbone": None, "decoders": {"image": DECODER}}
KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def controlled(**fields):
    return {**BASE, "decoders": {"image": {**DECODER, **CONTROL, **fields}}}


def examples(count, seed=0):
    """Images with one bright quarter, and masks that say which."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((count, 8, 8, 1), np.float32)
    for row, quarter in zip(mask, rng.integers(0, 4, count)):
        row[4 * (quarter // 2) :, 4 * (quarter % 2) :][:4, :4] = 1
    return 0.8 * mask + 0.2 * rng.random(mask.shape, np.float32), mask


@functools.partial(jax.jit, static_argnums=0)
def draw(model, variables, inputs):
    _, out = model.apply(variables, inputs=inputs, train=False)
    return model.apply(variables, "image", out, rng=KEY, batch_size=16, steps=10, method="sample")


def test_the_control_reaches_the_decoder_and_changes_nothing_at_first():
    model, base = model_lib.build(controlled()), model_lib.build(BASE)
    layout = model_lib.layout(model, 1)
    assert layout.modality("mask").item_shape == (8, 8, 1) and set(model_lib.layout(base, 1).modalities) == {"image"}
    params = jax.jit(lambda key: model_lib.init(model, key, 1)["params"])(KEY)
    # Other values than the first, which are zero; the branch's last layers excepted.
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), params)
    denoiser = moved["decoders_image"]["denoiser"]
    denoiser["control_out"] = params["decoders_image"]["denoiser"]["control_out"]
    image, mask = (jnp.asarray(array[:, None]) for array in examples(16))
    plain = draw(base, {"params": {"decoders_image": {"denoiser": {
        name: leaf for name, leaf in denoiser.items() if not name.startswith("control")}}}}, {})  # fmt: skip
    np.testing.assert_array_equal(draw(model, {"params": moved}, {"mask": mask}), plain)
    denoiser["control_out"] = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), denoiser["control_out"]
    )
    drawn = draw(model, {"params": moved}, {"mask": mask})
    assert np.abs(drawn - plain).max() > 1e-3
    assert np.abs(drawn - draw(model, {"params": moved}, {"mask": 1 - mask})).max() > 1e-4
    with pytest.raises(UserError, match=r"\[8, 1\] items of mask, which control the \[16, 1\] items of image"):
        model.apply({"params": moved}, inputs={"image": image, "mask": mask[:8]}, train=False)


@pytest.mark.parametrize(
    "fields, words",
    [({"control": {"channels": 1}}, "decoders.image.control needs the field 'from'"),
     ({"network": DECODER["network"]}, "a control needs control_depth from 1 to depth=2, not None")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        model = model_lib.build(controlled(**fields))
        jax.eval_shape(lambda: model_lib.init(model, KEY, 1))


def experiment(folder, model, files, **changes):
    c = config_file.get_config("smoke")
    c.model = model
    c.data.source = {"name": "npz", "paths": files, "arrays": {"image": "image", "mask": "mask"}}
    c.data.classes = 0
    c.lock()
    c.update_from_flattened_dict({"train.steps": 300, "train.ema": 0.0, "optimizer.learning_rate": 3e-3,
                                  "train.batch_size": 32, "log.every": 100, "log.tensorboard": False,
                                  "eval.evaluators": (), **changes})  # fmt: skip
    e = Experiment(c, jax.devices()[:1])
    e.folder = run_lib.prepare(str(folder), e.config, write=True)
    return e


def test_the_config_starts_from_the_first_and_trains_the_branch_alone():
    """Every parameter but those of the branch's own layers has one of the same shape there, and is frozen or copied."""
    c = config_file.get_config("control")
    c.init.path = "anywhere"
    base, branch = (Experiment(of, jax.devices()[:1]) for of in (config_file.get_config(), c))
    theirs, ours = (
        {path: leaf.shape for path, leaf in tree.flatten(e.abstract_state.params).items()} for e in (base, branch)
    )
    (copies, to), frozen = c.init.match
    own = set()
    for path, shape in ours.items():
        if re.fullmatch(copies, path):
            assert theirs[re.sub(copies, to, path)] == shape and not re.fullmatch(frozen, path)
        elif re.fullmatch(frozen, path):
            assert theirs[path] == shape
        else:
            own.add(path.split("/")[2])
    assert own == {"control_patch", "control_projection", "control_out"} and c.optimizer.frozen == (frozen,)
    assert {path for path in theirs if not re.fullmatch(frozen, path)} == set()


@pytest.mark.slow
def test_adherence_rises_and_the_base_stays(tmp_path):
    files = {}
    for split in ("train", "validation", "test"):
        image, mask = examples(512 if split == "train" else 32, len(split))
        files[split] = str(tmp_path / f"{split}.npz")
        np.savez(files[split], image=image, mask=mask, label=np.zeros(len(image), np.int32))
    base = experiment(tmp_path / "base", BASE, files)
    run_lib.train(base, base.folder)
    rows = (
        (r"(decoders_image/denoiser/)control/(layers/.*)", r"\1transformer/\2"),
        r"decoders_image/denoiser/(?!control).*",
    )
    start = {"init.path": str(base.folder), "init.match": rows, "optimizer.frozen": rows[1:]}
    branch = experiment(tmp_path / "branch", controlled(), files, **start)
    begin, record = stages.begin(branch, branch.init_state())
    run_lib.train(branch, branch.folder)
    ends = [tiny.state(e, e.folder).params for e in (base, branch)]
    theirs, untrained, trained = ends[0], begin.params, ends[1]
    # The run compares the hash of what is frozen with that at its end.
    assert json.loads((branch.folder / "parameters.json").read_text())["frozen"] == record["frozen"]
    for name, leaf in theirs["decoders_image"]["denoiser"].items():
        jax.tree.map(np.testing.assert_array_equal, trained["decoders_image"]["denoiser"][name], leaf)
    _, mask = examples(16, 7)
    inputs = {"mask": jnp.asarray(mask[:, None])}
    plain, first, last = (
        draw(e.model, {"params": params}, given)
        for e, params, given in ((base, theirs, {}), (branch, untrained, inputs), (branch, trained, inputs))
    )
    np.testing.assert_array_equal(first, plain)
    inside = lambda drawn: float((drawn[:, 0] * mask).sum() / mask.sum())
    assert inside(last) > inside(plain) + 0.2
