"""Next-scale prediction: what each code depends on, and the cached walk against the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from vfm import tree
from vfm.decoders.var import VAR
from vfm.errors import UserError

SCALES, K, B = (1, 2, 4), 8, 3
LENGTHS = tuple(s * s for s in SCALES)
LEVELS = np.repeat(np.arange(len(SCALES)), LENGTHS)
LATENT = FrozenDict(
    {
        "encoder": {
            "name": "latent", "widths": (4, 4), "groups": 2, "mid_attention": False,
            "bottleneck": {"name": "multiscale_vq", "scales": SCALES, "codebook_size": K, "codebook_init": "normal"},
        },
        "decoder": {"name": "latent", "widths": (4, 4), "groups": 2, "mid_attention": False},
    }
)  # fmt: skip
FIELDS = dict(width=16, depth=2, num_heads=2, mlp_dim=16, latent=LATENT)
CONDITION = jax.random.normal(jax.random.key(1), (B, 2, 6))
IMAGES = jax.random.uniform(jax.random.key(2), (B, 8, 8, 1))
CODES = jax.random.randint(jax.random.key(3), (B, sum(LENGTHS)), 0, K)
every_conditioning = pytest.mark.parametrize(
    "conditioning", ["adaln", pytest.param("in_context", marks=pytest.mark.slow)]
)


@functools.cache
def built(conditioning="adaln"):
    """A model whose parameters are all random: initial modulation is zero, and hides faults."""
    model = VAR(**FIELDS, conditioning=conditioning)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), CONDITION, IMAGES, train=False))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype)
    return model, jax.tree.map(draw, shapes)


@every_conditioning
def test_the_cached_walk_gives_the_logits_of_the_whole_sequence(conditioning):
    model, variables = built(conditioning)
    whole = jax.jit(lambda v: model.apply(v, CONDITION, CODES, train=False, method="logits"))(variables)
    parts = np.split(np.asarray(CODES), np.cumsum(LENGTHS)[:-1], axis=1)
    walk = lambda v: model.apply(v, CONDITION, B, lambda scale, _: parts[scale], method="walk")
    codes, cached = jax.jit(walk)(variables)
    np.testing.assert_array_equal(codes, CODES)
    assert whole.shape == (B, sum(LENGTHS), K) and float(jnp.abs(whole).max()) > 0.5
    np.testing.assert_allclose(cached, whole, atol=1e-5)


def test_a_place_sees_its_own_scale_and_the_coarser_ones():
    """By gradient: on which inputs, and so on which scales' codes, the logits of each place depend."""
    model, variables = built()
    inputs = jax.random.normal(jax.random.key(4), (1, sum(LENGTHS[1:]), 4))
    read = lambda x, v: model.apply(v, CONDITION[:1], x, train=False, method="read")[0].sum(axis=-1)
    jacobian = jax.jit(jax.jacrev(read))(inputs, variables)  # [L, 1, L - P_1, W]
    depends = np.abs(np.asarray(jacobian)).sum(axis=(1, 3)) > 1e-7
    scale_of = lambda place: next(s for s in range(len(SCALES)) if place < sum(LENGTHS[: s + 1]))
    for place in range(sum(LENGTHS)):
        for read in range(LENGTHS[0], sum(LENGTHS)):
            assert depends[place, read - LENGTHS[0]] == (scale_of(read) <= scale_of(place)), (place, read)


def test_codes_of_a_scale_change_the_logits_of_finer_scales_alone():
    model, variables = built()
    run = jax.jit(lambda codes: model.apply(variables, CONDITION, codes, train=False, method="logits"))
    before, begins = run(CODES), np.cumsum((0, *LENGTHS))
    for begin, end in zip(begins, begins[1:]):
        moved = run(CODES.at[:, begin:end].set((CODES[:, begin:end] + 3) % K)) - before
        np.testing.assert_array_equal(moved[:, :end], 0)
        assert end == begins[-1] or (jnp.abs(moved[:, end:]).max(axis=-1) > 1e-4).all()


def losses(model, variables, train, key=0):
    rngs = {"noise": jax.random.key(key)}
    return model.apply(variables, CONDITION, IMAGES, train=train, rngs=rngs)[1]


def test_the_loss_is_the_mean_over_the_codes_of_the_first_stage():
    model, variables = built()

    @jax.jit
    def by_hand(v):
        out = model.apply(v, IMAGES, train=False, method=lambda m, x, train: m.latent_encoder(x, train=train)[1])
        logits = model.apply(v, CONDITION, out["codes"], train=False, method="logits")
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), out["codes"][..., None], axis=-1)[..., 0]

    out, nll = jax.jit(lambda v: losses(model, v, False))(variables), np.asarray(by_hand(variables))
    np.testing.assert_allclose(out["losses"]["codes"], nll.mean(axis=1), rtol=1e-5)
    begins = np.cumsum((0, *LENGTHS))
    expected = np.stack([nll[:, a:b].mean(axis=1) for a, b in zip(begins, begins[1:])], axis=1)
    np.testing.assert_allclose(out["scales"], expected, rtol=1e-5)


