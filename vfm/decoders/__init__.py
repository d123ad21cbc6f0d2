"""Modality decoders MD: features of one modality -> its raw data.

A decoder declares `in_width` and `num_tokens` (the features that it takes; None takes any) and `item_shape` (the raw
item that it gives; None for text logits), and is called as `decoder(features [B, P, W], train=...) -> (item, out)`. One
with `whole_sequence` reads the backbone's features of the whole row, and takes `input_mask`. All fields have defaults.
"""

from vfm.decoders.autoencoder import ConvDecoder
from vfm.decoders.classifier import Classifier
from vfm.decoders.text import TextDecoder

DECODERS = {"text": TextDecoder, "autoencoder": ConvDecoder, "classifier": Classifier}
