"""Every file of configs/ runs, at its smoke size, from its config to its report."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from tests import tiny
from vfm import model as model_lib
from vfm import objectives
from vfm.errors import UserError
from vfm.run import run

FILES = sorted(
    path
    for path in Path(__file__).parents[1].joinpath("configs").glob("*.py")
    if path.name not in ("common.py", "__init__.py")
)
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def load(file):
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_value(name, value):
    """What a flag can set and JSON can hold: tuples, not lists; no None, of which a flag would not know the type."""
    assert isinstance(value, bool | int | float | str | tuple | dict), f"{name}: {value!r}"
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
        check_value(name, item)


def variants(file):
    """The arguments that the config's own message lists, and none."""
    with pytest.raises(UserError) as refused:
        load(file).get_config("?")
    return ["", *str(refused.value).partition("Known: ")[2].split(", ")]


@every_file
def test_every_variant_is_a_config(file):
    module = load(file)
    assert "smoke" in variants(file)
    seen = set()
    for arg in variants(file):
        config = module.get_config(arg)
        assert config.lock().is_locked
        with pytest.raises((AttributeError, KeyError)):
            config.model.no_such_field = 1
        for name, value in values(config):
            check_value(name, value)
        seen.add(config.to_json())
        assert set(json.loads(json.dumps(config.to_dict()))) == set(config)
        config.train.steps += 1
        assert module.get_config(arg).train.steps == config.train.steps - 1  # a change is not seen in the next one
        assert not arg or f"configs/{file.name}:{arg} " in module.__doc__  # told in the file
    assert len(seen) == len(variants(file))
    assert module.get_config().to_json() == module.get_config("").to_json()


@every_file
def test_every_variant_is_a_model_with_its_objective(file):
    module = load(file)
    for arg in variants(file):
        config = module.get_config(arg)
        objectives.build(config.objective, model_lib.build(config.model))


@every_file
def test_an_unknown_variant_is_refused(file):
    with pytest.raises(UserError, match=f"unknown variant 'smokee' in configs/{file.name}.*did you mean 'smoke'"):
        load(file).get_config("smokee")


# Other tests run these smaller: train/test_stages.py, evaluate/test_retrieval.py, evaluate/test_reconstruction.py,
# objectives/test_adversarial.py,
# test_backbones_study.py.
ELSEWHERE = ("staged", "contrastive", "autoencoder", "vae", "vqgan", "backbones")
SMOKE = [pytest.param(file, marks=pytest.mark.slow) if file.stem in ELSEWHERE else file for file in FILES]


@pytest.mark.parametrize("file", SMOKE, ids=lambda file: file.stem)
def test_the_smoke_size_runs_end_to_end(file, tmp_path):
    config = load(file).get_config("smoke")
    config.lock()
    assert config.train.steps <= 10
    results = run(config, str(tmp_path), jax.devices()[:1])  # as on a laptop, and quicker to compile
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["step"] == config.train.steps and "test_loss" in results
    history = tiny.history(tmp_path)
    assert {r["split"] for r in history} == {"train", "validation"} and history[-1]["step"] == config.train.steps
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert tiny.steps_on_disk(tmp_path)[-1] == config.train.steps
