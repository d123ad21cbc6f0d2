"""Modality decoders MD: features of one modality -> its raw data.

A decoder declares `in_width` and `num_tokens` (the features that it takes; None takes any) and `item_shape` (the raw
item that it gives; None for text logits), and is called as `decoder(features [B, P, W], train=...) -> (item, out)`. One
with `whole_sequence` reads the backbone's features of the whole row, and takes `input_mask`. All fields have defaults.

A generative decoder (`generative = True`; survey figure 7a) draws items under a condition float[B, P, W], or under none
(None), and is called as `decoder(condition, items=None, *, train) -> (None, out)`. With the true items float[B,
*item_shape] out["losses"] holds the terms of its training loss, {name: float[B]}, with draws from the rng "noise".
`decoder.sample(condition, *, rng, batch_size=None, **settings)` gives items, float[B, *item_shape], in one program;
batch_size: of a draw without condition.
"""

from vfm.decoders.autoencoder import ConvDecoder
from vfm.decoders.classifier import Classifier
from vfm.decoders.diffusion import Diffusion
from vfm.decoders.latent import LatentDecoder, MLPDecoder
from vfm.decoders.text import TextDecoder
from vfm.decoders.var import VAR

DECODERS = {
    "text": TextDecoder,
    "autoencoder": ConvDecoder,
    "classifier": Classifier,
    "diffusion": Diffusion,
    "latent": LatentDecoder,
    "mlp": MLPDecoder,
    "var": VAR,
}
