"""Pretraining of language models: from the corrupted rows of a data set through the model to the loss."""

import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm import data, metrics, objectives, tree
from vfm import model as model_lib
from vfm.backbones import DecoderOnly
from vfm.data import corrupted
from vfm.data.interleave import Layout
from vfm.data.pipeline import Pipeline, rng
from vfm.errors import UserError
from vfm.layers.attention import make_mask
from vfm.layers.moe import load_balancing_loss, router_z_loss
from vfm.objectives.next_token import cross_entropy, z_loss
from vfm.tokenizers.byte import ByteTokenizer
from vfm.train import step
from vfm.train.state import TrainState

FIXTURES = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "functions"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", "<cls>", "<sep>", "<start>", "<end>")
TOKENIZER = ByteTokenizer((*SPECIAL, *(f"<extra_id_{i}>" for i in range(3))))
V, D, T = TOKENIZER.vocab_size, 16, 48
BLOCK = {"width": D, "depth": 1, "num_heads": 2, "mlp_dim": 32, "max_len": T}
BACKBONES = {
    "encoder_only": {"num_token_types": 2},
    "decoder_only": {"positions": "learned", "num_block_positions": T},
    "encoder_decoder": {},
    "two_stream": {},
}
# Corruption -> backbone and objective that it is for.
USES = {
    "next_token": ("decoder_only", "next_token"),
    "masked": ("encoder_only", "masked"),
    "sentence_pairs": ("encoder_only", "masked"),
    "span_corruption": ("encoder_decoder", "denoising"),
    "text_infilling": ("encoder_decoder", "denoising"),
    "blank_infilling": ("decoder_only", "next_token"),
    "prefix_lm": ("decoder_only", "next_token"),
    "permutation": ("two_stream", "permutation"),
}
DOCUMENTS = (
    "Ab cd ef. Gh ij.",
    "Kl mn opq.",
    "Rs tu. Vw xyz.",
    "Cabin de fg hi jk. Lm no.",
    "Pq rstu.",
    "We xy. Zab c de. Fgh.",
    "Ijk lmn.",
    "Opq rs tu vwx. Yz.",
)


def test_every_corruption_is_tried():
    assert set(USES) == set(corrupted.CORRUPTIONS)
    assert {backbone for backbone, _ in USES.values()} == set(BACKBONES)


def config(backbone, label=False, **fields):
    c = {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": V, "width": D}},
        "backbone": {"name": backbone, **BLOCK, **BACKBONES[backbone], **fields},
        "decoders": {"text": {"name": "text", "vocab_size": V}},
    }
    if label:
        c["decoders"]["label"] = {"name": "classifier", "num_classes": 2}
    return c


def some_values(model, scale=0.3):
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))["params"]
    draw = np.random.default_rng(0)
    value = lambda path, leaf: jnp.asarray(draw.normal(path.endswith("scale"), scale, leaf.shape), jnp.float32)
    return jax.tree.map(value, tree.paths(shapes), shapes)


@functools.cache
def built(backbone):
    """(model, parameters, jitted forward pass of a batch)."""
    model = model_lib.build(config(backbone, label=backbone == "encoder_only"))
    params = some_values(model)
    inputs = lambda batch: {name: batch[name] for name in model_lib.INPUTS if name in batch}
    return model, params, jax.jit(lambda batch: model.apply({"params": params}, **inputs(batch), train=False)[0])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))

    @functools.cache
    def make(name, packing="", length=T):
        cfg = {"name": "text", "source": {"name": "jsonl", "paths": {"train": str(path)}}, "packing": packing}
        return data.build({**cfg, "corruption": {"name": name}}, "train", layout=Layout(length), tokenizer=TOKENIZER)

    return make


# ------------------------------------------------------------------------------------ packing


def of(row, number, change=lambda key, array, mine: array):
    """A row of one of the pieces of a packed row, or of all with a change: change(key, array, where the piece is)."""
    result = {}
    for key, array in row.items():
        if isinstance(array, np.ndarray) and array.ndim:
            written = key.startswith("decoder_") or ("decoder_tokens" in row and key in ("targets", "loss_mask"))
            result[key] = change(key, array, row["decoder_segment_ids" if written else "segment_ids"] == number)
    return result


