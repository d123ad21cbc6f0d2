"""Discriminators: raw items -> logits of being real, for adversarial training of decoders.

A discriminator is called as `discriminator(items float[B, *item_shape], train=...) -> (logits float[B, ...], out)`: one
logit, or one for each patch. It takes items of any size that its fields allow. All fields have defaults. Real and
generated items come in calls of their own.
"""

from vfm.discriminators.patchgan import PatchGAN

DISCRIMINATORS = {"patchgan": PatchGAN}
