"""Generative decoder that turns noise into items under a condition, by diffusion or flow matching."""

import math
import types
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from vfm.data.construct import construct
from vfm.decoders.dit import DiT
from vfm.decoders.joint import Environment
from vfm.diffusion import Gaussian, guide
from vfm.errors import UserError, unknown
from vfm.flow_matching import Flow

PROCESSES = {"gaussian": Gaussian, "flow": Flow}
NETWORKS = {"dit": DiT}


class Diffusion(nn.Module):
    """Generative decoder (survey figure 7a): noise -> items float[B, *item_shape], under a condition float[B, P, W].

    Fields:
      item_shape: (H, W, C), or (H, W) for items of one channel without an axis for it, such as spectrograms
      network: {name: "dit", **fields of `DiT`}, which reads the noisy item, the time and the condition
      process: {name: "gaussian", **fields of `vfm.diffusion.Gaussian`} or {name: "flow", **fields of
        `vfm.flow_matching.Flow`}
      condition_dropout: share of the items in training whose condition is a learned null condition, for classifier-free
        guidance (Ho & Salimans 2022); 0: there is none
      value_range: (lowest, highest) of the items' numbers; the process works in [-1, 1]
      latent: {encoder: {name, …}, decoder: {name, …}, scale: number}, a first stage in whose features the process works
        (Rombach et al. 2022): its features, times scale, on the encoder's or decoder's `grid`. It gets no gradient:
        freeze `…/latent_(encoder|decoder)/.*` by config.optimizer.frozen, and load it by config.init
      control: {from: modality, channels: number}, items of another modality of the same height and width that say more
        about what is to be drawn (ControlNet, Zhang et al. 2023); set network.control_depth as well
      environment: set by `model.joint`: the fields of `Environment`, of a decoder whose items are drawn together with
        those of others

    out["losses"]: see `Gaussian.losses` and `Flow.losses`. `UserError` for fields that are unknown or do not fit.
    """

    item_shape: tuple[int, ...] = (8, 8, 1)
    network: Mapping = FrozenDict({"name": "dit"})
    process: Mapping = FrozenDict({"name": "gaussian"})
    condition_dropout: float = 0.1
    value_range: tuple[float, float] = (0.0, 1.0)
    latent: Mapping | None = None
    control: Mapping | None = None
    environment: Mapping | None = None
    num_tokens: int | None = None
    in_width: int | None = None
    dtype: str = "float32"

    generative = True

    @property
    def control_item(self) -> types.SimpleNamespace:
        """What an item of the modality control["from"] is, as blocks declare it."""
        return types.SimpleNamespace(item_shape=(*self.item_shape[:2], self.control.get("channels", 1)))

    def setup(self):
        from vfm.blocks import TABLES, build_block  # only here: it imports all decoders

        where = "model.decoders: diffusion"
        low, high = self.value_range
        if len(self.item_shape) not in (2, 3) or not low < high:
            raise UserError(
                f"{where}: item_shape={tuple(self.item_shape)} must be (H, W) or (H, W, C), and value_range="
                f"{tuple(self.value_range)} must rise"
            )
        if not 0 <= self.condition_dropout < 1:
            raise UserError(f"{where}: condition_dropout={self.condition_dropout} must be from 0 to less than 1")
        self.dynamics = construct("process", PROCESSES, self.process)
        for field in self.control or ():
            if field not in ("from", "channels"):
                raise unknown("field", field, ("from", "channels"), f"{where}, control")
        if self.latent is not None:
            for field in self.latent:
                if field not in ("encoder", "decoder", "scale"):
                    raise unknown("field", field, ("decoder", "encoder", "scale"), f"{where}, latent")
            for half, table in (("encoder", "encoders"), ("decoder", "decoders")):
                if half not in self.latent:
                    raise UserError(f"{where}, latent needs the field {half!r}")
                block = build_block(TABLES[table], self.latent[half], f"{where}, latent.{half}", self.dtype)
                setattr(self, f"latent_{half}", block)
            self._check_latent(where)
        channels = self.inner_shape[-1] * (2 if self.dynamics.learned else 1)
        network = {**self.network, "out_channels": channels}
        if self.environment is not None:
            network["joint"] = True
            patch = {"patch_size": network.get("patch_size", DiT.patch_size)}
            self.environment_encoder = Environment(**{**patch, **self.environment}, dtype=self.dtype)
        self.denoiser = build_block(NETWORKS, network, f"{where}, network", self.dtype)
        self.unconditional = NullCondition()

    def _check_latent(self, where):
        encoder, decoder = self.latent_encoder, self.latent_decoder
        for what, gives, takes in (
            ("items of shape", tuple(encoder.item_shape), tuple(self.item_shape)),
            ("items of shape", tuple(decoder.item_shape), tuple(self.item_shape)),
            ("number of features", encoder.num_tokens, decoder.num_tokens),
            ("width", encoder.width, decoder.in_width),
        ):
            if None not in (gives, takes) and gives != takes:
                raise UserError(
                    f"{where}: latent.encoder ({type(encoder).__name__}) and latent.decoder ({type(decoder).__name__}) "
                    f"do not fit item_shape={tuple(self.item_shape)} and each other: {what} {gives} and {takes}"
                )
        grid = getattr(decoder, "grid", None) or getattr(encoder, "grid", None)
        if grid is None or math.prod(grid) != encoder.num_tokens:
            raise UserError(
                f"{where}: latent.encoder ({type(encoder).__name__}) gives {encoder.num_tokens} features, and neither "
                f"half says by `grid` on how many rows and columns (grid: {grid})"
            )

    @property
    def inner_shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels) of what the process works on."""
        if self.latent is None:
            return tuple(self.item_shape) if len(self.item_shape) == 3 else (*self.item_shape, 1)
        grid = getattr(self.latent_decoder, "grid", None) or self.latent_encoder.grid
        return (*grid, self.latent_encoder.width)

    def _inside(self, items):
        """Items as the process has them, float32[B, *inner_shape]."""
        if tuple(items.shape[1:]) != tuple(self.item_shape):
            raise UserError(f"Diffusion draws items of shape {tuple(self.item_shape)}, not {tuple(items.shape[1:])}")
        if self.latent is not None:
            features, _ = self.latent_encoder(items, train=False)
            if self.is_initializing():
                self.latent_decoder(features, train=False)
            x = jax.lax.stop_gradient(features.astype(jnp.float32)) * self.latent.get("scale", 1.0)
        else:
            low, high = self.value_range
            x = 2 * (items.astype(jnp.float32) - low) / (high - low) - 1
        return x.reshape(-1, *self.inner_shape)

    def _outside(self, x):
        """The inverse of `_inside`."""
        if self.latent is not None:
            features = x.reshape(len(x), -1, x.shape[-1]) / self.latent.get("scale", 1.0)
            return self.latent_decoder(features, train=False)[0]
        low, high = self.value_range
        return (low + (x + 1) / 2 * (high - low)).reshape(-1, *self.item_shape)

    def __call__(self, condition, items=None, *, control=None, train: bool):
        if items is None:
            if not self.is_initializing():
                return None, {}
            items = jnp.zeros((1 if condition is None else len(condition), *self.item_shape))
        rng, dropped = jax.random.split(self.make_rng("noise"))
        x, condition = self.prepare(condition, items, dropped, train=train)
        denoise = lambda x, t: self.denoiser(x, t, condition, control=control, train=train)[0]
        return None, {"losses": self.dynamics.losses(denoise, x, rng)}

    def prepare(self, condition, items, rng: jax.Array, *, train: bool):
        """(items as the process has them float32[B, *inner_shape], condition), some rows of which lost theirs in
        training."""
        x = self._inside(items)
        share = self.condition_dropout if train else 0.0
        if self.condition_dropout or condition is None:
            condition = self.unconditional(condition, jax.random.bernoulli(rng, share, x.shape[:1]))
        return x, condition

    def sample(
        self, condition, *, rng: jax.Array, batch_size: int | None = None, control: jax.Array | None = None,
        guidance: float = 1.0, sampler: str | None = None, steps: int | None = 50, eta: float = 0.0,
        clip: bool = True, spacing: str = "trailing",
    ) -> jax.Array:  # fmt: skip
        """Items float[B, *item_shape], by one `lax.scan` over `steps` steps (None: all of the process).

        guidance: s of uncond + s · (cond - uncond); 1: the condition alone. sampler: "ddim" (None) with eta or "ddpm"
        for a Gaussian process, "euler" (None) or "heun" for a flow. clip: what is denoised is kept in [-1, 1], which is
        not done to latents. spacing: see `Gaussian.spaced`. batch_size: of a draw without condition.
        """
        if condition is None and batch_size is None:
            raise UserError("Diffusion.sample needs a condition or batch_size")
        B = batch_size if condition is None else len(condition)
        denoise, x = self._denoiser(condition, B, guidance, control), self.noise(rng, B)
        how = self.sampler_options(sampler, steps, eta, clip, spacing)
        return self._outside(self.dynamics.sample(denoise, x, jax.random.split(rng)[1], **how))

    def noise(self, rng: jax.Array, batch_size: int) -> jax.Array:
        """Where a draw begins, float32[B, *inner_shape]."""
        return jax.random.normal(jax.random.split(rng)[0], (batch_size, *self.inner_shape))

    def sampler_options(self, sampler=None, steps=50, eta=0.0, clip=True, spacing="trailing") -> dict[str, Any]:
        """Settings of `sample` as the process takes them."""
        how = {"steps": steps, "clip": 1.0 if clip and self.latent is None else None}
        how |= {} if sampler is None else {"sampler": sampler}
        if isinstance(self.dynamics, Gaussian):
            how |= {"eta": eta, "spacing": spacing}
        elif eta or spacing != "trailing":
            raise UserError("Diffusion.sample: eta and spacing are for a Gaussian process, not for a flow")
        return how

    def make_observer(self):
        """observe(x, t) -> float[B, S, D], the environment encoder, unbound as in `_denoiser`."""
        encoder, variables = self.environment_encoder.unbind()
        return lambda x, t: encoder.apply(variables, x, t, train=False)[0]

    def _denoiser(self, condition, B, guidance, control):
        """denoise(x, t, environment=None) for the samplers. The network is unbound, since they call it inside of
        `lax.scan`."""
        null = self.unconditional(condition, jnp.ones(B, bool)) if self.condition_dropout or condition is None else None
        condition = null if condition is None else condition
        network, variables = self.denoiser.unbind()
        run = lambda x, t, condition, control, environment: network.apply(
            variables, x, t, condition, control=control, environment=environment, train=False
        )[0]  # fmt: skip
        if isinstance(guidance, int | float) and guidance == 1:
            return lambda x, t, environment=None: run(x, t, condition, control, environment)
        if null is None or condition is None:
            raise UserError(
                "Diffusion.sample: guidance needs a condition and a null condition, which condition_dropout > 0 trains"
            )
        twice = lambda a: None if a is None else jnp.concatenate([a, a])
        both = jnp.concatenate([condition, null.astype(condition.dtype)])

        def denoise(x, t, environment=None):
            given, free = jnp.split(run(twice(x), twice(t), both, twice(control), twice(environment)), 2)
            C = x.shape[-1]  # a learned variance, behind these, is that under the condition
            return jnp.concatenate([guide(given[..., :C], free[..., :C], guidance), given[..., C:]], axis=-1)

        return denoise

    @property
    def has_likelihood(self) -> bool:
        """Whether there is a bound on the likelihood of items: see `bits_per_dim`."""
        return self.latent is None and PROCESSES.get(self.process.get("name")) is Gaussian

    def check_levels(self, items: np.ndarray) -> None:
        """Refuses items with numbers that are none of process.levels values, evenly spaced over value_range."""
        (low, high), levels = self.value_range, self.process.get("levels", Gaussian.levels)
        place = (np.asarray(items, np.float64) - low) / (high - low) * (levels - 1)
        if np.abs(place - place.round()).max(initial=0.0) > 1e-3:
            raise UserError(
                f"model.decoders: diffusion: bits per dimension need items with process.levels={levels} values, evenly "
                f"spaced from {low:g} to {high:g}; the data have others"
            )

    def bits_per_dim(self, condition, items, *, rng: jax.Array, control: jax.Array | None = None) -> jax.Array:
        """Bound on -log2 p(item | condition) per dimension, float32[B]; see `Gaussian.bits_per_dim`.

        The items must have process.levels values, evenly spaced over value_range.
        """
        if not self.has_likelihood:
            raise UserError("bits per dimension are bounded for a Gaussian process on the items themselves alone")
        denoise = self._denoiser(condition, len(items), 1.0, control)
        return self.dynamics.bits_per_dim(denoise, self._inside(items), rng)[0]


class NullCondition(nn.Module):
    """Replaces the condition float[B, P, W] of the rows that bool[B] names by a learned one; float[B, P, W].

    Without any condition it is the learned one that stands for it, float[B, 1, W], or None if there never was one.
    """

    @nn.compact
    def __call__(self, condition, dropped):
        if condition is None and not self.has_variable("params", "null_condition"):
            return None
        if condition is None:
            null = self.get_variable("params", "null_condition")
            return jnp.broadcast_to(null[None], (len(dropped), *null.shape))
        null = self.param("null_condition", nn.initializers.normal(1.0), (1, condition.shape[-1]))
        return jnp.where(dropped[:, None, None], null[None].astype(condition.dtype), condition)
