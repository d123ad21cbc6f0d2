"""Blocks and sources of a user's own module: found by a dotted name, and refused in one line when they do not fit."""

import sys

import pytest

from vfm import blocks
from vfm.data.sources import build_source
from vfm.encoders import ENCODERS
from vfm.errors import UserError

MODULE = """
import flax.linen as nn
import numpy as np


class Good(nn.Module):
    size: int
    width: int = 8
    num_tokens = 1

    @property
    def item_shape(self):
        return (self.size,)

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.width, name="projection")(x)[:, None], {}


class NoShape(nn.Module):
    width: int = 8
    num_tokens = 1


class NoTokens(nn.Module):
    width: int = 8
    item_shape = (3,)


class NoWidth(nn.Module):
    item_shape = (3,)
    num_tokens = 1


class Nothing(nn.Module):
    pass


class NoTrain(Good):
    def __call__(self, x):
        return x, {}


class Plain:
    item_shape, num_tokens, width = (3,), 1, 8


class Source:
    labels = np.zeros(3, np.int32)

    def __init__(self, count, split):
        self.count, self.split = count, split


class NoSplit:
    def __init__(self, count):
        self.count = count
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    (tmp_path / "own_blocks.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "own_failing.py").write_text("x = 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_blocks", "own_broken", "own_failing"):
        sys.modules.pop(name, None)


def encoder(name, **fields):
    return blocks.build_block(ENCODERS, {"name": name, **fields}, "model.encoders.x")


def test_a_class_of_another_module_is_built_with_its_fields():
    block = encoder("own_blocks.Good", size=5, width=16)
    assert (type(block).__module__, block.item_shape, block.width) == ("own_blocks", (5,), 16)
    assert encoder("vfm.encoders.vit.ViT") == encoder("vit")
    source = build_source({"name": "own_blocks.Source", "count": 2}, "test")
    assert (source.count, source.split) == (2, "test")


@pytest.mark.parametrize(
    "name, fields, message",
    (
        ("own_blocks.NoShape", {}, "NoShape declares no item_shape; .* item_shape, num_tokens, width"),
        ("own_blocks.NoTokens", {}, "NoTokens declares no num_tokens;"),
        ("own_blocks.NoWidth", {}, "NoWidth declares no width;"),
        ("own_blocks.Nothing", {}, "Nothing declares no item_shape and no num_tokens and no width;"),
        ("own_blocks.NoTrain", {"size": 3}, r"NoTrain.__call__ must take the keyword argument train"),
        ("own_blocks.Plain", {}, "Plain must be a class of flax.linen.Module"),
        ("own_blocks.Good", {}, "needs the field 'size'"),
        ("own_blocks.Good", {"size": 3, "widht": 3}, "unknown field 'widht' .*did you mean 'width'"),
        ("own_blocks.Good", {"size": -3}, r"size=-3 must be a whole number > 0"),
        ("own_blocks.Godo", {}, "unknown class 'Godo' .*module 'own_blocks'; did you mean 'Good'"),
        ("own_block.Good", {}, r"'own_block.Good' is no block .*vit.* no module 'own_block' in the folder"),
        ("own_blocks.more.Good", {}, "there is no module 'own_blocks.more'"),
        ("own_broken.Good", {}, "importing 'own_broken' failed: No module named 'a_module_that_is_not_there'"),
        ("own_failing.Good", {}, "importing 'own_failing' failed: ZeroDivisionError"),
        (".Good", {}, "'.Good': importing '' failed"),
        ("vti", {}, "unknown block 'vti' in model.encoders.x; did you mean 'vit'"),
        (3, {}, "unknown block 3"),
    ),
)  # fmt: skip
def test_what_is_no_encoder_is_refused_in_one_line(name, fields, message):
    with pytest.raises(UserError, match=message) as error:
        encoder(name, **fields)
    assert "model.encoders.x" in str(error.value)


@pytest.mark.parametrize(
    "cfg, message",
    (
        ({"name": "own_blocks.NoSplit", "count": 2}, "source 'own_blocks.NoSplit' must take the argument 'split'"),
        ({"name": "own_blocks.Source"}, "source 'own_blocks.Source' needs the field 'count'"),
        ({"name": "own_blocks.Sources", "count": 2}, "did you mean 'Source'"),
        ({"name": "own_block.Source", "count": 2}, "source: 'own_block.Source' is no source .*npz"),
        ({"name": "npzz"}, "unknown source 'npzz'; did you mean 'npz'"),
    ),
)  # fmt: skip
def test_what_is_no_source_is_refused_in_one_line(cfg, message):
    with pytest.raises(UserError, match=message):
        build_source(cfg, "test")
