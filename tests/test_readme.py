"""The README's own examples of new modalities run as they stand there."""

import importlib.util
import json
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import pytest

from experiments.main import cli
from tests import tiny
from vfm.run import run

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks(language) -> list[str]:
    """The code of a language in the section "Bring your own modality"."""
    section = README.read_text().split("## Bring your own modality")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def test_a_modality_that_is_not_in_the_library_is_one_file(tmp_path, monkeypatch):
    """The file and the command of the README, in a folder of the user."""
    (command,) = blocks("bash")
    python, dash, module, *flags = shlex.split(command)
    assert (python, dash, module) == ("python", "-m", "experiments.main")
    code = blocks("python")[0]
    assert len(code.splitlines()) < 100
    (tmp_path / "my_points.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # where `python -m` looks first
    with tiny.quick_compilation():
        assert cli(flags) == 0
    sys.modules.pop("my_points")
    results = json.loads((tmp_path / "runs" / "points" / "results.json").read_text())
    assert results["points_to_text_accuracy"] > 0.9  # 1 / 3 by chance


@pytest.fixture
def my_digits(tmp_path):
    """The config of the section for vectors, and its data, in a folder."""
    code = blocks("python")[1]
    folder = tmp_path / "my_data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    means = rng.normal(size=(10, 16))
    for split, size in (("train", 200), ("validation", 40), ("test", 40)):
        label = np.arange(size) % 10
        vector = means[label] + 0.1 * rng.normal(size=(size, 16))
        np.savez(folder / f"{split}.npz", vector=vector.astype(np.float32), label=label)
    path = tmp_path / "my_digits.py"
    path.write_text(code.replace('"my_data"', repr(str(folder))))
    spec = importlib.util.spec_from_file_location("my_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_modality_of_vectors_is_added_by_a_config(my_digits, tmp_path):
    config = my_digits.get_config("smoke")
    config.lock()
    with tiny.quick_compilation():
        results = run(config, str(tmp_path / "run"), jax.devices()[:1])
    assert {"vector_to_text_accuracy", "vector_to_image_accuracy", "image_to_text_accuracy"} <= results.keys()
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written == results