PACKED = [name for name, kind in corrupted.CORRUPTIONS.items() if kind.keys >= corrupted.PACKED]


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_do_not_see_each_other(dataset, name):
    backbone, _ = USES[name]
    _, _, forward = built(backbone)
    found = dataset(name, "first_fit")
    rows = [found.example(index, rng(0, index)) for index in range(len(found))]
    row = next(row for row in rows if row["segment_ids"].max() > 1)
    where = row.get("decoder_segment_ids", row["segment_ids"])
    draw = np.random.default_rng(1)
    texts = np.arange(len(TOKENIZER.special), V)

    def noise(key, array, mine):
        return np.where(mine, draw.choice(texts, len(array)), array).astype(array.dtype) if "tokens" in key else array

    def alone(key, array, mine):
        kept = array[mine]
        return np.pad(kept, (0, len(array) - len(kept)))

    batch = lambda *rows: {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    one, two = int((where == 1).sum()), int((where == 2).sum())
    whole = of(row, 1)
    logits = np.asarray(forward(batch(whole, of(row, 1, noise), of(row, 1, alone), of(row, 2, alone))))
    np.testing.assert_array_equal(logits[1, where == 2], logits[0, where == 2])
    predicted = (where == 1) & (row["loss_mask"] > 0)
    assert np.abs(logits[1, predicted] - logits[0, predicted]).max(axis=-1).min() > 1e-3
    np.testing.assert_allclose(logits[2, :one], logits[0, where == 1], atol=2e-5)
    np.testing.assert_allclose(logits[3, :two], logits[0, where == 2], atol=2e-5)
    # Without the segments they do: the test can fail.
    mixed = {key: np.minimum(x, 1) if key.endswith("segment_ids") else x for key, x in whole.items()}
    logits = np.asarray(forward(batch(mixed, of(mixed | {"segment_ids": row["segment_ids"]}
        | ({"decoder_segment_ids": where} if "decoder_tokens" in row else {}), 1, noise)
        | {key: x for key, x in mixed.items() if key.endswith("segment_ids")})))  # fmt: skip
    assert np.abs(logits[1, where == 2] - logits[0, where == 2]).max() > 1e-3


# ------------------------------------------------------------------------------------ masks


def may_see(row):
    """bool[T, T] token by token: the text of one's own document that was read, or written before."""
    n, segments, prefix = len(row["tokens"]), row["segment_ids"], row["prefix"]
    allowed = np.zeros((n, n), bool)
    for t in range(n):
        for s in range(n):
            own = segments[s] == segments[t] and row["input_mask"][s]
            read = prefix[s]
            written_before = s <= t
            allowed[t, s] = own and (read or written_before)
    return allowed


def masks(batch):
    index = jnp.arange(batch["tokens"].shape[1])
    segments = {name: jnp.asarray(batch["segment_ids"]) for name in ("q_segments", "kv_segments")}
    prefix, real = jnp.asarray(batch["prefix"]), jnp.asarray(batch["input_mask"])
    return make_mask(index, index, causal=True, prefix=prefix, kv_mask=real, **segments)[:, 0]


@pytest.mark.parametrize("name", ["prefix_lm", "blank_infilling"])
@pytest.mark.parametrize("packing", ["first_fit", "none"])
def test_masks_equal_a_construction_by_hand(dataset, name, packing):
    found = dataset(name, packing)
    rows = [found.example(index, rng(seed, index)) for index in range(len(found)) for seed in range(5)]
    batch = {key: np.stack([row[key] for row in rows]) for key in ("tokens", "segment_ids", "prefix", "input_mask")}
    for row, mask in zip(rows, np.asarray(masks(batch))):
        np.testing.assert_array_equal(mask, may_see(row))
        if name == "blank_infilling" and packing == "none":
            # Part A sees part A alone; part B sees part A and what comes before it in part B.
            a, n = int(row["prefix"].sum()), int(row["input_mask"].sum())
            assert mask[:a, :a].all() and not mask[:a, a:].any() and mask[a:n, :a].all()
            np.testing.assert_array_equal(mask[a:n, a:n], np.tril(np.ones((n - a, n - a), bool)))


def test_a_prefix_is_seen_by_all_and_the_rest_is_causal_by_gradient(dataset):
    rows = [dataset(name, "first_fit").example(0, rng(1, 0)) for name in ("prefix_lm", "blank_infilling")]
    block = DecoderOnly(**{**BLOCK, "depth": 2})
    batch = {key: np.stack([row[key] for row in rows]) for key in ("segment_ids", "prefix", "input_mask", "positions")}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, D)), jnp.float32)
    params = jax.jit(lambda: block.init(jax.random.key(0), x, train=False))()["params"]
    sums = lambda x: block.apply({"params": params}, x, **batch, train=False)[0].sum(axis=(0, 2))
    moved = np.abs(jax.jit(jax.jacrev(sums))(x)).max(axis=-1).transpose(1, 0, 2) > 1e-7
    for row, found in zip(rows, moved):
        assert row["segment_ids"].max() > 1 and row["prefix"].any()
        real = row["input_mask"]
        np.testing.assert_array_equal(found[real], may_see(row)[real])


