"""Backbones BC ("backbone calculators"): features of the centre -> features of the centre.

A backbone declares `width` and is called as `backbone(x [B, T, D], input_mask=, segment_ids=, positions=, cache=,
train=) -> (float[B, T, D], out)`. `kind` is "encoder_only", "decoder_only" or "encoder_decoder": what the survey's
table 3 tells apart, and what decides how the model generates. All fields have defaults.
"""

from vfm.backbones.cross_encoder import CrossEncoder
from vfm.backbones.decoder_only import DecoderOnly
from vfm.backbones.encoder_decoder import EncoderDecoder
from vfm.backbones.encoder_only import EncoderOnly
from vfm.backbones.two_stream import TwoStream

BACKBONES = {
    "cross_encoder": CrossEncoder,
    "decoder_only": DecoderOnly,
    "encoder_decoder": EncoderDecoder,
    "encoder_only": EncoderOnly,
    "two_stream": TwoStream,
}
