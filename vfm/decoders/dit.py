"""Diffusion Transformer: what a noisy item and its time say about the noise."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vfm.errors import UserError, unknown
from vfm.layers.dense import dot_general
from vfm.layers.positions import sinusoidal_2d, timestep_embedding
from vfm.layers.transformer import Transformer
from vfm.sharding import constrain

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")


class DiT(nn.Module):
    """Diffusion Transformer (Peebles & Xie 2023): (x float[B, H, W, C], t float[B]) -> (float[B, H, W, C'], out).

    The item is cut into patches with fixed two-dimensional positions. Nothing comes out before training: the last layer
    starts as zero. C' is `out_channels` (None: C).

    Fields:
      conditioning: how the time and the condition float[B, P, W] act on the blocks (figure 3 of the paper)
        adaln_zero: they shift, scale and gate (see `BlockFields`); of several condition tokens it is the mean that
          counts
        adaln: they shift and scale
        cross_attention: the blocks attend to a sequence of the time and of all condition tokens
        in_context: that sequence stands in front of the patches, and is left out at the end
      frequencies: width of the sinusoidal features of the time
      embedders: "shared", or "per_block": each block has its own embedding of time and condition, as in the layout of
        published weights; those of the first are the last layer's too. For adaln_zero and adaln
      base_grid: (rows, columns) whose positions the item's are spread over; None: its own
      control_depth: the first blocks have trainable copies, which read a control float[B, H', W', C''] as well, and
        what they give is added to the blocks' by layers that start as zero (ControlNet, Zhang et al. 2023). The grid of
        patches must divide H' and W'. Without a control the copies do nothing
      joint: the blocks attend to an environment float[B, S, W], too, what others draw at the same time (see
        `vfm.decoders.joint`); it changes nothing before training, and may be missing
      activation, norm_epsilon, dropout, remat: see `BlockFields`

    `condition_mask`: bool[B, P], False at tokens that do not count. out["layers"]: float[L, B, T, D]. A side that the
    patch does not divide raises `UserError`.
    """

    patch_size: int = 2
    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    conditioning: str = "adaln_zero"
    out_channels: int | None = None
    frequencies: int = 256
    embedders: str = "shared"
    base_grid: tuple[int, int] | None = None
    control_depth: int | None = None
    joint: bool = False
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def adaptive(self) -> bool:
        return self.conditioning in ("adaln_zero", "adaln")

    @nn.compact
    def __call__(self, x, t, condition=None, *, condition_mask=None, control=None, environment=None, train: bool):
        self._check(x, control)
        B, H, W, C = x.shape
        patch, channels = self.patch_size, self.out_channels or C
        grid = (H // patch, W // patch)
        x = self._patches("patch", x, (patch, patch))
        x = x + sinusoidal_2d(grid, self.width, self.base_grid)[None].astype(x.dtype)
        call = self._conditions(t, condition, condition_mask, x)
        if self.conditioning == "in_context":
            extra = call.pop("extra")
            x = jnp.concatenate([extra, x], axis=1)
        x = constrain(x, "batch", "length", "width")
        if control is not None:
            sides = tuple(side // cells for side, cells in zip(control.shape[1:3], grid))
            call["added"] = self._control(x, self._patches("control_patch", control, sides), call, train)
        stack = self._stack("transformer", self.depth, joint=self.joint)
        x, out = stack(x, **call, environment=environment, train=train)
        x = x[:, -grid[0] * grid[1] :]
        x = self._dense("unpatch", patch * patch * channels, kernel_init=nn.initializers.zeros)(x)
        x = x.reshape(B, *grid, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(B, H, W, channels), out

    def _check(self, x, control):
        if self.conditioning not in CONDITIONINGS:
            raise unknown("conditioning", self.conditioning, CONDITIONINGS, "the network 'dit'")
        if self.embedders not in ("shared", "per_block"):
            raise unknown("embedders", self.embedders, ("shared", "per_block"), "the network 'dit'")
        if self.embedders == "per_block" and not self.adaptive:
            raise UserError(f"DiT: embedders='per_block' is for adaln_zero and adaln, not {self.conditioning!r}")
        sides = x.shape[1:3]
        if x.ndim != 4 or any(side % self.patch_size for side in sides):
            raise UserError(f"DiT: patch_size={self.patch_size} does not divide the sides {sides} of the items")
        if control is None:
            return
        if self.control_depth is None or self.control_depth > self.depth:
            raise UserError(
                f"DiT: a control needs control_depth from 1 to depth={self.depth}, not {self.control_depth}"
            )
        cells = [side // self.patch_size for side in sides]
        if control.ndim != 4 or any(side % count for side, count in zip(control.shape[1:3], cells)):
            raise UserError(
                f"DiT: the control's sides {control.shape[1:3]} must be multiples of the grid {tuple(cells)} of patches"
            )

    def _dense(self, name, width, **init):
        return nn.Dense(width, dtype=self.dtype, dot_general=dot_general, name=name, **init)

    def _patches(self, name, x, sides):
        """float[B, H, W, C] -> float[B, rows · columns, D]."""
        x = nn.Conv(self.width, sides, strides=sides, padding="VALID", dtype=self.dtype, name=name)(x)
        return x.reshape(len(x), -1, self.width)

    def _stack(self, name, depth, **more):
        return Transformer(
            **more,
            depth=depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm="layernorm_fixed" if self.adaptive else "layernorm",
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            dropout=self.dropout,
            cross=self.conditioning == "cross_attention",
            modulated=self.adaptive,
            modulation_gates=self.conditioning == "adaln_zero",
            remat=self.remat,
            dtype=self.dtype,
            name=name,
        )

    def _conditions(self, t, condition, mask, x):
        """What the stack reads of time and condition; "extra": tokens in front of the patches."""
        if mask is not None and condition is not None and not self.adaptive:
            mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)  # the time counts always
        elif condition is not None and self.adaptive:
            weight = jnp.ones(condition.shape[:2]) if mask is None else mask.astype(jnp.float32)
            weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
            condition = jnp.einsum("bp,bpd->bd", weight.astype(condition.dtype), condition)[:, None]
        fields = {"width": self.width, "frequencies": self.frequencies, "dtype": self.dtype}
        if self.embedders == "per_block":
            time, given = PerLayer(Embedder, fields, self.depth, name="embedders")(t, condition)
            each = time if given is None else time + given[:, :, 0]
            return {"condition": each[0], "conditions": each}
        time, given = Embedder(**fields, name="embedder")(t, condition)
        if self.adaptive:
            return {"condition": time if given is None else time + given[:, 0]}
        tokens = time[:, None] if given is None else jnp.concatenate([time[:, None], given], axis=1)
        if self.conditioning == "cross_attention":
            masked = {} if mask is None else {"context_mask": jnp.broadcast_to(
                mask[:, None, None], (len(x), 1, x.shape[1], mask.shape[1]))}  # fmt: skip
            return {"context": tokens, **masked}
        if mask is None or condition is None:
            return {"extra": tokens}
        seen = jnp.pad(mask, ((0, 0), (0, x.shape[1])), constant_values=True)
        return {"extra": tokens, "mask": seen[:, None, None]}

    def _control(self, x, control, call, train):
        """float[L, B, T, D], what a control float[B, rows · columns, D] adds to what the blocks give."""
        N = self.control_depth
        pad = x.shape[1] - control.shape[1]  # the tokens in front of the patches
        start = self._dense("control_projection", self.width, kernel_init=nn.initializers.zeros)(control)
        call = {name: value[:N] if name == "conditions" else value for name, value in call.items()}
        y = x + jnp.pad(start, ((0, 0), (pad, 0), (0, 0)))
        _, out = self._stack("control", N, last_norm=False)(y, **call, train=train)
        added = PerLayer(Zero, {"width": self.width, "dtype": self.dtype}, name="control_out")(out["layers"])
        return jnp.pad(added, ((0, self.depth - N), (0, 0), (0, 0), (0, 0)))


class Embedder(nn.Module):
    """Time float[B] and condition float[B, P, W] or None -> (float[B, D], float[B, P, D] or None)."""

    width: int = 32
    frequencies: int = 256
    dtype: str = "float32"

    @nn.compact
    def __call__(self, t, condition=None):
        dense = lambda name: nn.Dense(self.width, dtype=self.dtype, dot_general=dot_general, name=name)
        x = timestep_embedding(t, self.frequencies).astype(self.dtype)
        time = dense("projection")(nn.silu(dense("hidden")(x)))
        return time, None if condition is None else dense("condition")(condition)


class Zero(nn.Module):
    """A linear layer that starts as zero; float[…, D'] -> float[…, D]."""

    width: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=zeros, dot_general=dot_general, name="projection")(x)


class PerLayer(nn.Module):
    """`count` modules of one class, side by side; parameters and results have a leading layer axis.

    count None: the arguments have that axis too, and each module reads its own; else all read the same.
    """

    block: type[nn.Module]
    fields: Mapping[str, Any]
    count: int | None = None

    @nn.compact
    def __call__(self, *arguments):
        axes = {} if self.count is None else {"in_axes": None, "axis_size": self.count}
        block = nn.vmap(self.block, variable_axes={"params": 0}, split_rngs={"params": True}, **axes)
        return block(**self.fields, name="layers")(*arguments)