# ------------------------------------------------------------------------------------ losses


def fixture(name):
    if not (FIXTURES / name).is_dir():
        pytest.skip("the fixtures are not here")
    with np.load(FIXTURES / name / "io.npz") as io:
        return {key: io[key] for key in io}, json.loads((FIXTURES / name / "meta.json").read_text())["params"]


def batch_of(labels):
    return {"targets": jnp.asarray(np.maximum(labels, 0)), "loss_mask": jnp.asarray(labels >= 0)}


def test_losses_equal_torch():
    io, params = fixture("cross_entropy_variants")
    batch, smoothing, coefficient = batch_of(io["in/labels"]), params["smoothing"], params["z_coef"]
    mean = lambda pair: pair[0] / pair[1]
    ce = lambda x: mean(cross_entropy(x, batch)[0])
    smoothed = lambda x: mean(cross_entropy(x, batch, smoothing)[0])
    z = lambda x: coefficient * mean(z_loss(x, batch["loss_mask"]))

    @jax.jit
    def run(x):
        gradients = {"ce_smoothed": smoothed, "ce_plus_z": lambda x: ce(x) + z(x)}
        values = {"ce": ce(x), "ce_sum": cross_entropy(x, batch)[0][0], "z_loss": z(x)}
        for name, loss in gradients.items():
            values[name], values[f"grad_{name}"] = jax.value_and_grad(loss)(x)
        return values

    for name, value in run(jnp.asarray(io["in/logits"])).items():
        np.testing.assert_allclose(value, io[f"out/{name}"], rtol=1e-5, atol=1e-5, err_msg=name)


def test_perplexity_is_that_of_the_loss():
    io, _ = fixture("perplexity")
    (total, count), _ = jax.jit(cross_entropy)(jnp.asarray(io["in/logits"]), batch_of(io["in/labels"]))
    np.testing.assert_allclose(total, io["out/nll"].sum(), rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(total / count), io["out/perplexity"], rtol=1e-5)
    np.testing.assert_allclose(total / count / np.log(2), io["out/bits_per_token"], rtol=1e-5)


def batch(dataset, name, rows=4):
    return Pipeline(dataset(name), rows, seed=0, shuffle=False).batch(0)


def stand_in(kind, logits, out):
    """A model that gives these logits and this `out`."""
    backbone = types.SimpleNamespace(kind=kind, num_experts=3, experts_per_token=2)
    return types.SimpleNamespace(
        backbone=backbone, decoders={"text": None, "label": None}, apply=lambda variables, **rest: ((logits, out), {})
    )


