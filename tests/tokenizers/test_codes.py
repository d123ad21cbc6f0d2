"""Codes of an autoencoder as tokens: the encoder's codes, the decoder's images, and those of a run's folder."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from tests import tiny
from vfm import tokenizers
from vfm.blocks import TABLES, build_block
from vfm.errors import UserError
from vfm.run import run
from vfm.tokenizers import Codes
from vfm.tokenizers.palette import SPECIAL

HALF = {"name": "latent", "image_size": (4, 4), "widths": (4, 4), "groups": 2, "mid_attention": False}
BOTTLENECKS = {
    "vq": {"name": "vq"},
    "residual_vq": {"name": "residual_vq", "levels": 3},
    "multiscale_vq": {"name": "multiscale_vq", "scales": (1, 2)},
}
LENGTHS = {"vq": 4, "residual_vq": 12, "multiscale_vq": 5}
IMAGES = np.random.default_rng(0).random((3, 4, 4, 1)).astype(np.float32)
OFFSET = len(SPECIAL)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def make(name):
    blocks = {
        "encoder": {**HALF, "bottleneck": {**BOTTLENECKS[name], "codebook_size": 8, "codebook_init": "normal"}},
        "decoder": HALF,
    }
    modules = {half: build_block(TABLES[f"{half}s"], blocks[half], half) for half in blocks}

    @jax.jit
    def init(key):
        (features, _), encoder = modules["encoder"].init_with_output(key, IMAGES, train=False)
        return {"encoder": encoder, "decoder": modules["decoder"].init(key, features, train=False)}

    return Codes(blocks, jax.tree.map(np.asarray, init(jax.random.key(0)))), modules


@pytest.mark.parametrize(
    "name", ["multiscale_vq", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vq", "residual_vq"))]
)
def test_ids_are_the_codes_and_images_those_of_the_decoder(name, tmp_path):
    tokenizer, modules = make(name)
    assert (tokenizer.length, tokenizer.vocab_size) == (LENGTHS[name], OFFSET + 8)
    ids = tokenizer.encode(IMAGES)

    @jax.jit
    def through(variables):
        features, out = modules["encoder"].apply(variables["encoder"], IMAGES, train=False)
        return out["codes"], modules["decoder"].apply(variables["decoder"], features, train=False)[0]

    codes, drawn = through(tokenizer.variables)
    np.testing.assert_array_equal(ids, np.asarray(codes).reshape(3, -1) + OFFSET)
    np.testing.assert_allclose(tokenizer.decode(ids), drawn, atol=1e-5)
    np.testing.assert_array_equal(tokenizer.encode(IMAGES[None])[0], ids)  # of any leading shape
    tokenizers.save(tmp_path, tokenizer)
    found = tokenizers.build({"name": "codes", "path": str(tmp_path), "vocab_size": OFFSET + 8})
    assert (found.modules, found.special, found.item_shape) == (tokenizer.modules, SPECIAL, (4, 4, 1))
    jax.tree.map(np.testing.assert_array_equal, found.variables, dict(tokenizer.variables))
    assert found.decode_bytes([1, OFFSET]) == tokenizer.decode_bytes([1, OFFSET])
    (tmp_path / "codes.npz").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizers.load(tmp_path)


@pytest.mark.slow
def test_the_folder_of_a_run_gives_its_codes(tmp_path):
    path = pathlib.Path(__file__).parents[2] / "configs" / "var.py"
    spec = importlib.util.spec_from_file_location("config_var", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("first")
    config.train.update(steps=3, batch_size=16, ema=0.5)
    config.optimizer.schedule.warmup_steps = 1
    config.eval.update(evaluators=(), limit=16, test_limit=16, batch_size=16)
    config.lock()
    run(config, str(tmp_path / "first"), jax.devices()[:1])
    cfg = {"name": "codes", "run": str(tmp_path / "first"), "vocab_size": OFFSET + 64}
    assert tokenizers.untrained(cfg)
    tokenizer = tokenizers.train_config(cfg, iter(()))
    image = np.random.default_rng(0).random((1, 8, 8, 1)).astype(np.float32)
    ids = tokenizer.encode(image)
    assert tokenizer.length == ids.shape[1] == 1 + 4 + 9 + 16
    assert tokenizer.decode(ids).shape == image.shape
    with pytest.raises(UserError, match=f"gives {OFFSET + 64} ids, not vocab_size=9"):
        tokenizers.train_config({**cfg, "vocab_size": 9}, iter(()))


def test_what_has_no_codes_is_refused(tmp_path):
    with pytest.raises(UserError, match="'none' has no codes"):
        Codes({"encoder": HALF, "decoder": HALF}, {})
    with pytest.raises(UserError, match="has no bottleneck"):
        Codes({"encoder": {"name": "vit"}, "decoder": HALF}, {})
    with pytest.raises(UserError, match="not the folder of a run"):
        tokenizers.train_config({"name": "codes", "run": str(tmp_path), "vocab_size": 9}, iter(()))
    with pytest.raises(UserError, match="needs `run`"):
        tokenizers.build({"name": "codes"})
