"""The Transformer block and the scanned stack that every encoder and backbone is made of."""

import flax.linen as nn
import jax

from vfm.errors import unknown
from vfm.layers.attention import Attention
from vfm.layers.mlp import MLP
from vfm.layers.norm import make_norm
from vfm.sharding import constrain

# What a rematerialised block keeps for the backward pass; "none" keeps all (no rematerialisation).
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)); float[B, T, D] -> float[B, T, D].

    With `cross` a second attention, over `context`: float[B, S, D'], stands between the two. The call takes positional
    arguments only and returns (x, (cache, out)), as `nn.scan` wants.
    """

    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    cross: bool = False
    depth: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, cache, mask, table, context, context_mask, train):
        def norm(name, x):
            return make_norm(self.norm, epsilon=self.norm_epsilon, use_bias=self.use_bias, dtype=self.dtype, name=name)(
                x
            )

        def residual(name, x, y):
            y = nn.Dropout(self.dropout, name=f"dropout_{name}")(y, deterministic=not train)
            return constrain(x + y, "batch", "length", "width")

        def attention(name):
            return Attention(
                self.num_heads, self.num_kv_heads, self.head_dim, self.use_bias, self.depth, self.dtype, name=name
            )

        out = {}
        y, cache = attention("attention")(norm("norm_attention", x), mask=mask, table=table, cache=cache)
        x = residual("attention", x, y)
        if self.cross:
            y, _ = attention("cross_attention")(norm("norm_cross", x), context, mask=context_mask)
            x = residual("cross", x, y)
        mlp = MLP(
            self.mlp_dim, self.activation, self.gated, self.use_bias, depth=self.depth, dtype=self.dtype, name="mlp"
        )
        x = residual("mlp", x, mlp(norm("norm_mlp", x), train=train))
        out["x"] = x
        return x, (cache, out)


class Transformer(nn.Module):
    """`depth` equal blocks under one `nn.scan` (parameters have a leading layer axis), then a norm.

    x: float[B, T, D] -> (float[B, T, D], out) with out["layers"]: float[L, B, T, D], the residual stream after each
    block, and out["cache"]. `mask`, `table`, `context` as in `Attention`; `cache` has a leading layer axis.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    cross: bool = False
    remat: str = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, *, mask=None, table=None, context=None, context_mask=None, cache=None, train: bool):
        if self.remat not in REMAT:
            raise unknown("remat policy", self.remat, REMAT)
        block = Block
        if self.remat != "none":
            # Argument 7 (train) is a Python bool; inside a scan common subexpressions cannot undo the recomputation.
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False, static_argnums=(7,))
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 5),
            length=self.depth,
        )(
            self.num_heads,
            self.mlp_dim,
            self.num_kv_heads,
            self.head_dim,
            self.norm,
            self.norm_epsilon,
            self.activation,
            self.gated,
            self.use_bias,
            self.dropout,
            self.cross,
            self.depth,
            self.dtype,
            name="layers",
        )
        x, (cache, out) = stack(x, cache, mask, table, context, context_mask, train)
        x = make_norm(self.norm, epsilon=self.norm_epsilon, use_bias=self.use_bias, dtype=self.dtype, name="norm")(x)
        return x, {"layers": out["x"], "cache": cache}
