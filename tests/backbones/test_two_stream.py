"""XLNet's two streams: parity, factorisation orders, and what each stream may see."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import tree
from vfm.backbones import two_stream
from vfm.backbones.two_stream import TwoStream, permutation_masks
from vfm.data.corruption import permutation_order
from vfm.errors import UserError

B, T, D = 3, 7, 16
BLOCK = TwoStream(width=D, depth=2, num_heads=4, mlp_dim=24, relative_token_types=True)


def some_values(block, seed=5):
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.zeros((1, 2, block.width)), train=False))
    rng = np.random.default_rng(seed)
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.3, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, tree.paths(shapes["params"]), shapes["params"])


def features(seed=0, shape=(B, T, D)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def orders(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(shape[1]) for _ in range(shape[0])]).astype(np.int32)


@pytest.fixture(scope="module")
def built():
    params = some_values(BLOCK)
    return params, jax.jit(lambda x, **rest: BLOCK.apply({"params": params}, x, **rest, train=False))


def test_shift_puts_each_distance_in_its_place():
    for T in (1, 2, 5):
        distances = np.arange(T - 1, -T, -1.0)
        x = jnp.asarray(np.broadcast_to(distances, (2, T, 2 * T - 1)) + 100 * np.arange(T)[None, :, None])
        expected = [[t - s + 100 * t for s in range(T)] for t in range(T)]
        np.testing.assert_array_equal(two_stream.shift(x)[1], expected)


def test_masks_equal_a_construction_by_hand():
    """Token by token from the list of what is known when a token is predicted."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        order = permutation_order(rng.random(9) < 0.8, rng, predict=rng.choice([0.2, 0.5, 1.0]))
        content, query = (np.asarray(mask)[0, 0] for mask in permutation_masks(jnp.asarray(order[None])))
        context = [t for t in range(9) if order[t] == 0]
        known = list(context)
        for target in sorted(set(range(9)) - set(context), key=lambda t: order[t]):
            assert np.flatnonzero(query[target]).tolist() == sorted(known)
            known.append(target)
            assert np.flatnonzero(content[target]).tolist() == sorted(known)
        for t in context:
            assert np.flatnonzero(content[t]).tolist() == sorted(context) and not query[t].any()


def test_no_stream_sees_what_it_must_not(built):
    """By gradient: each token moves with exactly the tokens that come before it in its segment."""
    _, run = built
    number, segments = orders(B, T), np.asarray([[1] * T, [1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2]])
    rest = {"order": jnp.asarray(number), "segment_ids": jnp.asarray(segments, jnp.int32)}
    sums = lambda x: [y.sum(axis=(0, 2)) for y in (run(x, **rest)[0], run(x, **rest)[1]["content"])]
    query, content = (np.abs(j).max(axis=-1).transpose(1, 0, 2) > 1e-6 for j in jax.jit(jax.jacrev(sums))(features()))
    same = segments[:, :, None] == segments[:, None, :]
    np.testing.assert_array_equal(query, same & (number[:, None, :] < number[:, :, None]))
    np.testing.assert_array_equal(content, same & (number[:, None, :] <= number[:, :, None]))


def test_without_an_order_every_token_sees_every_other(built):
    _, run = built
    x = features()
    y, out = run(x)
    np.testing.assert_array_equal(y, out["content"])
    np.testing.assert_array_equal(y, out["layers"][-1])
    for s in range(T):
        assert bool((jnp.abs(run(x.at[:, s].add(1.0))[0] - y).max(axis=-1) > 1e-5).all())
    # An order in which all come at once is the same for the content.
    np.testing.assert_allclose(run(x, order=jnp.zeros((B, T), jnp.int32))[1]["content"], y, atol=1e-6)


def probabilities(run, table, tokens, order):
    """log p float[B, T, V] of the query stream, with an embedding table that is also the head."""
    y, _ = run(table[tokens], order=order)
    return jax.nn.log_softmax(y @ table.T / 4, axis=-1)


def test_every_order_gives_a_probability_distribution(built):
    """Over all sequences the exponentials of the sums of log p add up to 1, under every order: a joint."""
    _, run = built
    V, length = 3, 4
    table = features(1, (V, D))
    sequences = np.array(list(itertools.product(range(V), repeat=length)))
    totals = []
    for order in itertools.permutations(range(length)):
        log_p = probabilities(run, table, sequences, jnp.asarray([order] * len(sequences), jnp.int32))
        joint = np.take_along_axis(np.asarray(log_p), sequences[..., None], axis=-1)[..., 0].sum(axis=1)
        totals.append(np.exp(joint))
    np.testing.assert_allclose(np.sum(totals, axis=1), 1, atol=1e-5)
    assert np.ptp(totals, axis=0).max() > 1e-3  # other orders are other factorisations of the model


def test_one_pass_gives_what_prediction_token_by_token_gives(built):
    """The sum of log p of one pass equals that of T passes, each of which knows nothing but what came before."""
    _, run = built
    table, order = features(1, (5, D)), orders(B, T)
    tokens = np.random.default_rng(2).integers(0, 5, (B, T))
    whole = np.asarray(probabilities(run, table, tokens, jnp.asarray(order)))
    for step in range(T):
        at = np.argmax(order == step, axis=1)
        known = np.where(order < step, tokens, 4 - tokens)  # all else is noise
        log_p = np.asarray(probabilities(run, table, known, jnp.asarray(order)))
        rows = np.arange(B)
        np.testing.assert_allclose(log_p[rows, at], whole[rows, at], atol=1e-5)


