"""Input projectors IP_{X->C}: features of modality X -> features of the centre.

A projector declares `width` (what it gives; the backbone's width), `in_width` (what it takes; None takes any) and
`num_tokens` (features it gives per item; None gives as many as it takes). All fields have defaults.
"""

from vfm.input_projectors.linear import Linear
from vfm.input_projectors.mlp import MLPProjector
from vfm.input_projectors.resampler import QFormer, Resampler

INPUT_PROJECTORS = {"linear": Linear, "mlp": MLPProjector, "resampler": Resampler, "qformer": QFormer}
