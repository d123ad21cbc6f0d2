"""Backbones BC ("backbone calculators"): features of the centre -> features of the centre.

A backbone declares `width` and is called as `backbone(x [B, T, D], input_mask=, segment_ids=, positions=, cache=,
train=) -> (float[B, T, D], out)`. All fields have defaults.
"""

from vfm.backbones.decoder_only import DecoderOnly

BACKBONES = {"decoder_only": DecoderOnly}