def test_padding(built):
    _, run = built
    x, order = features(), orders(B, T)
    mask = jnp.asarray([[1, 1, 1, 1, 1, 0, 0]] * B, bool)
    y, _ = run(x, order=jnp.asarray(order), input_mask=mask)
    short, _ = run(x[:, :5], order=jnp.asarray(order[:, :5]))
    np.testing.assert_allclose(y[:, :5], short, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_rematerialisation(built, remat):
    params, _ = built
    block = TwoStream(width=D, depth=2, num_heads=4, mlp_dim=24, relative_token_types=True, remat=remat)
    loss = lambda p: block.apply({"params": p}, features(), order=jnp.asarray(orders(B, T)), train=True)[0].sum()
    assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(params))) == (remat == "full")


def test_what_does_not_fit_is_told():
    x = jnp.zeros((1, 4, 16))
    for fields, call, message in (
        ({"num_heads": 3}, {}, "num_heads=3 does not divide width=16"),
        ({"max_len": 3}, {}, "max_len=3"),
        ({"width": 8}, {}, "width 8, not 16"),
        ({}, {"token_types": jnp.zeros((1, 4), jnp.int32)}, "relative_token_types"),
        ({"remat": "some"}, {}, "unknown remat policy 'some'"),
    ):
        with pytest.raises(UserError, match=message):
            TwoStream(**{"width": 16, **fields}).init(jax.random.key(0), x, **call, train=False)


@pytest.mark.parametrize("types", [pytest.param(False, marks=pytest.mark.slow), True])
def test_equals_transformers(types):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    V, P = 19, 3
    config = transformers.XLNetConfig(
        vocab_size=V, d_model=D, n_layer=3, n_head=4, d_inner=24, ff_activation="gelu", dropout=0.0, use_mems_eval=False
    )
    torch.manual_seed(0)
    model = transformers.XLNetLMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("norm.weight"))
    state = {name: np.asarray(tensor.detach()) for name, tensor in model.state_dict().items()}

    def layers(name, change=lambda x: x):
        return np.stack([change(state[f"transformer.layer.{i}.{name}"]) for i in range(config.n_layer)])

    def norm(name):
        return {"scale": layers(f"{name}.layer_norm.weight"), "bias": layers(f"{name}.layer_norm.bias")}

    def dense(name):
        return {"kernel": layers(f"{name}.weight", np.transpose), "bias": layers(f"{name}.bias")}

    attention = {
        **{ours: {"kernel": layers(f"rel_attn.{theirs}")}
           for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("relative", "r"))},
        "out": {"kernel": layers("rel_attn.o", lambda x: x.transpose(1, 2, 0))},
        "content_bias": layers("rel_attn.r_w_bias"), "position_bias": layers("rel_attn.r_r_bias"),
    }  # fmt: skip
    if types:
        attention |= {"type_bias": layers("rel_attn.r_s_bias"), "type_embedding": layers("rel_attn.seg_embed")}
    stack = {
        "attention": attention,
        "mlp": {"up": dense("ff.layer_1"), "down": dense("ff.layer_2")},
        "norm_attention": norm("rel_attn"),
        "norm_mlp": norm("ff"),
    }
    params = {"query_start": state["transformer.mask_emb"][0, 0], "layers": stack}
    block = TwoStream(width=D, depth=3, num_heads=4, mlp_dim=24, relative_token_types=types)

    rng = np.random.default_rng(0)
    ids, padding = rng.integers(0, V, (B, T)), np.arange(T)[None] < np.array([T, T - 2, T])[:, None]
    order = np.zeros((B, T), np.int32)
    targets = np.stack([rng.choice(T - 2, P, replace=False) for _ in range(B)])
    np.put_along_axis(order, targets, np.stack([1 + rng.permutation(P) for _ in range(B)]), axis=1)
    token_types = (np.arange(T) > 3).astype(np.int64)[None].repeat(B, axis=0)
    # i does not see j, where j is a target and not predicted before i.
    perm_mask = (order[:, None, :] > 0) & (order[:, None, :] >= order[:, :, None])
    rest = {"token_type_ids": torch.tensor(token_types)} if types else {}
    with torch.no_grad():
        expected = model(
            torch.tensor(ids), attention_mask=torch.tensor(padding.astype(np.float32)),
            perm_mask=torch.tensor(perm_mask.astype(np.float32)),
            target_mapping=torch.nn.functional.one_hot(torch.tensor(targets), T).float(), **rest,
        ).logits.numpy()  # fmt: skip
        plain = model(torch.tensor(ids), **rest).logits.numpy()

    table, bias = state["transformer.word_embedding.weight"], state["lm_loss.bias"]
    rest = {"token_types": jnp.asarray(token_types)} if types else {}

    @jax.jit
    def run(params, **rest):
        y, _ = block.apply({"params": params}, jnp.asarray(table)[ids], **rest, train=False)
        return y @ table.T + bias[None, None]

    logits = run(params, order=jnp.asarray(order), input_mask=jnp.asarray(padding), **rest)
    found = np.take_along_axis(np.asarray(logits), targets[..., None], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(run(params, **rest), plain, atol=1e-4, rtol=1e-4)