def test_no_gradient_reaches_the_first_stage_and_the_condition_is_dropped_at_its_rate():
    model, variables = built()
    gradient = jax.jit(jax.grad(lambda p, v: losses(model, {**v, "params": p}, False)["losses"]["codes"].sum()))
    found = tree.flatten(gradient(variables["params"], variables))
    still = {path for path, leaf in found.items() if not np.abs(leaf).any()}
    first = {path for path in found if path.startswith("latent_")}
    assert first and still - first == {"unconditional/null_condition"} and first <= still
    always = VAR(**FIELDS, condition_dropout=0.999999)
    run = jax.jit(lambda c: always.apply(variables, c, IMAGES, train=True, rngs={"noise": jax.random.key(0)})[1])
    np.testing.assert_array_equal(run(CONDITION)["scales"], run(CONDITION + 1)["scales"])


def sample(model, variables, **settings):
    draw = lambda v, c: model.apply(v, c, rng=jax.random.key(7), method="sample", **settings)
    return jax.jit(draw)(variables, CONDITION)


def test_guidance_rises_with_the_scale_from_the_conditional_model():
    model, variables = built()
    guided = sample(model, variables, guidance=3.0, temperature=0.0)
    assert guided.shape == (B, *model.item_shape) and bool(jnp.isfinite(guided).all())

    @jax.jit
    def by_hand(v):
        """Scale by scale with whole sequences: logits u + s (c - u), and the best codes."""
        null = jnp.broadcast_to(v["params"]["unconditional"]["null_condition"][None], CONDITION.shape)
        codes, begins = jnp.zeros_like(CODES), np.cumsum((0, *LENGTHS))
        for scale, (a, b) in enumerate(zip(begins, begins[1:])):
            of = [model.apply(v, c, codes, train=False, method="logits")[:, a:b] for c in (CONDITION, null)]
            strength = 1 + 2.0 * scale / (len(SCALES) - 1)
            codes = codes.at[:, a:b].set(jnp.argmax(of[1] + strength * (of[0] - of[1]), axis=-1))
        decode = lambda m, codes: m.latent_decoder(m.latent_encoder.quantizer.decode(codes), train=False)[0]
        return model.apply(v, codes, method=decode)

    np.testing.assert_allclose(guided, by_hand(variables), atol=1e-4)
    plain = sample(model, variables, temperature=0.0)
    assert float(jnp.abs(plain - guided).max()) > 1e-2
    np.testing.assert_array_equal(sample(model, variables, guidance=1, temperature=0.0), plain)


@pytest.mark.slow
def test_one_batch_is_learned_and_drawn_again():
    model, variables = built()
    params = {**variables["params"], **model.init(jax.random.key(5), CONDITION, IMAGES, train=False)["params"]}
    params |= {name: variables["params"][name] for name in ("latent_encoder", "latent_decoder")}
    rest = {name: value for name, value in variables.items() if name != "params"}
    frozen = optax.masked(optax.set_to_zero(), {name: name.startswith("latent_") for name in params})
    tx = optax.chain(optax.adam(1e-2), frozen)

    @jax.jit
    def step(params, state):
        loss = lambda p: losses(model, {**rest, "params": p}, False)["losses"]["codes"].mean()
        value, gradient = jax.value_and_grad(loss)(params)
        moved, state = tx.update(gradient, state)
        return optax.apply_updates(params, moved), state, value

    state, first = tx.init(params), None
    for _ in range(150):
        params, state, value = step(params, state)
        first = value if first is None else first
    assert float(first) > 1.5 and float(value) < 0.05
    found = sample(model, {**rest, "params": params}, temperature=0.0)
    through = lambda m, x: m.latent_decoder(m.latent_encoder(x, train=False)[0], train=False)[0]
    expected = jax.jit(lambda v: model.apply(v, IMAGES, method=through))({**rest, "params": params})
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"conditioning": "cross"}, ("unknown conditioning 'cross'", "in_context")),
        ({"condition_dropout": 1.0}, ("condition_dropout=1.0",)),
        ({"latent": FrozenDict({"encoder": LATENT["encoder"]})}, ("latent needs the field 'decoder'",)),
        (
            {"latent": LATENT.copy({"encoder": {"name": "latent", "bottleneck": {"name": "vq"}}})},
            ("pyramid", "multiscale_vq", "'vq'"),
        ),
        (
            {"latent": LATENT.copy({"encoder": LATENT["encoder"].copy({"channels": 3})})},
            ("(8, 8, 3)", "(8, 8, 1)"),
        ),
    ],
    ids=["conditioning", "dropout", "half", "bottleneck", "shape"],
)
def test_fields_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda: VAR(**{**FIELDS, **fields}).init(jax.random.key(0), CONDITION, train=False))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_guidance_needs_a_null_condition():
    model, variables = VAR(**FIELDS, condition_dropout=0.0), built()[1]
    with pytest.raises(UserError, match="condition_dropout > 0"):
        model.apply(variables, CONDITION, rng=jax.random.key(0), guidance=2.0, method="sample")
