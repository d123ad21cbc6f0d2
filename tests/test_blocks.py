"""The contract of a block, tested on every block of the five tables: a new one is tested by being listed."""

import dataclasses
import functools
import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import sharding, tree
from vfm.backbones import BACKBONES
from vfm.decoders import DECODERS
from vfm.encoders import ENCODERS, TextEncoder
from vfm.input_projectors import INPUT_PROJECTORS
from vfm.output_projectors import OUTPUT_PROJECTORS

TABLES = {
    "encoders": ENCODERS,
    "input_projectors": INPUT_PROJECTORS,
    "backbones": BACKBONES,
    "output_projectors": OUTPUT_PROJECTORS,
    "decoders": DECODERS,
}
# What the docstring of each package says that a block declares.
DECLARED = {
    "encoders": ("item_shape", "num_tokens", "width"),
    "input_projectors": ("width", "in_width", "num_tokens"),
    "backbones": ("width",),
    "output_projectors": ("width", "in_width", "num_tokens"),
    "decoders": ("in_width", "num_tokens", "item_shape"),
}
BLOCKS = [(kind, name) for kind, table in TABLES.items() for name in table]
every_block = pytest.mark.parametrize("kind, name", BLOCKS, ids=lambda value: value)
# These may be tied to another block's table: tested a second time, with it.
TIED = [(kind, name) for kind, name in BLOCKS if "tied" in TABLES[kind][name].__dataclass_fields__]
every_variant = pytest.mark.parametrize(
    "kind, name, tied",
    [(*block, False) for block in BLOCKS] + [(*block, True) for block in TIED],
    ids=lambda value: {True: "tied", False: ""}.get(value, value),
)

B, T, W = 4, 6, 32
NOISE = {"noise": jax.random.key(7)}  # of generative decoders


class Tied(nn.Module):
    """A decoder and the text encoder whose table it uses."""

    encoder: nn.Module
    decoder: nn.Module

    def __call__(self, x, *, train: bool):
        self.encoder(jnp.zeros((1, 1), jnp.int32), train=train)  # makes the table
        return self.decoder(x, attend=self.encoder.attend, train=train)


class Losses(nn.Module):
    """A generative decoder and items: its loss float[B, 1], in the dtype of the decoder."""

    decoder: nn.Module

    def __call__(self, condition, *, train: bool):
        items = jax.random.uniform(jax.random.key(8), (len(condition), *self.decoder.item_shape))
        _, out = self.decoder(condition, items, train=train)
        return sum(out["losses"].values())[:, None].astype(self.decoder.dtype), out


def make(kind, name, tied=False, **fields):
    if getattr(TABLES[kind][name], "generative", False):
        # Rows with and without their condition: both are trained.
        return Losses(TABLES[kind][name](**fields, condition_dropout=0.5))
    block = TABLES[kind][name](**fields, **({"tied": True} if tied else {}))
    return Tied(TextEncoder(width=W, **fields), block) if tied else block


def inputs(kind, name, rows=B, seed=0):
    """An input of the shape that the block declares."""
    rng, block = np.random.default_rng(seed), TABLES[kind][name]()
    if kind == "encoders":
        if getattr(block, "item_dtype", "") == "int32":
            count = block.num_classes if hasattr(block, "num_classes") else block.vocab_size
            return jnp.asarray(rng.integers(0, count, (rows, *block.item_shape)), jnp.int32)
        if block.item_shape == ():
            return jnp.asarray(rng.integers(0, block.vocab_size, (rows, T)), jnp.int32)
        shape = block.item_shape
    elif kind == "backbones":
        shape = (T, block.width)
    elif kind == "output_projectors":
        shape = (getattr(block, "num_signals", T), block.in_width or W)
    else:
        shape = ((block.num_tokens if kind == "decoders" else None) or T, block.in_width or W)
    return jnp.asarray(rng.normal(size=(rows, *shape)) * 0.5, jnp.float32)


def output_shape(kind, block, x):
    rows = (x.shape[0],)
    if kind == "encoders":
        return (*rows, block.num_tokens if hasattr(block, "item_dtype") or block.item_shape else T, block.width)
    if kind == "decoders" and getattr(block, "whole_sequence", False):
        return (*rows, block.num_classes)
    if kind == "decoders" and getattr(block, "generative", False):
        return (*rows, 1)
    if kind == "decoders":
        item = block.item_shape or (x.shape[1], block.vocab_size)
        return (*rows, *item)
    length = x.shape[1] if kind == "backbones" else block.num_tokens or x.shape[1]
    return (*rows, length, block.width)


@functools.cache
def built(kind, name, tied=False):
    """(block, parameters, jitted forward pass (parameters, x, **arguments) -> features)."""
    block = make(kind, name, tied)
    more = others(kind, name, tied)
    forward = jax.jit(
        lambda params, x, **rest: block.apply({"params": params, **more}, x, **rest, train=False, rngs=NOISE)[0]
    )
    return block, some_values(parameter_shapes(block, inputs(kind, name))), forward


