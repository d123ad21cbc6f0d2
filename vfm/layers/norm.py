"""Normalisation by name. Statistics are taken in fp32 whatever the compute dtype (Linen does this)."""

import flax.linen as nn

from vfm.errors import unknown

NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def make_norm(kind: str, *, epsilon: float, use_bias: bool, dtype, name: str) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019); float[..., D] -> float[..., D].

    `use_bias` is for LayerNorm; RMSNorm has no bias. An unknown kind raises `UserError`.
    """
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    if kind == "rmsnorm":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)
    return nn.LayerNorm(epsilon=epsilon, use_bias=use_bias, dtype=dtype, name=name)
