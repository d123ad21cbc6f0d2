"""Attention rollout: how much of each input position is in the features of a stack of blocks."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm import tree
from vfm.encoders.vit import ViT
from vfm.errors import UserError

_WEIGHTS = "/weights/0"  # where `Module.sow` puts the first value


def attention_maps(module: nn.Module, variables: Mapping[str, Any], *args: Any, **call: Any) -> dict[str, jax.Array]:
    """The attention weights of a call: path of the attention layer -> float32[L, B, N, T, S] of a stack, or
    float32[B, N, T, S] of a single one. `args` and `call` are those of the module, an encoder or a whole `VFM`."""
    _, state = module.apply(variables, *args, **call, mutable=["intermediates"])
    found = tree.flatten(state.get("intermediates", {}))
    return {path.removesuffix(_WEIGHTS): leaf for path, leaf in found.items() if path.endswith(_WEIGHTS)}


def rollout(weights: jax.Array) -> jax.Array:
    """The product of the attention of all layers, float[L, B, N, T, T] -> float[B, T, T] (Abnar & Zuidema 2020).

    A layer is (A + I) / 2, where A is the mean over its heads, and I stands for the residual connection. Row t says how
    much of each input position is in the features of token t, and sums to one.
    """
    if weights.ndim != 5 or weights.shape[-1] != weights.shape[-2]:
        raise UserError(f"rollout takes self-attention weights [L, B, N, T, T], not {tuple(weights.shape)}")
    layers = (weights.mean(axis=2) + jnp.eye(weights.shape[-1], dtype=weights.dtype)[None, None]) / 2
    step = lambda found, layer: (jnp.matmul(layer, found, precision=jax.lax.Precision.HIGHEST), None)
    return jax.lax.scan(step, layers[0], layers[1:])[0]


def patch_map(encoder: ViT, params: Mapping[str, Any], image: jax.Array) -> jax.Array:
    """How much of each patch is in the summary of an image: float[B, H, W, C] -> float32[B, rows, columns].

    The row of the class token in the rollout; with "map" pooling the rows of the patches by the attention of the
    pooling head; else their mean, as the mean of the features. The rest to one is what the class token and the
    registers brought themselves.
    """
    maps = attention_maps(encoder, {"params": params}, image, train=False)
    mixed = rollout(maps["transformer/layers/attention"])
    first = encoder.num_extra
    if encoder.pooling == "class":
        found = mixed[:, 0]
    elif encoder.pooling == "map":
        found = jnp.einsum("bp,bpt->bt", maps["pooling/attention"].mean(axis=1)[:, 0], mixed[:, first:])
    else:
        found = mixed[:, first:].mean(axis=1)
    rows, columns = (side // encoder.patch_size for side in image.shape[1:3])
    return found[:, first:].reshape(-1, rows, columns)
