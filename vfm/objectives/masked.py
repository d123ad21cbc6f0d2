"""Masked language modelling."""

from vfm.errors import UserError
from vfm.objectives import Aux, LossFn, Term
from vfm.objectives.classification import check_label, label_cross_entropy
from vfm.objectives.next_token import apply, check_text, cross_entropy


def masked(model, *, label: float = 1.0) -> LossFn:
    """-log p(masked token | all others), mean over the positions of `loss_mask` (Devlin et al. 2019, section 3.1), with
    data.corruption `masked`; with `sentence_pairs` plus -log p(label), mean over the rows, weighted by `label`: is the
    second sentence the next one (NSP, ibid.), or are they in order (SOP, Lan et al. 2020).

    Terms, in nats: text, label.
    """
    check_text(model, "masked")
    if model.backbone.kind == "decoder_only":
        raise UserError("config.objective: masked needs a backbone that sees both sides of a token, not decoder_only")

    def loss_fn(params, variables, batch, rng, *, train: bool):
        logits, out, variables = apply(model, params, variables, batch, rng, train=train)
        nll, accuracy = cross_entropy(logits, batch)
        terms: dict[str, Term] = {"text": (1.0, *nll)}
        measured = {"token_accuracy": accuracy}
        if label and "label" in batch:
            check_label(model, "masked, on sentence pairs,")
            found, measured["label_accuracy"] = label_cross_entropy(out["label"]["logits"], batch)
            terms["label"] = (label, *found)
        return terms, Aux(measured, variables)

    return loss_fn
