"""Generative decoder that predicts the codes of an item scale by scale."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from vfm.decoders.diffusion import NullCondition
from vfm.diffusion import guide
from vfm.errors import UserError, unknown
from vfm.layers.attention import make_mask
from vfm.layers.dense import dot_general
from vfm.layers.transformer import Transformer
from vfm.sampling import Sampling

CONDITIONINGS = ("adaln", "in_context")
_FIRST = {"name": "latent", "bottleneck": {"name": "multiscale_vq", "scales": (1, 2, 4)}}


class VAR(nn.Module):
    """Visual autoregression (Tian et al. 2024): all codes of a scale at once, given those of the coarser scales.

    A frozen first stage makes an item a pyramid of codes (see `MultiscaleQuantizer`). What the codes so far give, sized
    down to the next scale, is the sequence that a Transformer reads; a place sees its own scale and the coarser ones.
    The mean of the condition float[B, P, W] is the start token, and it shifts, scales and gates the blocks (adaLN).

    Fields:
      latent: {encoder: {name: "latent", bottleneck: {name: "multiscale_vq", …}, …}, decoder: {name, …}}, the first
        stage. It gets no gradient: freeze `…/latent_(encoder|decoder)/.*` by config.optimizer.frozen, and load it by
        config.init
      conditioning: "adaln", as above; "in_context": the condition's tokens stand before the sequence as well, with a
        learned modality tag, and every place attends to them (survey section 2.3.4)
      condition_dropout: share of the items in training whose condition is a learned null condition, for classifier-free
        guidance; 0: there is none
      qk_norm, activation, norm_epsilon, dropout, remat: see `BlockFields`

    out["losses"]: codes float[B], cross-entropy in nats, mean over all codes of the item; out["scales"] float[B, S]:
    the same of each scale. A first stage that does not fit raises `UserError`.
    """

    item_shape: tuple[int, ...] = (8, 8, 1)
    width: int = 64
    depth: int = 2
    num_heads: int = 4
    mlp_dim: int = 128
    latent: Mapping = FrozenDict({"encoder": _FIRST, "decoder": {"name": "latent"}})
    conditioning: str = "adaln"
    condition_dropout: float = 0.1
    qk_norm: str = "none"
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    remat: str = "none"
    num_tokens: int | None = None
    in_width: int | None = None
    dtype: str = "float32"

    generative = True

    def _half(self, half: str) -> nn.Module:
        from vfm.blocks import TABLES, build_block  # only here: it imports all decoders

        where = "model.decoders: var, latent"
        for field in self.latent:
            if field not in ("encoder", "decoder"):
                raise unknown("field", field, ("decoder", "encoder"), where)
        if half not in self.latent:
            raise UserError(f"{where} needs the field {half!r}")
        return build_block(TABLES[f"{half}s"], self.latent[half], f"{where}.{half}", self.dtype)

    def setup(self):
        if self.conditioning not in CONDITIONINGS:
            raise unknown("conditioning", self.conditioning, CONDITIONINGS, "model.decoders: var")
        if not 0 <= self.condition_dropout < 1:
            raise UserError(f"VAR: condition_dropout={self.condition_dropout} must be from 0 to less than 1")
        self.latent_encoder, self.latent_decoder = self._half("encoder"), self._half("decoder")
        first = self.latent["encoder"]
        if first.get("bottleneck", {}).get("name") != "multiscale_vq":
            raise UserError(
                "model.decoders: var predicts the codes of a pyramid; latent.encoder needs a bottleneck with the name "
                f"'multiscale_vq', not {first.get('bottleneck', {}).get('name')!r}"
            )
        shapes = [tuple(half.item_shape) for half in (self.latent_encoder, self.latent_decoder)]
        if any(shape != tuple(self.item_shape) for shape in shapes):
            raise UserError(
                f"model.decoders: var: latent.encoder takes items of shape {shapes[0]} and latent.decoder gives "
                f"{shapes[1]}; item_shape={tuple(self.item_shape)}"
            )
        quantizer, normal = self.latent_encoder.quantizer, nn.initializers.normal(0.02)
        self.lengths = quantizer.lengths
        dense = lambda width, name: nn.Dense(width, dtype=self.dtype, dot_general=dot_general, name=name)
        self.unconditional = NullCondition()
        self.condition = dense(self.width, "condition")
        self.projection = dense(self.width, "projection")
        self.positions = self.param("positions", normal, (sum(self.lengths), self.width))
        self.levels = self.param("levels", normal, (len(self.lengths), self.width))
        if self.conditioning == "in_context":
            self.tag = self.param("tag", normal, (1, self.width))
        self.transformer = Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm="layernorm_fixed",
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            qk_norm=self.qk_norm,
            dropout=self.dropout,
            modulated=True,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.head = dense(quantizer.codebook_size, "head")

    def __call__(self, condition, items=None, *, train: bool):
        if items is None:
            if not self.is_initializing():
                return None, {}
            items = jnp.zeros((1 if condition is None else len(condition), *self.item_shape))
        features, first = self.latent_encoder(items, train=False)
        if self.is_initializing():
            self.latent_decoder(features, train=False)
        if self.condition_dropout:
            share = self.condition_dropout if train else 0.0
            dropped = jax.random.bernoulli(self.make_rng("noise"), share, (len(items),)) if train else None
            dropped = jnp.zeros(len(items), bool) if dropped is None else dropped
            condition = self.unconditional(condition, dropped)
        logits = self.logits(condition, first["codes"], train=train)
        nll = jax.nn.logsumexp(logits, axis=-1)
        nll = nll - jnp.take_along_axis(logits, first["codes"][..., None], axis=-1)[..., 0]
        scales = jnp.split(nll, np.cumsum(self.lengths)[:-1], axis=1)
        scales = jnp.stack([scale.mean(axis=1) for scale in scales], axis=1)
        return None, {"losses": {"codes": nll.mean(axis=1)}, "scales": scales}

    def logits(self, condition, codes: jax.Array, *, train: bool) -> jax.Array:
        """Logits float32[B, L, K] of all codes int32[B, L], each from the coarser ones; condition float[B, P, W]."""
        inputs = jax.lax.stop_gradient(self.latent_encoder.quantizer.inputs(codes))
        return self.read(condition, inputs, train=train)

    def read(self, condition, inputs: jax.Array, *, train: bool) -> jax.Array:
        """The same for what the quantiser's `inputs` gives, float[B, L - P_1, W]."""
        before, start, c = self._begin(condition, len(inputs))
        x = jnp.concatenate([start, self._embed(inputs, self.lengths[0])], axis=1)
        x = x if before is None else jnp.concatenate([before, x], axis=1)
        levels = self._levels(before)
        x, _ = self.transformer(x, mask=make_mask(levels, levels, causal=True), condition=c, train=train)
        return self.head(x[:, -sum(self.lengths) :]).astype(jnp.float32)

    def _levels(self, before) -> np.ndarray:
        """int[S]: the number of each place's scale; -1 for the tokens of the condition."""
        tokens = 0 if before is None else before.shape[1]
        return np.repeat(np.arange(-1, len(self.lengths)), (tokens, *self.lengths))

    def _begin(self, condition, B: int):
        """(tokens of the condition or None, the first scale's input, what modulates the blocks)."""
        condition = jnp.zeros((B, 1, 1)) if condition is None else condition
        tokens = self.condition(condition.astype(self.dtype))
        c = tokens.mean(axis=1)
        start = jnp.broadcast_to(c[:, None], (B, self.lengths[0], self.width)) + self._places(0, self.lengths[0])
        return tokens + self.tag[None] if self.conditioning == "in_context" else None, start, c

    def _embed(self, inputs: jax.Array, begin: int) -> jax.Array:
        """What stands in the sequence for inputs float[B, T, W] of the places from `begin` on: float[B, T, D]."""
        return self.projection(inputs.astype(self.dtype)) + self._places(begin, inputs.shape[1])

    def _places(self, begin: int, count: int) -> jax.Array:
        """Positions and levels, float[1, count, D]."""
        levels = np.repeat(np.arange(len(self.lengths)), self.lengths)[begin : begin + count]
        return (self.positions[begin : begin + count] + self.levels[levels])[None].astype(self.dtype)

    def walk(self, condition, B: int, choose: Callable[[int, jax.Array], jax.Array]):
        """All codes int32[B, L] and their logits float32[R, L, K], scale by scale with a cache of keys and values.

        condition: float[R, P, W] or None. choose(scale, logits float32[R, P_s, K]) -> codes int32[B, P_s]; where R is
        not B it is 2B, and the codes are for both halves (see `sample`).
        """
        quantizer = self.latent_encoder.quantizer
        R = B if condition is None else len(condition)
        before, x, c = self._begin(condition, R)
        x = x if before is None else jnp.concatenate([before, x], axis=1)
        levels = self._levels(before)
        shape = (self.depth, R, self.num_heads, len(levels), self.width // self.num_heads)
        cache = {name: jnp.zeros(shape, jnp.dtype(self.dtype)) for name in ("key", "value")}
        at, total, codes, found = 0, 0.0, [], []
        for scale, length in enumerate(self.lengths):
            mask = make_mask(levels[at : at + x.shape[1]], levels, causal=True)
            x, out = self.transformer(x, mask=mask, condition=c, cache={**cache, "index": at}, train=False)
            cache, at = {name: out["cache"][name] for name in cache}, at + x.shape[1]
            found.append(self.head(x[:, -length:]).astype(jnp.float32))
            codes.append(choose(scale, found[-1]))
            if scale + 1 < len(self.lengths):
                total = total + quantizer.grow(scale, codes[-1])
                x = self._embed(quantizer.shrink(scale + 1, total), sum(self.lengths[: scale + 1]))
                x = jnp.tile(x, (R // B, 1, 1))
        return jnp.concatenate(codes, axis=1), jnp.concatenate(found, axis=1)

    def sample(
        self,
        condition,
        *,
        rng: jax.Array,
        batch_size: int | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> jax.Array:
        """Items float[B, *item_shape] under a condition float[B, P, W].

        guidance: of logits uncond + s · (cond - uncond), where s rises from 1 at the first scale to `guidance` at the
        last; 1: the condition alone. temperature (0: the best codes), top_k, top_p: see `Sampling`. batch_size: of a
        draw without condition.
        """
        if condition is None and batch_size is None:
            raise UserError("VAR.sample needs a condition or batch_size")
        B = batch_size if condition is None else len(condition)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        null = self.unconditional(condition, jnp.ones(B, bool)) if self.condition_dropout else None
        guided = guidance != 1
        if guided and (condition is None or null is None):
            raise UserError(
                "VAR.sample: guidance needs a condition and a null condition, which condition_dropout > 0 trains"
            )
        rows = jnp.concatenate([condition, null]) if guided else null if condition is None else condition

        def choose(scale, logits):
            if guided:
                strength = 1 + (guidance - 1) * scale / max(len(self.lengths) - 1, 1)
                logits = guide(logits[:B], logits[B:], strength)
            count = B * self.lengths[scale]
            keys = jax.random.split(jax.random.fold_in(rng, scale), count)
            return sampling.choose(logits.reshape(count, -1), keys).reshape(B, -1)

        codes, _ = self.walk(rows, B, choose)
        features = self.latent_encoder.quantizer.decode(codes) * getattr(self.latent_encoder, "scaling_factor", 1.0)
        return self.latent_decoder(features.astype(self.dtype), train=False)[0]
