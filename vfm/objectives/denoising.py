"""Denoising from sequence to sequence."""

from vfm.errors import UserError
from vfm.objectives import LossFn
from vfm.objectives.next_token import predict_tokens


def denoising(
    model, *, z_loss: float = 0.0, label_smoothing: float = 0.0, router_balance: float = 0.0, router_z: float = 0.0
) -> LossFn:
    """-log p(target | corrupted text) of the decoder's tokens, mean over `loss_mask`, for an encoder–decoder.

    T5 with data.corruption `span_corruption` (Raffel et al. 2020), BART with `text_infilling` (Lewis et al. 2020); the
    same loss is that of translation and of any other pair of sequences. Terms and weights: as `next_token`.
    """
    if model.backbone.kind != "encoder_decoder":
        raise UserError(f"config.objective: denoising needs a backbone encoder_decoder, not {model.backbone.kind}")
    return predict_tokens(model, "denoising", z_loss, label_smoothing, router_balance, router_z)
