"""Objectives: pure loss functions.

`OBJECTIVES[name](model, **fields)` gives

    loss_fn(params, variables, batch, rng, *, train) -> (terms, Aux)

`terms` are the parts of the loss, {name: (weight, sum, count)}; the loss is the sum of weight · sum / count. Sums and
counts, not means, so that the loss is exact under masks, gradient accumulation and many hosts. Counts must not depend
on the parameters. `Aux.metrics` are {name: (sum, count)} as well; `Aux.variables` are the new values of what has no
gradient. A loss function that keeps variables of its own has `variables(params)`, which gives them at the start; one
that is not a sum over the rows of a batch says why in `whole_batch`, and gradient accumulation is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from vfm.data.construct import construct
from vfm.metrics import Metric

Term = tuple[float, jax.Array, jax.Array]


class Aux(NamedTuple):
    """What a loss function returns beside the loss."""

    metrics: Mapping[str, Metric]
    variables: Mapping[str, Any]


LossFn = Callable[..., tuple[Mapping[str, Term], Aux]]

from vfm.objectives.adversarial import adversarial  # noqa: E402
from vfm.objectives.any_to_any import any_to_any  # noqa: E402
from vfm.objectives.classification import classification  # noqa: E402
from vfm.objectives.contrastive import contrastive  # noqa: E402
from vfm.objectives.denoising import denoising  # noqa: E402
from vfm.objectives.fusion import fusion  # noqa: E402
from vfm.objectives.generation import generation  # noqa: E402
from vfm.objectives.masked import masked  # noqa: E402
from vfm.objectives.matching import matching  # noqa: E402
from vfm.objectives.next_token import next_token  # noqa: E402
from vfm.objectives.permutation import permutation  # noqa: E402
from vfm.objectives.reconstruction import reconstruction  # noqa: E402

OBJECTIVES = {
    "adversarial": adversarial,
    "any_to_any": any_to_any,
    "classification": classification,
    "contrastive": contrastive,
    "denoising": denoising,
    "fusion": fusion,
    "generation": generation,
    "masked": masked,
    "matching": matching,
    "next_token": next_token,
    "permutation": permutation,
    "reconstruction": reconstruction,
}


def build(cfg: Mapping[str, Any], model: nn.Module) -> LossFn:
    """The loss function of `config.objective`: {name, **fields}; `UserError` for unknown names and fields."""
    return construct("objective", OBJECTIVES, cfg, model=model)
