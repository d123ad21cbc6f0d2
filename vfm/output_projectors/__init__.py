"""Output projectors OP_{C->X}: the centre's features -> features of modality X.

The backbone's hidden states at the signal slots of X (learned inputs that `VFM` owns, `signals_X`) go in; features for
the decoder of X come out. A projector declares `width` (what it gives), `in_width` (None takes any), `num_tokens`
(features it gives; None gives one per slot), and, if the number of slots is its own choice, `num_signals`.

A map of single features is the same in both directions, so `linear` and `mlp` are the input projectors' classes.
"""

from vfm.input_projectors import Linear, MLPProjector
from vfm.output_projectors.query import Query

OUTPUT_PROJECTORS = {"linear": Linear, "mlp": MLPProjector, "query": Query}
