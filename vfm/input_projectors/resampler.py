"""Input projectors with a number of tokens of their own: learned queries that read an item's features."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.layers.attention import Attention
from vfm.layers.mlp import MLP
from vfm.layers.norm import make_norm
from vfm.layers.transformer import Transformer
from vfm.sharding import constrain


class LearnedQueries(nn.Module):
    """What the projectors below share: float[B, S, D'] -> (float[B, num_tokens, width], out), whatever S is.

    The features know no order but what the encoder wrote into them. An affine map brings them to the width of the
    queries, which is `width`; or `hidden`, if that is set, and then a last affine map gives `width`. out["layers"]:
    float[L, B, num_tokens, hidden or width], the queries after each block.
    """

    width: int = 32
    num_tokens: int = 4
    depth: int = 1
    num_heads: int = 2
    mlp_dim: int = 64
    hidden: int | None = None
    in_width: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool):
        inner = self.hidden or self.width
        features = nn.Dense(inner, dtype=self.dtype, name="hidden" if self.hidden else "projection")(x)
        queries = self.param("queries", nn.initializers.normal(0.02), (self.num_tokens, inner))
        q = queries[None].repeat(x.shape[0], axis=0).astype(features.dtype)
        y, out = self.read(q, features, train)
        if self.hidden:
            y = nn.Dense(self.width, dtype=self.dtype, name="projection")(y)
        return y, out


class QFormer(LearnedQueries):
    """Q-Former (BLIP-2, Li et al. 2023, section 3.1): in every block the queries attend to each other, then to the
    features, then go through an MLP; float[B, S, D'] -> (float[B, num_tokens, width], out), see `LearnedQueries`.

    BLIP-2 attends to the features in every second block, and starts from BERT; here every block does, from scratch.
    """

    def read(self, queries, features, train: bool):
        return Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            cross=True,
            dtype=self.dtype,
            name="transformer",
        )(queries, context=features, train=train)


class Resampler(LearnedQueries):
    """Perceiver resampler (Flamingo, Alayrac et al. 2022, section 2.1 and appendix A.1.1): in every block the queries
    attend to the features and to themselves at once (keys and values are both, one after the other), then go through an
    MLP; float[B, S, D'] -> (float[B, num_tokens, width], out), see `LearnedQueries`.

    Without Flamingo's embeddings of video frames: positions are the encoder's matter.
    """

    activation: str = "relu_squared"

    def read(self, queries, features, train: bool):
        stack = nn.scan(
            ResamplerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
        )
        x, layers = stack(self.num_heads, self.mlp_dim, self.activation, self.depth, self.dtype, name="layers")(
            queries, features, train
        )
        return make_norm("layernorm", epsilon=1e-5, use_bias=True, dtype=self.dtype, name="norm")(x), {"layers": layers}


class ResamplerBlock(nn.Module):
    """x + attention(norm(x) over [norm(features); norm(x)]), then x + mlp(norm(x)); float[B, Q, D] -> the same, twice,
    as `nn.scan` wants. `depth`: of the stack, for initialisation."""

    num_heads: int
    mlp_dim: int
    activation: str
    depth: int
    dtype: str

    @nn.compact
    def __call__(self, x, features, train):
        norm = lambda name: make_norm("layernorm", epsilon=1e-5, use_bias=True, dtype=self.dtype, name=f"norm_{name}")
        q = norm("attention")(x)
        both = jnp.concatenate([norm("features")(features), q], axis=1)
        y, _ = Attention(num_heads=self.num_heads, depth=self.depth, dtype=self.dtype, name="attention")(q, both)
        x = x + y
        mlp = MLP(self.mlp_dim, self.activation, depth=self.depth, dtype=self.dtype, name="mlp")
        x = constrain(x + mlp(norm("mlp")(x), train=train), "batch", "length", "width")
        return x, x
