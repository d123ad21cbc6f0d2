import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recency import Recency
from vfm import model as model_lib
from vfm import tree
from vfm.backbones.decoder_only import GLM, GPT2, LLAMA
from vfm.backbones.encoder_decoder import T5
from vfm.backbones.encoder_only import BERT
from vfm.errors import UserError
from vfm.generate import bucket, fill, generate, stream, unrolls

V, D, T, NEW = 23, 16, 9, 7
LENGTHS = (9, 6, 3, 1)


def build(style, max_len=T + NEW, **backbone):
    """Text and vectors; random parameters that are far from zero, so that the best token is clear."""
    model = model_lib.build({
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": V, "width": D},
                     "vector": {"name": "vector", "num_features": 3, "num_tokens": 2, "width": D, "mlp_dim": 8}},
        "input_projectors": {"vector": {"name": "linear", "width": D}},
        "backbone": {"name": "decoder_only", "width": D, "depth": 2, "num_heads": 4, "mlp_dim": 24,
                     "max_len": max_len, **style, **backbone},
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


def turned(batch, names=("tokens", "input_mask"), starts=("starts",)):
    """The prompts padded at the left end instead."""
    mask = np.asarray(batch[names[1]])
    shift = (mask.shape[1] - mask.sum(axis=1)).astype(np.int32)
    source = (np.arange(mask.shape[1])[None] - shift[:, None]) % mask.shape[1]
    rows = {name: jnp.take_along_axis(jnp.asarray(batch[name]), source, axis=1) for name in names}
    move = lambda at: jnp.where(at < 0, at, at + shift[:, None])
    return {**batch, **rows, **{name: jax.tree.map(move, batch[name]) for name in starts}}


def by_repeated_passes(model, variables, batch, names=("tokens", "input_mask"), more=lambda i: {}, new=NEW):
    """The best token of the whole row so far, written behind it, again and again, without a cache."""
    forward = jax.jit(lambda batch: model.apply(variables, **batch, train=False)[0])
    ids, mask = (np.asarray(batch[name]) for name in names)
    ends, rows, width = mask.sum(axis=1), np.arange(len(mask)), mask.shape[1] + new
    tokens = np.pad(ids, ((0, 0), (0, new)))
    found, margins = [], []
    for i in range(new):
        mask = np.arange(width)[None] < (ends + i)[:, None]
        logits = np.asarray(forward({**batch, names[0]: tokens, names[1]: mask, **more(i)}))[rows, ends + i - 1]
        best = np.sort(logits, axis=-1)
        margins.append(best[:, -1] - best[:, -2])
        tokens[rows, ends + i] = logits.argmax(axis=-1)
        found.append(logits.argmax(axis=-1))
    assert np.min(margins) > 1e-3  # clear of rounding
    return np.stack(found, axis=1)


STYLES = {
    "gpt2": GPT2,
    "llama-grouped": {**LLAMA, "num_kv_heads": 2},
    "window": {**LLAMA, "window": 4},  # counted in real tokens, wherever the padding is
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_greedy_equals_repeated_full_passes(style):
    model, variables = build(style)
    batch = prompts()
    expected = by_repeated_passes(model, variables, batch)
    found = np.asarray(generate(model, variables, batch, max_new=NEW, eos_id=V))  # no token is the end
    np.testing.assert_array_equal(found, expected)
    unrolled = generate(model, variables, turned(batch), max_new=NEW, eos_id=V, unroll=True)
    np.testing.assert_array_equal(unrolled, expected)
    assert len(np.unique(found)) > 4  # rows differ, and go on


@pytest.mark.parametrize("width, layers, wanted", [(256, 6, False), (768, 12, True), (4096, 32, False)])
def test_layers_are_unrolled_where_it_pays(width, layers, wanted):
    kernel = jax.ShapeDtypeStruct((layers, width, 10 * width), jnp.float32)
    assert unrolls({"transformer": {"layers": {"mlp": {"kernel": kernel}}}, "norm": kernel}) == wanted


def test_an_encoder_decoder_equals_its_repeated_full_passes():
    """Encoder inputs and beginnings of the answers are of unequal length, padded at the right and at the left end."""
    model, variables = build(T5, name="encoder_decoder", decoder_depth=1)
    rng = np.random.default_rng(2)
    batch = prompts()
    mask = np.arange(4)[None] < np.array([1, 4, 2, 3])[:, None]
    batch |= {"decoder_tokens": jnp.asarray(rng.integers(0, V, mask.shape), jnp.int32), "decoder_mask": mask}
    names = ("decoder_tokens", "decoder_mask")
    expected = by_repeated_passes(model, variables, batch, names)
    np.testing.assert_array_equal(generate(model, variables, batch, max_new=NEW, eos_id=V), expected)
    left = turned(turned(batch), names, starts=())
    np.testing.assert_array_equal(generate(model, variables, left, max_new=NEW, eos_id=V), expected)
    start = {name: value for name, value in batch.items() if name not in names}
    first = {"decoder_tokens": np.full((4, 1), 5), "decoder_mask": np.ones((4, 1), bool)}
    expected = by_repeated_passes(model, variables, {**start, **first}, names)
    np.testing.assert_array_equal(generate(model, variables, start, max_new=NEW, eos_id=V, start_id=5), expected)
    with pytest.raises(UserError, match="needs start_id"):
        generate(model, variables, start, max_new=NEW, eos_id=V)


def test_new_tokens_go_on_from_given_positions():
    """GLM: all of the prompt but its last token is seen from everywhere; the answer counts on within its blank."""
    model, variables = build(GLM, max_len=2 * (T + NEW), num_block_positions=T + NEW)
    batch = {name: x for name, x in prompts().items() if name in ("tokens", "input_mask")}
    ends = np.array(LENGTHS)[:, None]

    def places(new, ends=ends):
        at = np.arange(T + new)[None]
        return {
            "prefix": at < ends - 1,
            "positions": np.where(at < ends - 1, at, 2).astype(np.int32),
            "block_positions": np.clip(at - ends + 2, 0, NEW + 1).astype(np.int32),
        }

    expected = by_repeated_passes(model, variables, batch, more=lambda i: places(NEW))
    found = generate(model, variables, {**batch, **places(0)}, max_new=NEW, eos_id=V)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="16 new tokens do not fit in a blank of model.backbone.num_block_positions=16"):
        generate(model, variables, {**batch, **places(0)}, max_new=T + NEW, eos_id=V)
    model, variables = build(GPT2, max_len=2 * (T + NEW))
    shifted = lambda new: {"positions": np.broadcast_to(np.arange(T + new, dtype=np.int32) + 5, (4, T + new))}
    expected = by_repeated_passes(model, variables, batch, more=lambda i: shifted(NEW))
    found = generate(model, variables, {**batch, **shifted(0)}, max_new=NEW, eos_id=V)
    np.testing.assert_array_equal(found, expected)


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


@pytest.fixture(scope="module")
def quick():
    """(model, variables, prompts) that need next to no compilation."""
    model = Recency(V)
    return model, model.variables(), {name: x for name, x in prompts().items() if name in ("tokens", "input_mask")}


def test_sampling_follows_the_probabilities(quick):
    model, variables, _ = quick
    rows, temperature = 4000, 2.0
    prompt = jnp.tile(jnp.asarray([[3, 7, 1]], jnp.int32), (rows, 1))
    batch = {"tokens": prompt, "input_mask": jnp.ones(prompt.shape, bool)}
    draw = lambda seed: np.asarray(generate(model, variables, batch, max_new=1, eos_id=V, temperature=temperature,
                                            rng=jax.random.key(seed)))[:, 0]  # fmt: skip
    logits = model.apply(variables, prompt[:1], input_mask=batch["input_mask"][:1], train=False)[0][0, -1]
    expected = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    tokens = draw(0)
    counts = np.bincount(tokens, minlength=V)
    assert np.all(np.abs(counts - rows * expected) < 5 * np.sqrt(rows * expected * (1 - expected)) + 1)
    np.testing.assert_array_equal(draw(0), tokens)
    assert (draw(1) != tokens).any()


SAMPLED = dict(max_new=12, eos_id=(4, 9, 17), pad_id=0, temperature=1.5, top_p=0.95, repetition_penalty=1.1)


def test_a_row_does_not_depend_on_its_batch(quick):
    model, variables, batch = quick
    keys = jax.random.split(jax.random.key(3), 4)
    found = np.asarray(generate(model, variables, batch, rng=keys, **SAMPLED))
    order = jnp.asarray([2, 0, 3, 2])
    others = generate(model, variables, {k: x[order] for k, x in batch.items()}, rng=keys[order], **SAMPLED)
    np.testing.assert_array_equal(others, found[order])
    # With one key, row r of any batch has the draws of row r.
    found = generate(model, variables, batch, rng=jax.random.key(3), **SAMPLED)
    first = generate(model, variables, {k: x[:2] for k, x in batch.items()}, rng=jax.random.key(3), **SAMPLED)
    np.testing.assert_array_equal(first, found[:2])
    same = {k: x[jnp.zeros(4, int)] for k, x in batch.items()}
    same = generate(model, variables, same, rng=jax.random.key(3), **SAMPLED)
    assert len(np.unique(same, axis=0)) > 1


def test_a_stream_is_what_generate_gives(quick):
    model, variables, batch = quick
    found = np.asarray(generate(model, variables, batch, rng=jax.random.key(5), **SAMPLED))
    columns = [np.asarray(x) for x in stream(model, variables, batch, rng=jax.random.key(5), **SAMPLED)]
    streamed = np.stack(columns, axis=1)
    np.testing.assert_array_equal(streamed, found[:, : len(columns)])
    assert 1 < len(columns) < SAMPLED["max_new"] and (found[:, len(columns) :] == 0).all()  # all rows had ended
    whole = list(stream(model, variables, batch, max_new=5, eos_id=()))
    np.testing.assert_array_equal(np.stack(whole, axis=1), generate(model, variables, batch, max_new=5, eos_id=()))


def test_stop_sequences_end_a_row_and_are_kept(quick):
    model, variables, batch = quick
    free = np.asarray(generate(model, variables, batch, max_new=9, eos_id=()))
    stop = [tuple(free[0, 2:5]), tuple(free[1, :2]), (V - 1,) * 3]
    found = np.asarray(generate(model, variables, batch, max_new=9, eos_id=(), pad_id=V - 2, stop=stop))
    stopped = 0
    for row, expected in zip(found, free.tolist()):
        ends = [i + len(s) for s in stop for i in range(9) if tuple(expected[i : i + len(s)]) == s]
        end = min(ends, default=9)
        assert row.tolist() == expected[:end] + [V - 2] * (9 - end)
        stopped += end < 9
    assert stopped >= 2
    # What the prompt ends with does not count.
    last = int(batch["tokens"][0, LENGTHS[0] - 1])
    stop = [(last, *free[0, :1])]
    assert (np.asarray(generate(model, variables, batch, max_new=9, eos_id=(), stop=stop))[0] == free[0])[:2].all()


def test_the_program_stops_when_all_rows_have(quick):
    """Counted: one pass for the prompts, and one for each token but the last."""
    _, variables, batch = quick
    passes = []

    class Counted(Recency):
        def apply(self, *args, **kwargs):
            if "method" not in kwargs:
                jax.debug.callback(lambda: passes.append(1))
            return super().apply(*args, **kwargs)

    def count(**options):
        passes.clear()
        found = np.asarray(generate(Counted(V), variables, batch, max_new=9, **options))
        jax.effects_barrier()
        return found, len(passes)

    free, number = count(eos_id=())
    assert number == 9
    found, number = count(eos_id=tuple(free[:, 2].tolist()))
    longest = max(1 + int(np.flatnonzero(np.isin(row, free[:, 2]))[0]) for row in free)
    assert number == longest <= 3
    assert count(eos_id=tuple(free[:, 0].tolist()))[1] == 1


def test_constraints_reach_the_program(quick):
    model, variables, batch = quick
    free = np.asarray(generate(model, variables, batch, max_new=8, eos_id=V))
    eos = int(free[0, 1])
    found = np.asarray(generate(model, variables, batch, max_new=8, eos_id=eos, pad_id=V - 1, min_new=4))
    assert not (found[:, :3] == eos).any()
    assert (np.asarray(generate(model, variables, batch, max_new=3, eos_id=V, forced_eos_id=6))[:, 2] == 6).all()
    penalised = np.asarray(generate(model, variables, batch, max_new=8, eos_id=V, repetition_penalty=1e4))
    for row, prompt, length in zip(penalised, np.asarray(batch["tokens"]), LENGTHS):
        assert len({*row.tolist(), *prompt[:length].tolist()}) == 8 + len(set(prompt[:length].tolist()))


def test_masks_may_be_numbers_or_left_out(quick):
    model, variables, batch = quick
    expected = generate(model, variables, batch, max_new=4, eos_id=(2, 3), forced_eos_id=[2, 3])
    numbers = {name: np.asarray(x, np.int64) for name, x in batch.items()}
    found = generate(model, variables, numbers, max_new=4, eos_id=np.array([2, 3]), forced_eos_id=(2, 3))
    np.testing.assert_array_equal(found, expected)
    full = {"tokens": batch["tokens"][:1]}  # the first row has no padding
    found = generate(model, variables, full, max_new=4, eos_id=[2, 3], forced_eos_id=(2, 3))
    np.testing.assert_array_equal(found, expected[:1])


def test_items_are_no_text_that_is_repeated():
    model, variables = build(LLAMA)
    batch = prompts()
    found = generate(model, variables, batch, max_new=NEW, eos_id=V, repetition_penalty=3.0)
    tokens = batch["tokens"].at[0, 4:6].set(int(found[0, 0])).at[2, 0:2].set(int(found[2, 0]))  # under the vectors
    again = generate(model, variables, {**batch, "tokens": tokens}, max_new=NEW, eos_id=V, repetition_penalty=3.0)
    np.testing.assert_array_equal(again, found)


def test_prompts_of_many_lengths_share_a_program():
    assert [bucket(n, 1000) for n in (1, 16, 17, 32, 33, 700)] == [16, 16, 32, 32, 64, 1000]
    assert bucket(20, 24) == 24


# --------------------------------------------------------------------------------------- encoder-only


def mask_predict(forward, tokens, mask_id, steps):
    """One row at a time, in plain Python (Ghazvininejad et al. 2019, section 3)."""
    rows = []
    for b, row in enumerate(tokens):
        row, free = row.copy(), np.flatnonzero(row == mask_id)
        certainty = np.zeros(len(row))
        for t in range(steps):
            n = len(free) * (steps - t) // steps
            masked = free if t == 0 else free[np.argsort(certainty[free], kind="stable")[:n]]
            row[masked] = mask_id
            logp = forward(b, row)
            logp[:, mask_id] = -np.inf
            row[masked], certainty[masked] = logp[masked].argmax(axis=1), logp[masked].max(axis=1)
        rows.append(row)
    return np.stack(rows)


def test_masked_positions_are_filled():
    model, variables = build({**BERT, "num_token_types": 0}, name="encoder_only")
    rng = np.random.default_rng(3)
    mask_id = V - 1
    tokens = rng.integers(0, mask_id, (3, T)).astype(np.int32)
    tokens[0, 1:8], tokens[1, ::2] = mask_id, mask_id
    real = np.arange(T)[None] < np.array([[6], [T], [T]])
    forward = jax.jit(lambda call: jax.nn.log_softmax(model.apply(variables, **call, train=False)[0])[0])
    reference = lambda steps: mask_predict(
        lambda b, row: np.array(forward({"tokens": row[None], "input_mask": real[b : b + 1]})),
        np.where(real, tokens, 0), mask_id, steps,
    )  # fmt: skip
    found = np.asarray(fill(model, variables, {"tokens": tokens, "input_mask": real}, mask_id=mask_id, steps=4))
    np.testing.assert_array_equal(found[real], reference(4)[real])
    assert (reference(1) != reference(4)).any()
    given = (tokens != mask_id) | ~real  # padding is not filled
    np.testing.assert_array_equal(found[given], tokens[given])
    assert (found[~given] != mask_id).all()
    with pytest.raises(UserError, match="vfm.generate.fill"):
        generate(model, variables, {"tokens": tokens}, max_new=2, eos_id=0)


def test_bad_requests_are_told():
    model, variables = build(LLAMA, max_len=T + NEW - 1)
    message = f"prompt of {T} positions \\+ {NEW} new tokens is longer than model.backbone.max_len={T + NEW - 1}"
    with pytest.raises(UserError, match=message):
        generate(model, variables, prompts(), max_new=NEW, eos_id=0)
    for fields, message in (
        ({"temperature": 1.0}, "needs a key"),
        ({"temperature": 1.0, "rng": jax.random.split(jax.random.key(0), 3)}, "3,\\) keys for 4 rows"),
        ({"max_new": 0}, "max_new=0 must be a whole number >= 1"),
        ({"temprature": 1.0}, "'temprature' in generate; did you mean 'temperature'"),
        ({"stop": [()]}, "empty sequence"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, variables, prompts(), **{"max_new": 1, "eos_id": 0, **fields})
    silent = model_lib.build({"centre": "vector", "backbone": {"name": "decoder_only", "width": D},
                              "encoders": {"vector": {"name": "vector", "num_features": 3, "width": D}}})  # fmt: skip
    with pytest.raises(UserError, match="without decoders.text gives no text"):
        generate(silent, {}, {"input_mask": np.ones((1, 3), bool)}, max_new=1, eos_id=0)
    with pytest.raises(UserError, match="steps=0 must be"):
        fill(model, variables, prompts(), mask_id=0, steps=0)
