"""Encoder-only backbone: every token sees every other."""

import flax.linen as nn
import jax

from vfm.backbones.stack import StackFields

# Devlin et al. 2019; for configs: {**BERT, "width": 256, ...}.
BERT = dict(
    norm="layernorm",
    norm_epsilon=1e-12,
    norm_position="post",
    positions="learned",
    embedding_norm=True,
    num_token_types=2,
    activation="gelu",
    gated=False,
    use_bias=True,
)


class EncoderOnly(StackFields):
    """Bidirectional Transformer, by default in the style of BERT (Devlin et al. 2019).

    x: float[B, T, D] -> (float[B, T, D], out), `out` as in `DecoderOnly`. Fields: `StackFields`. Args of the call:
    input_mask: bool[B, T], segment_ids, positions, token_types: int32[B, T], as in `DecoderOnly`, and context,
    context_mask, context_segments, for cross-attention. There is no cache: a new token changes the features of all.
    """

    norm_epsilon: float = 1e-12
    norm_position: str = "post"
    positions: str = "learned"
    embedding_norm: bool = True
    num_token_types: int = 0
    activation: str = "gelu"

    kind = "encoder_only"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        input_mask=None,
        segment_ids=None,
        positions=None,
        token_types=None,
        context=None,
        context_mask=None,
        context_segments=None,
        train: bool,
    ):
        return self.run(
            x,
            causal=False,
            input_mask=input_mask,
            segment_ids=segment_ids,
            positions=positions,
            token_types=token_types,
            context=context,
            context_mask=context_mask,
            context_segments=context_segments,
            train=train,
        )
