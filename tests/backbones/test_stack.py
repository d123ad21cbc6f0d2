"""Fields of the shared stack that no published family shows alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.backbones import DecoderOnly, EncoderDecoder, EncoderOnly
from vfm.backbones.encoder_decoder import BART, T5
from vfm.errors import UserError
from vfm.model import build

V, D, T = 11, 8, 6
SMALL = {"width": D, "depth": 2, "num_heads": 2, "mlp_dim": 12, "max_len": 16}


@pytest.mark.parametrize("preset", [T5, BART], ids=["t5", "bart"])
def test_an_encoder_decoder_that_reads_one_sequence_sees_no_padding(preset):
    """Without decoder_tokens (labels of whole texts) the decoder reads the encoder's sequence."""
    model = build(
        {
            "centre": "text",
            "encoders": {"text": {"name": "text", "vocab_size": V, "width": D}},
            "backbone": {"name": "encoder_decoder", **preset, **SMALL},
            "decoders": {"label": {"name": "classifier", "num_classes": 3, "pooling": "last"}},
        }
    )
    tokens = jnp.asarray([[3, 4, 5, 6, 0, 0]])
    mask = tokens > 0
    variables = jax.jit(lambda key: model.init(key, tokens, input_mask=mask, train=False))(jax.random.key(0))
    run = jax.jit(lambda tokens, mask: model.apply(variables, tokens, input_mask=mask, train=False))
    logits, out = run(tokens, mask)
    expected, expected_out = run(tokens[:, :4], mask[:, :4])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(out["output"][:, :4], expected_out["output"], atol=1e-5)
    left = jnp.roll(tokens, 2, axis=1)
    np.testing.assert_allclose(run(left, left > 0)[0], expected, atol=1e-5)


def test_the_local_theta_is_that_of_all_layers_when_all_are_local():
    x = jax.random.normal(jax.random.key(0), (1, T, D))

    def output(**fields):
        model = DecoderOnly(**SMALL, positions="rope", window=3, **fields)
        run = lambda key: model.apply(model.init(key, x, train=False), x, train=False)[0]
        return jax.jit(run)(jax.random.key(1))

    np.testing.assert_array_equal(output(rope_theta=7.0), output(local_rope_theta=7.0, local_layers=(True,)))
    mixed = output(local_rope_theta=7.0, local_layers=(True, False))
    assert jnp.abs(mixed - output(rope_theta=7.0, local_layers=(True, False))).max() > 1e-3


def test_alibi_is_by_distance_on_both_sides():
    """An encoder reads a sequence from right to left as from left to right: its output is turned round with it."""
    model = EncoderOnly(**SMALL, positions="alibi")
    x = jax.random.normal(jax.random.key(0), (1, T, D))
    run = jax.jit(lambda x: model.apply(model.init(jax.random.key(1), x, train=False), x, train=False)[0])
    np.testing.assert_allclose(run(x[:, ::-1]), run(x)[:, ::-1], atol=1e-5)
    # Of equal keys the own one and its neighbours count most: a change far off is seen less than one nearby.
    flat = jnp.ones((1, T, D))
    moved = lambda at: jnp.abs(run(flat.at[0, at, 0].add(0.1)) - run(flat))[0, 0].max()
    assert moved(1) > moved(T - 1)


@pytest.mark.parametrize("arrangement", ["parallel", "parallel_one_norm"])
def test_cross_attention_has_no_place_in_a_parallel_block(arrangement):
    model = EncoderDecoder(**SMALL, arrangement=arrangement)
    x = jnp.zeros((1, T, D))
    with pytest.raises(UserError, match=f"arrangement='{arrangement}' has no place for cross-attention"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), x, decoder_x=x, train=False))
