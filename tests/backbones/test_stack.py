"""Fields of the shared stack that no published family shows alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.backbones import DecoderOnly
from vfm.backbones.encoder_decoder import BART, T5
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
