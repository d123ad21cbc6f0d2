"""Encoder–decoder backbone: a bidirectional stack reads, a causal one with cross-attention writes."""

from typing import Any

import jax
import jax.numpy as jnp

from vfm.backbones.decoder_only import DecoderOnly
from vfm.backbones.encoder_only import BERT, EncoderOnly
from vfm.backbones.stack import StackFields
from vfm.errors import UserError

# Field values of the styles, for configs: {**T5, "width": 256, ...}. Raffel et al. 2020; T5 1.1 gates its MLP.
T5 = dict(
    norm="rmsnorm",
    norm_epsilon=1e-6,
    positions="relative",
    attention_scale=1.0,
    activation="relu",
    gated=False,
    use_bias=False,
)
T5_GATED = {**T5, "activation": "gelu_tanh", "gated": True}
# Lewis et al. 2020.
BART = {**BERT, "norm_epsilon": 1e-5, "num_token_types": 0}


class EncoderDecoder(StackFields):
    """Encoder–decoder Transformer (Vaswani et al. 2017), by default in the style of T5 (Raffel et al. 2020).

    x: float[B, S, D], which the encoder reads, and decoder_x: float[B, T, D] -> (float[B, T, D], out) of the decoder.
    out["encoder"] has "output" float[B, S, D], "input" and "layers"; the rest of `out` is the decoder's, as in
    `DecoderOnly`. Fields: `StackFields`; decoder_depth, decoder_num_heads, decoder_mlp_dim: None: as the encoder;
    encode: False: there is no encoder, and the decoder attends to `x` as it is. So in Whisper, whose encoder is that of
    the modality.

    Args of the call:
      decoder_x: None: the decoder reads `x` as well, as BART does to classify (Lewis et al. 2020, section 3.1).
      input_mask, segment_ids, positions: of the encoder, as in `DecoderOnly`; decoder_mask, decoder_segment_ids,
        decoder_positions: of the decoder.
      cache: as in `DecoderOnly`, for the decoder. A call with `x` writes keys and values of the encoder's output into
        it; later calls leave `x` out (None).
    """

    positions: str = "relative"
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-6
    activation: str = "relu"
    use_bias: bool = False
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    decoder_mlp_dim: int | None = None
    encode: bool = True

    kind = "encoder_decoder"

    def setup(self):
        if self.encode:
            self.encoder = EncoderOnly(**self.stack_fields())
        self.decoder = DecoderOnly(**self._decoder_fields())

    def _decoder_fields(self) -> dict[str, Any]:
        return {
            **self.stack_fields(),
            "depth": self.decoder_depth or self.depth,
            "num_heads": self.decoder_num_heads or self.num_heads,
            "mlp_dim": self.decoder_mlp_dim or self.mlp_dim,
            "cross": True,
        }

    def __call__(
        self,
        x: jax.Array | None,
        *,
        decoder_x=None,
        input_mask=None,
        segment_ids=None,
        positions=None,
        decoder_mask=None,
        decoder_segment_ids=None,
        decoder_positions=None,
        cache=None,
        train: bool,
    ):
        encoder_out, context = {}, None
        if x is not None:
            input_mask = jnp.ones(x.shape[:2], bool) if input_mask is None else input_mask
            context = x
            if self.encode:
                context, encoder_out = self.encoder(
                    x, input_mask=input_mask, segment_ids=segment_ids, positions=positions, train=train
                )
            encoder_out["output"] = context
            if decoder_x is None:
                decoder_x, decoder_mask, decoder_positions = x, input_mask, positions
                decoder_segment_ids = segment_ids
        elif cache is None:
            raise UserError("EncoderDecoder: a call without features for the encoder needs a cache")
        y, out = self.decoder(
            decoder_x,
            input_mask=decoder_mask,
            segment_ids=decoder_segment_ids,
            positions=decoder_positions,
            context=context,
            context_mask=input_mask if x is not None else None,
            context_segments=segment_ids if decoder_segment_ids is not None else None,
            cache=cache,
            train=train,
        )
        return y, {**out, "encoder": encoder_out}

    def init_cache(self, batch_size: int, length: int, context_length: int) -> dict[str, jax.Array]:
        """An empty cache for `length` tokens of the decoder and `context_length` of the encoder."""
        # `self.decoder` is only there within a call of the model.
        return DecoderOnly(**self._decoder_fields(), parent=None).init_cache(batch_size, length, context_length)