@functools.cache
def others(kind, name, tied=False):
    """What the block has beside parameters, such as a codebook that is no parameter."""
    block, x = make(kind, name, tied), inputs(kind, name)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, train=False))
    if not set(shapes) - {"params"}:
        return {}
    variables = jax.jit(lambda key: block.init(key, x, train=False))(jax.random.key(0))
    return {collection: leaves for collection, leaves in variables.items() if collection != "params"}


def parameter_shapes(block, x):
    return jax.eval_shape(lambda: block.init(jax.random.key(0), x, train=False)).get("params", {})


def some_values(shapes):
    """Random parameters: initial values hide faults, for some are zero."""
    rng = np.random.default_rng(5)
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.15, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, tree.paths(shapes), shapes)


def has(kind, name, argument):
    return argument in inspect.signature(TABLES[kind][name].__call__).parameters


def taking(argument):
    blocks = [block for block in BLOCKS if has(*block, argument)]
    return pytest.mark.parametrize("kind, name", blocks, ids=lambda value: value)


@every_block
def test_declares_what_the_model_asks(kind, name):
    cls = TABLES[kind][name]
    for field in dataclasses.fields(cls):
        defaults = {field.default, field.default_factory}
        assert defaults != {dataclasses.MISSING}, field.name
    block = cls()
    for attribute in DECLARED[kind]:
        assert hasattr(block, attribute), attribute
    assert block.dtype == "float32"
    train = inspect.signature(cls.__call__).parameters["train"]
    assert train.kind is train.KEYWORD_ONLY and train.default is train.empty
    if kind == "backbones":
        assert all(has(kind, name, x) for x in ("input_mask", "segment_ids", "positions"))
        assert cls.kind in ("encoder_only", "decoder_only", "encoder_decoder")
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # written, not that of a dataclass


@every_variant
def test_shapes_dtypes_and_rows(kind, name, tied):
    block, params, forward = built(kind, name, tied)
    x = inputs(kind, name)
    y = forward(params, x)
    assert y.shape == output_shape(kind, TABLES[kind][name](), x)
    assert y.dtype == jnp.float32 and bool(jnp.isfinite(y).all())
    np.testing.assert_array_equal(y, forward(params, x))  # deterministic

    other = x.at[0].set(inputs(kind, name, seed=1)[0])
    changed = forward(params, other)
    np.testing.assert_array_equal(changed[1:], y[1:])
    assert bool((changed[0] != y[0]).any())


@every_variant
def test_bfloat16(kind, name, tied):
    block, params, forward = built(kind, name, tied)
    half = make(kind, name, tied, dtype="bfloat16")
    x = inputs(kind, name)
    shapes = parameter_shapes(half, x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    assert {p.dtype for p in jax.tree.leaves(shapes)} <= {jnp.dtype("float32")}
    y, out = jax.jit(
        lambda params, x: half.apply({"params": params, **others(kind, name, tied)}, x, train=False, rngs=NOISE)
    )(params, x)
    assert y.dtype == jnp.bfloat16
    assert isinstance(out, dict)
    exact = forward(params, x)
    error = jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    # In half precision a latent may be nearest to another code.
    assert 0 < error < (0.1 if "codebook" in others(kind, name, tied) else 0.03)


@every_variant
def test_the_gradient_reaches_every_parameter(kind, name, tied):
    block, params, _ = built(kind, name, tied)
    x = inputs(kind, name)

    def loss(params):
        variables = {"params": params, **others(kind, name, tied)}
        y, _ = block.apply(variables, x, train=True, rngs={"dropout": jax.random.key(2), **NOISE})
        return (y * jax.random.normal(jax.random.key(3), y.shape)).sum()

    gradients = tree.flatten(jax.jit(jax.grad(loss))(params))
    assert gradients or name == "text"
    norms = {}
    for path, gradient in gradients.items():
        rows = gradient.shape[0] if re.search("(^|/)layers/", path) else 1
        norms[path] = np.linalg.norm(np.asarray(gradient).reshape(rows, -1), axis=1)
    typical = np.median(np.concatenate(list(norms.values())))
    for path, norm in norms.items():
        # Without rotation a bias of the keys adds the same to all logits of a query: softmax does not see it. The
        # query stream of `two_stream` is there with a factorisation order only. A first stage is trained before.
        if not path.endswith(("/key/bias", "query_start")) and "/latent_" not in path:
            assert np.isfinite(norm).all() and (norm > 1e-4 * typical).all(), (path, norm, typical)


@every_variant
def test_every_parameter_is_in_the_sharding_table(kind, name, tied):
    _, params, _ = built(kind, name, tied)
    root = f"{kind}_x" if kind != "backbones" else "backbone"
    for path, leaf in tree.flatten({root: params}).items():
        names = sharding.parameter_names(path, leaf.shape)
        assert len(names) == leaf.ndim
        assert all(n in sharding.RULES for n in names)


@every_variant
def test_on_a_mesh_as_on_one_device(kind, name, tied):
    block, params, forward = built(kind, name, tied)
    x = inputs(kind, name)
    expected = forward(params, x)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use_mesh(mesh):
        placed = jax.device_put(params, sharding.parameter_shardings({"x": params}, mesh)["x"])
        parts = [p for p in jax.tree.leaves(placed) if not p.is_fully_replicated]
        assert parts or not tree.flatten(params)
        rows = jax.device_put(x, sharding.batch_sharding(mesh))
        more = others(kind, name, tied)
        run = lambda params, x: block.apply({"params": params, **more}, x, train=False, rngs=NOISE)[0]
        y = jax.jit(run)(placed, rows)
    assert len(y.sharding.device_set) == 8
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)