@pytest.mark.parametrize("kind, name", [("decoder_only", "next_token"), ("encoder_decoder", "denoising")])
def test_options_of_the_loss_are_terms(kind, name):
    draw = np.random.default_rng(0)
    router = lambda length: jnp.asarray(draw.normal(size=(2, B, length, 3)), jnp.float32)
    real = lambda length: np.arange(length)[None] < draw.integers(2, length, B)[:, None]
    B, V, S, U = 4, 11, 9, 6
    masks = {"input_mask": real(S)}
    stacks = {"": (router(S), masks["input_mask"])}
    out = {"router_logits": stacks[""][0]}
    if kind == "encoder_decoder":
        masks["decoder_mask"] = real(U)
        stacks = {"encoder_": stacks[""], "": (router(U), masks["decoder_mask"])}
        out = {"router_logits": stacks[""][0], "encoder": out}
    logits = jnp.asarray(draw.normal(size=(B, U, V)), jnp.float32)
    targets, mask = draw.integers(0, V, (B, U)), (draw.random((B, U)) < 0.5).astype(np.float32)
    rows = {**masks, "targets": targets, "loss_mask": mask, "decoder_tokens": targets}
    options = {"z_loss": 0.1, "label_smoothing": 0.2, "router_balance": 0.3, "router_z": 0.4}
    loss = lambda **options: objectives.build({"name": name, **options}, stand_in(kind, logits, {"backbone": out}))(
        {}, {}, rows, jax.random.key(0), train=True)[0]  # fmt: skip
    terms, plain = jax.jit(lambda: (loss(**options), loss()))()
    assert set(plain) == {"text"}
    assert set(terms) == {"text", "z_loss"} | {f"{s}{name}" for s in stacks for name in ("router_balance", "router_z")}
    value = {name: float(total / count) for name, (_, total, count) in terms.items()}
    weight = {name: float(w) for name, (w, _, _) in terms.items()}
    assert weight == pytest.approx({"text": 1} | {n: options[n.removeprefix("encoder_")] for n in terms if n != "text"})
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nll = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    assert plain["text"][1] == pytest.approx((nll * mask).sum(), rel=1e-4) and plain["text"][2] == mask.sum()
    assert value["text"] == pytest.approx(((0.8 * nll - 0.2 * log_p.mean(-1)) * mask).sum() / mask.sum(), rel=1e-4)
    lse = np.log(np.exp(np.asarray(logits)).sum(axis=-1))
    assert value["z_loss"] == pytest.approx((lse**2 * mask).sum() / mask.sum(), rel=1e-4)
    for prefix, (found, real) in stacks.items():
        balance, z = jax.jit(lambda x, mask: (load_balancing_loss(x, 2, mask), router_z_loss(x, mask)))(found, real)
        assert value[f"{prefix}router_balance"] == pytest.approx(float(balance), rel=1e-4)
        assert value[f"{prefix}router_z"] == pytest.approx(float(z), rel=1e-4)
        assert terms[f"{prefix}router_z"][2] == real.sum()
    # Rows that only fill a batch do not count.
    rows["example_mask"] = np.array([1, 1, 1, 0], np.float32)
    filled = loss(**options)
    for prefix, (found, real) in stacks.items():
        some = np.asarray(real) & (rows["example_mask"] > 0)[:, None]
        total, count = filled[f"{prefix}router_z"][1:]
        assert count == some.sum() and total / count == pytest.approx(float(router_z_loss(found, some)), rel=1e-4)


@pytest.mark.parametrize(
    "backbone, name, corruption",
    [("decoder_only", "next_token", "next_token"), ("encoder_decoder", "denoising", "span_corruption")],
)
def test_mixtures_of_experts_give_the_terms_of_their_routers(dataset, backbone, name, corruption):
    model = model_lib.build(config(backbone, num_experts=3, gated=True))
    loss_fn = objectives.build({"name": name, "router_balance": 0.1}, model)
    params = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))["params"]
    rows = batch(dataset, corruption)
    terms, _ = jax.eval_shape(lambda params: loss_fn(params, {}, rows, jax.random.key(0), train=True), params)
    encoder = {"encoder_router_balance"} if backbone == "encoder_decoder" else set()
    assert set(terms) == {"text", "router_balance"} | encoder


