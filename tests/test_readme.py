"""The README's own example of a new modality runs as it stands there."""

import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from tests import tiny
from vfm.run import run

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.fixture
def my_digits(tmp_path):
    """The config of the section "Add your own modality", and its data, in a folder."""
    section = README.read_text().split("## Add your own modality")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
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


def test_a_modality_of_vectors_is_added_by_a_config(my_digits, tmp_path):
    config = my_digits.get_config("smoke")
    config.lock()
    with tiny.quick_compilation():
        results = run(config, str(tmp_path / "run"), jax.devices()[:1])
    assert {"vector_to_text_accuracy", "vector_to_image_accuracy", "image_to_text_accuracy"} <= results.keys()
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written == results
