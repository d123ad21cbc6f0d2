"""Query output projector: few signal tokens -> the conditioning features of another modality."""

from vfm.input_projectors.resampler import QFormer


class Query(QFormer):
    """Learned queries read the signal tokens' hidden states by cross-attention, float[B, K, D] -> (float[B, P, W],
    out).

    As the output projection of NExT-GPT (Wu et al. 2023) and CoDi-2 (Tang et al. 2023): K = `num_signals` hidden states
    in, P = `num_tokens` features of width W = `width` out. out["layers"]: float[L, B, P, W].
    """

    num_signals: int = 2
