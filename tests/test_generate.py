import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import model as model_lib
from vfm import tree
from vfm.backbones.decoder_only import GPT2, LLAMA
from vfm.errors import UserError
from vfm.generate import generate

V, D, T, NEW = 23, 16, 9, 7
LENGTHS = (9, 6, 3, 1)


def build(style, max_len=T + NEW):
    """Text and vectors; random parameters that are far from zero, so that the best token is clear."""
    model = model_lib.build({
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": V, "width": D},
                     "vector": {"name": "vector", "num_features": 3, "num_tokens": 2, "width": D, "mlp_dim": 8}},
        "input_projectors": {"vector": {"name": "linear", "width": D}},
        "backbone": {"name": "decoder_only", "width": D, "depth": 2, "num_heads": 4, "mlp_dim": 24,
                     "max_len": max_len, **style},
        "decoders": {"text": {"name": "text", "vocab_size": V}},
    })  # fmt: skip
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: jnp.asarray(rng.normal(path.endswith("scale"), 0.4, leaf.shape), jnp.float32)
    return model, jax.tree.map(draw, tree.paths(shapes), shapes)


def prompts():
    """Rows of unequal length, padded at the right end; two of them hold a vector."""
    rng = np.random.default_rng(1)
    mask = np.arange(T)[None] < np.array(LENGTHS)[:, None]
    return {
        "tokens": jnp.asarray(np.where(mask, rng.integers(0, V, mask.shape), 0), jnp.int32),
        "input_mask": jnp.asarray(mask),
        "inputs": {"vector": jnp.asarray(rng.normal(size=(4, 1, 3)), jnp.float32)},
        "starts": {"vector": jnp.asarray([[4], [-1], [0], [-1]], jnp.int32)},
    }


def by_repeated_passes(model, variables, batch):
    """The best token of the whole row so far, written behind it, again and again."""
    forward = jax.jit(lambda batch: model.apply(variables, **batch, train=False)[0])
    ends, rows = np.array(LENGTHS), np.arange(len(LENGTHS))
    tokens = np.pad(batch["tokens"], ((0, 0), (0, NEW)))
    found, margins = [], []
    for i in range(NEW):
        mask = np.arange(T + NEW)[None] < (ends + i)[:, None]
        logits = np.asarray(forward({**batch, "tokens": tokens, "input_mask": mask}))[rows, ends + i - 1]
        best = np.sort(logits, axis=-1)
        margins.append(best[:, -1] - best[:, -2])
        tokens[rows, ends + i] = logits.argmax(axis=-1)
        found.append(logits.argmax(axis=-1))
    assert np.min(margins) > 1e-3  # clear of rounding
    return np.stack(found, axis=1)


@pytest.mark.parametrize(
    "style", [GPT2, LLAMA, {**LLAMA, "num_kv_heads": 2}], ids=["gpt2", "llama", "llama-grouped"])  # fmt: skip
def test_greedy_equals_repeated_full_passes(style):
    model, variables = build(style)
    batch = prompts()
    expected = by_repeated_passes(model, variables, batch)
    found = np.asarray(generate(model, variables, batch, max_new=NEW, eos_id=V))  # no token is the end
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 4  # rows differ, and go on


def test_the_end_token_is_repeated_and_other_rows_do_not_notice():
    model, variables = build(LLAMA)
    found = np.asarray(generate(model, variables, prompts(), max_new=NEW, eos_id=V))
    end = int(found[1, 3])
    stopped = np.asarray(generate(model, variables, prompts(), max_new=NEW, eos_id=end))
    for row, expected in zip(stopped, found):
        first = np.flatnonzero(expected == end)
        until = first[0] if len(first) else NEW
        np.testing.assert_array_equal(row, [*expected[:until], *[end] * (NEW - until)])
    assert (stopped[1, 3:] == end).all() and (stopped != found).any()


def test_what_is_padding_does_not_matter():
    model, variables = build(LLAMA)
    batch = prompts()
    found = generate(model, variables, batch, max_new=NEW, eos_id=V)
    other = {**batch, "tokens": jnp.where(batch["input_mask"], batch["tokens"], 5)}
    np.testing.assert_array_equal(generate(model, variables, other, max_new=NEW, eos_id=V), found)
    changed = {**batch, "inputs": {"vector": -batch["inputs"]["vector"]}}
    differ = np.any(np.asarray(generate(model, variables, changed, max_new=NEW, eos_id=V)) != found, axis=1)
    assert differ[0] and not differ[1] and not differ[3]  # rows 1 and 3 do not read their vector


def test_sampling_follows_the_probabilities():
    model, variables = build(LLAMA)
    rows, temperature = 4000, 2.0
    prompt = jnp.tile(jnp.asarray([[3, 7, 1]], jnp.int32), (rows, 1))
    batch = {"tokens": prompt, "input_mask": jnp.ones(prompt.shape, bool)}
    draw = lambda seed: np.asarray(generate(model, variables, batch, max_new=1, eos_id=V, temperature=temperature,
                                            rng=jax.random.key(seed)))[:, 0]  # fmt: skip
    logits = model.apply(variables, prompt[:1], train=False)[0][0, -1]
    expected = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    tokens = draw(0)
    counts = np.bincount(tokens, minlength=V)
    assert np.all(np.abs(counts - rows * expected) < 5 * np.sqrt(rows * expected * (1 - expected)) + 1)
    np.testing.assert_array_equal(draw(0), tokens)
    assert (draw(1) != tokens).any()


def test_bad_requests_are_told():
    model, variables = build(LLAMA, max_len=T + NEW - 1)
    message = f"prompt of {T} positions \\+ {NEW} new tokens is longer than model.backbone.max_len={T + NEW - 1}"
    with pytest.raises(UserError, match=message):
        generate(model, variables, prompts(), max_new=NEW, eos_id=0)
    with pytest.raises(UserError, match="needs a key"):
        generate(model, variables, prompts(), max_new=1, eos_id=0, temperature=1.0)
