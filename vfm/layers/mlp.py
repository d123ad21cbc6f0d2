"""The feed-forward layer, plain or gated."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import unknown
from vfm.layers.dense import dot_general
from vfm.sharding import constrain

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu_squared": lambda x: jax.nn.relu(x) ** 2,
    "tanh": jnp.tanh,
}


def residual_init(depth: int) -> nn.initializers.Initializer:
    """Fan-in initialiser scaled by 1 / (2 depth), for the last kernel of a residual branch (GPT-2).

    The branches start small, so that the variance of a deep stack stays near that of its input.
    """
    return nn.initializers.variance_scaling(1.0 / (2 * max(depth, 1)), "fan_in", "truncated_normal")


class MLP(nn.Module):
    """Feed-forward layer, float[B, T, D] -> float[B, T, D].

    Plain: down(act(up(x))) (Vaswani et al. 2017). Gated: down(act(gate(x)) * up(x)); with `silu` this is SwiGLU
    (Shazeer 2020). `depth` is the depth of the residual stack that the layer stands in, for its initialisation.
    """

    mlp_dim: int = 64
    activation: str = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    depth: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        act = ACTIVATIONS[self.activation]
        D = x.shape[-1]

        def dense(name, width, **init):
            return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, dot_general=dot_general, name=name, **init)

        h = dense("up", self.mlp_dim)(x)
        if self.gated:
            h = h * act(dense("gate", self.mlp_dim)(x))
        else:
            h = act(h)
        h = constrain(h, "batch", "length", "mlp")
        h = nn.Dropout(self.dropout, name="dropout")(h, deterministic=not train)
        return dense("down", D, kernel_init=residual_init(self.depth))(h)
