"""Tokens mixed by a gated causal convolution in place of attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import UserError, unknown
from vfm.layers.attention import write
from vfm.layers.dense import dot_general
from vfm.layers.mlp import ACTIVATIONS, residual_init
from vfm.sharding import constrain


def taps(mask: jax.Array, q_index: jax.Array, kernel_size: int) -> jax.Array:
    """bool[B | 1, T, kernel_size]: whether token t reads the one j places before it, out of attention's mask
    bool[B | 1, 1, T, S] and the places int32[T] of the tokens in S."""
    if kernel_size < 1:
        raise UserError(f"model.backbone.kernel_size={kernel_size} must be at least 1")
    place = (q_index[:, None] - jnp.arange(kernel_size)[None])[None]
    seen = jnp.take_along_axis(mask[:, 0], jnp.maximum(place, 0), axis=2)
    return seen & (place >= 0)


class CausalConvolution(nn.Module):
    """down(act(gate(x)) * conv(up(x))): each channel is convolved over the last `kernel_size` tokens.

    x: float[B, T, D] -> float[B, T, D] and the cache. taps: see `taps`; what a token must not see (padding, other
    segments) counts as zero. cache: {"key": float[L, B, 1, S, D] of all layers, "index": int32[]}; what is convolved is
    written at `index` of this layer, int32[].
    A depthwise convolution with a gate, after Dauphin et al. 2017, "Language modeling with gated convolutional
    networks", and Wu et al. 2019, "Pay less attention with lightweight and dynamic convolutions". Its products are
    elementwise and few (kernel_size · D for a token), and are not counted as FLOPs.
    """

    kernel_size: int = 8
    activation: str = "silu"
    use_bias: bool = False
    depth: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, taps: jax.Array, cache=None, layer=None):
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        B, T, D = x.shape
        K = self.kernel_size

        def dense(name, **init):
            return nn.Dense(D, use_bias=self.use_bias, dtype=self.dtype, dot_general=dot_general, name=name, **init)

        h = constrain(dense("up")(x), "batch", "length", "mlp")
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (K, D)).astype(h.dtype)
        pad = ((0, 0), (K - 1, 0), (0, 0))
        if cache is None:
            signal = jnp.pad(h, pad)
        else:
            cache = {**cache, "key": write(cache["key"], h[:, :, None], layer, cache["index"])}
            past = jnp.pad(cache["key"][layer][:, 0].astype(h.dtype), pad)
            signal = jax.lax.dynamic_slice_in_dim(past, cache["index"], T + K - 1, axis=1)
        # Shifted sums, which compile to one loop: XLA's depthwise convolution is many times slower on a CPU.
        y = jnp.zeros_like(h)
        for j in range(K):
            shifted = signal[:, K - 1 - j : K - 1 - j + T]
            y = y + jnp.where(taps[:, :, j, None], shifted, 0) * kernel[j][None, None]
        y = constrain(ACTIVATIONS[self.activation](dense("gate")(x)) * y, "batch", "length", "mlp")
        return dense("down", kernel_init=residual_init(self.depth))(y), cache
