"""Discriminators: raw items -> logits of being real, for adversarial training of decoders.

A discriminator is called as `discriminator(items float[B, *item_shape], train=...) -> (logits float[B, ...], out)`. All
fields have defaults.
"""

DISCRIMINATORS: dict[str, type] = {}