DROPPING = [(kind, name) for kind, name in BLOCKS if "dropout" in TABLES[kind][name].__dataclass_fields__]


@pytest.mark.parametrize("kind, name", DROPPING, ids=lambda value: value)
def test_dropout_acts_in_training_only(kind, name):
    plain, params, _ = built(kind, name)
    block, x = make(kind, name, dropout=0.5), inputs(kind, name)
    variables = {"params": params, **others(kind, name)}
    run = jax.jit(lambda key: block.apply(variables, x, train=True, rngs={"dropout": key, **NOISE})[0])
    y = run(jax.random.key(0))
    np.testing.assert_array_equal(y, run(jax.random.key(0)))
    assert float(jnp.abs(y - run(jax.random.key(1))).mean()) > 1e-2
    program = lambda block: str(jax.make_jaxpr(lambda x: block.apply(variables, x, train=False, rngs=NOISE))(x))
    assert program(block) == program(plain)


def differs(a, b):
    return bool((jnp.abs(a - b) > 1e-3).any())


@taking("input_mask")
def test_masked_positions_do_not_matter(kind, name):
    _, params, forward = built(kind, name)
    x, noise = inputs(kind, name), inputs(kind, name, seed=1)
    for mask in ([1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]):
        mask = jnp.asarray([mask] * B, bool)
        real = mask[:, :, None]
        y = forward(params, x, input_mask=mask)
        moved = forward(params, jnp.where(real, x, noise), input_mask=mask)
        kept = real if y.ndim == 3 else True  # one class for all positions
        np.testing.assert_array_equal(jnp.where(kept, moved, 0), jnp.where(kept, y, 0))
        assert differs(forward(params, jnp.where(real, noise, x), input_mask=mask), y)
    ones = jnp.ones_like(mask)  # with nothing masked the same change does matter
    if y.ndim == 3:
        y, moved = (forward(params, x, input_mask=ones) for x in (x, x.at[:, 1].set(noise[:, 1])))
        assert differs(moved[:, 2:], y[:, 2:])


@taking("segment_ids")
def test_packed_segments_do_not_see_each_other(kind, name):
    _, params, forward = built(kind, name)
    x, noise = inputs(kind, name), inputs(kind, name, seed=1)
    packed = {"segment_ids": jnp.asarray([[1, 1, 2, 2, 2, 0]] * B, jnp.int32),
              "positions": jnp.asarray([[0, 1, 0, 1, 2, 0]] * B, jnp.int32),
              "input_mask": jnp.asarray([[1, 1, 1, 1, 1, 0]] * B, bool)}  # fmt: skip
    y = forward(params, x, **packed)
    moved = forward(params, x.at[:, :2].set(noise[:, :2]), **packed)
    np.testing.assert_array_equal(moved[:, 2:5], y[:, 2:5])
    assert differs(moved[:, :2], y[:, :2])
    np.testing.assert_allclose(forward(params, x[:, :2]), y[:, :2], atol=1e-5)  # as rows of their own
    np.testing.assert_allclose(forward(params, x[:, 2:5]), y[:, 2:5], atol=1e-5)


@taking("cache")
def test_the_cache_gives_what_the_whole_sequence_gives(kind, name):
    block, params, forward = built(kind, name)
    x = inputs(kind, name)
    expected = forward(params, x)
    step = jax.jit(lambda x, cache, **rest: block.apply({"params": params}, x, cache=cache, **rest, train=False))
    two = block.kind == "encoder_decoder"  # it reads all of x at once, and writes x again bit by bit
    cache, found = block.init_cache(B, T, T) if two else block.init_cache(B, T), []
    for n, piece in enumerate((x[:, :3], x[:, 3:4], x[:, 4:5], x[:, 5:6])):
        y, out = step(x if n == 0 else None, cache, decoder_x=piece) if two else step(piece, cache)
        cache = out["cache"]
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=1e-5)
