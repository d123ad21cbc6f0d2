"""Fusion encoder by cross-attention: one modality asks, the other answers."""

import jax
import jax.numpy as jnp

from vfm.backbones.encoder_only import EncoderOnly


class CrossEncoder(EncoderOnly):
    """Bidirectional Transformer over a main sequence, with cross-attention to an auxiliary one (survey section 1.3).

    x: float[B, S, D], the auxiliary modality, and decoder_x: float[B, T, D], the main one -> (float[B, T, D], out) of
    the main one: every block attends to its own sequence, then to the auxiliary one (as in LXMERT, Tan and Bansal 2019,
    and ALBEF, Li et al. 2021). A row whose auxiliary sequence is masked whole passes by the cross-attention: its output
    is that of `EncoderOnly` with the same parameters.
    out["encoder"]["output"]: float[B, S, D], the context; the rest of `out` is as in `DecoderOnly`.

    Fields: those of `EncoderOnly`; encoder_depth: blocks that the auxiliary sequence goes through first. 0: it is the
    context as it is, without positions, as its own encoder gave it.

    Args of the call: as in `EncoderDecoder`, with the same names: decoder_x None: the main sequence is `x` as well;
    input_mask, segment_ids, positions of the auxiliary sequence; decoder_mask, … of the main one. There is no cache.
    """

    encoder_depth: int = 0

    def setup(self):
        fields = self.stack_fields()
        if self.encoder_depth:
            self.encoder = EncoderOnly(**{**fields, "depth": self.encoder_depth})
        self.decoder = EncoderOnly(**{**fields, "cross": True})

    def __call__(
        self,
        x: jax.Array,
        *,
        decoder_x=None,
        input_mask=None,
        segment_ids=None,
        positions=None,
        decoder_mask=None,
        decoder_segment_ids=None,
        decoder_positions=None,
        train: bool,
    ):
        input_mask = jnp.ones(x.shape[:2], bool) if input_mask is None else input_mask
        if decoder_x is None:
            decoder_x, decoder_mask, decoder_segment_ids, decoder_positions = x, input_mask, segment_ids, positions
        context, encoder_out = x, {}
        if self.encoder_depth:
            context, encoder_out = self.encoder(
                x, input_mask=input_mask, segment_ids=segment_ids, positions=positions, train=train
            )
        y, out = self.decoder(
            decoder_x,
            input_mask=decoder_mask,
            segment_ids=decoder_segment_ids,
            positions=decoder_positions,
            context=context,
            context_mask=input_mask,
            context_segments=segment_ids if decoder_segment_ids is not None else None,
            train=train,
        )
        return y, {**out, "encoder": {**encoder_out, "output": context}}
