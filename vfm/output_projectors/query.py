"""Query output projector: few signal tokens -> the conditioning features of another modality."""

import flax.linen as nn
import jax

from vfm.layers.transformer import Transformer


class Query(nn.Module):
    """Learned queries read the signal tokens' hidden states by cross-attention, float[B, K, D] -> (float[B, P, W],
    out).

    As the output projection of NExT-GPT (Wu et al. 2023) and CoDi-2 (Tang et al. 2023): K = `num_signals` hidden states
    in, P = `num_tokens` features of width W = `width` out. out["layers"]: float[L, B, P, W].
    """

    width: int = 32
    num_tokens: int = 4
    num_signals: int = 2
    depth: int = 1
    num_heads: int = 2
    mlp_dim: int = 64
    in_width: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        context = nn.Dense(self.width, dtype=self.dtype, name="projection")(x)
        queries = self.param("queries", nn.initializers.normal(0.02), (self.num_tokens, self.width))
        q = queries[None].repeat(x.shape[0], axis=0).astype(context.dtype)
        return Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            cross=True,
            dtype=self.dtype,
            name="transformer",
        )(q, context=context, train=train)
