"""Permutation language modelling."""

from vfm.objectives import Aux, LossFn
from vfm.objectives.next_token import apply, check_batch, check_text, cross_entropy


def permutation(model) -> LossFn:
    """-log p(x_t | the tokens before t in a random order), mean over `loss_mask` (XLNet, Yang et al. 2019, eq. 5).

    For the backbone `two_stream` and data.corruption `permutation`. Term: text, in nats.
    """
    check_text(model, "permutation")

    def loss_fn(params, variables, batch, rng, *, train: bool):
        check_batch(batch, "order", "permutation", "permutation")
        logits, _, variables = apply(model, params, variables, batch, rng, train=train)
        nll, accuracy = cross_entropy(logits, batch)
        return {"text": (1.0, *nll)}, Aux({"token_accuracy": accuracy}, variables)

    return loss_fn