def test_rows_without_a_label_do_not_count():
    draw = np.random.default_rng(0)
    logits, classes = draw.normal(size=(4, 5, 11)).astype(np.float32), draw.normal(size=(4, 3)).astype(np.float32)
    model = stand_in("encoder_only", jnp.asarray(logits), {"label": {"logits": jnp.asarray(classes)}})
    rows = {
        "targets": draw.integers(0, 11, (4, 5)),
        "loss_mask": np.ones((4, 5), np.float32),
        "label": np.array([2, -1, 0, 1], np.int32),
        "example_mask": np.array([1, 1, 1, 0], np.float32),
    }
    run = lambda **cfg: jax.jit(lambda: objectives.build(cfg, model)({}, {}, rows, jax.random.key(0), train=False))()
    log_p = np.asarray(jax.nn.log_softmax(classes))
    for cfg, weight in (({"name": "masked", "label": 0.5}, 0.5), ({"name": "classification"}, 1.0)):
        terms, aux = run(**cfg)
        assert terms["label"][0] == weight and terms["label"][2] == aux.metrics["label_accuracy"][1] == 2
        assert terms["label"][1] == pytest.approx(-log_p[0, 2] - log_p[2, 0], rel=1e-4)
    assert set(run(name="masked", label=0.0)[0]) == {"text"}  # whoever does not want the labels leaves them
    smoothed, _ = run(name="classification", label_smoothing=0.1)
    expected = 0.9 * (-log_p[0, 2] - log_p[2, 0]) - 0.1 * (log_p[0].mean() + log_p[2].mean())
    assert smoothed["label"][1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "backbone, objective, corruption, words",
    [
        ("encoder_only", "next_token", "", "causal backbone"),
        ("decoder_only", "masked", "", "sees both sides"),
        ("decoder_only", "denoising", "", "encoder_decoder, not decoder_only"),
        ("decoder_only", "classification", "", "model.decoders.label"),
        ("encoder_decoder", "denoising", "masked", "decoder_tokens.*span_corruption or text_infilling"),
        ("encoder_decoder", "next_token", "next_token", "decoder_tokens"),
        ("two_stream", "permutation", "masked", "needs order.*permutation"),
        ("encoder_only", "masked", "sentence_pairs", "sentence pairs.*model.decoders.label"),
        ("decoder_only", {"name": "next_token", "label_smoothing": 1.0}, "", "label_smoothing=1.0"),
        ("decoder_only", {"name": "next_token", "router_z": 0.1}, "", "num_experts"),
    ],
)
def test_what_does_not_fit_is_told(dataset, backbone, objective, corruption, words):
    model = model_lib.build(config(backbone))
    with pytest.raises(UserError, match=words):
        loss_fn = objectives.build(objective if isinstance(objective, dict) else {"name": objective}, model)
        rows = batch(dataset, corruption)
        params = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), T))["params"]
        jax.eval_shape(lambda params: loss_fn(params, {}, rows, jax.random.key(0), train=True), params)


# ------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize(
    "corruption, objective",
    [
        ("sentence_pairs", "masked"),
        ("sentence_pairs", "classification"),
        ("span_corruption", "denoising"),
        ("blank_infilling", "next_token"),
        ("permutation", "permutation"),
    ],
)
def test_one_batch_can_be_learnt_by_heart(dataset, corruption, objective):
    """The rest: tests/objectives/test_training.py."""
    c = config(USES[corruption][0], label=corruption == "sentence_pairs")
    if objective == "classification":
        del c["decoders"]["text"]
    model = model_lib.build(c)
    loss_fn = objectives.build({"name": objective}, model)
    steps, rows = 80, batch(dataset, corruption)
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 2e-2, 10, steps))
    params = some_values(model, 0.2)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), variables={}, ema={},
                       rng=jax.random.key(1))  # fmt: skip
    run = step.make_train_step(loss_fn, tx, lambda step: 0.0)
    _, measured = jax.jit(lambda state: jax.lax.scan(lambda s, _: run(s, rows), state, length=steps))(state)
    first, last = (metrics.finalize({k: (x[i], n[i]) for k, (x, n) in measured.items()}) for i in (0, -1))
    assert last["loss"] < 0.1 * first["loss"]
    accuracies = [value for name, value in last.items() if name.endswith("accuracy")]
    assert accuracies and min(accuracies) == 1
