"""Normalisation by name. Statistics are taken in fp32 whatever the compute dtype (Linen does this)."""

import flax.linen as nn

from vfm.errors import unknown

NORMS = ("layernorm", "rmsnorm", "layernorm_fixed")


def make_norm(kind: str, *, epsilon: float, use_bias: bool, dtype, name: str) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019); float[..., D] -> float[..., D].

    `use_bias` is for LayerNorm; RMSNorm has no bias. `layernorm_fixed` is LayerNorm without scale and bias (OLMo,
    Groeneveld et al. 2024). An unknown kind raises `UserError`.
    """
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    if kind == "rmsnorm":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)
    learned = kind == "layernorm"
    return nn.LayerNorm(
        epsilon=epsilon,
        use_bias=use_bias and learned,
        use_scale=learned,
        dtype=dtype,
        # The two-pass variance: E[x²] - E[x]² loses digits where the mean is far from zero.
        use_fast_variance=False,
        name=name,
    )
