"""Joint generation: diffusion decoders that see what the others are drawing (CoDi, Tang et al. 2023).

All items go from noise to data at the same time t. Each denoiser has an attention more, over the other items as they
are at t, which an environment encoder of each modality brings into one space. Only these encoders and attentions have
to learn, from items that belong together; before that the items are drawn as each decoder draws them alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.data.construct import construct, plain
from vfm.decoders.dit import Embedder
from vfm.errors import UserError, unknown
from vfm.layers.dense import dot_general
from vfm.layers.positions import sinusoidal_2d
from vfm.layers.transformer import Transformer
from vfm.sharding import constrain


class Environment(nn.Module):
    """Environment encoder: a noisy item float[B, H, W, C] and its time float[B] -> (float[B, S, D], out).

    A token for each patch, from a Transformer. out["embedding"]: float32[B, D], their mean, of length 1. A side that
    the patch does not divide raises `UserError`.
    """

    patch_size: int = 2
    width: int = 64
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 128
    frequencies: int = 256
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, t, *, train: bool):
        sides = (self.patch_size, self.patch_size)
        if any(side % self.patch_size for side in x.shape[1:3]):
            raise UserError(
                f"model.joint: patch_size={self.patch_size} does not divide the sides {x.shape[1:3]} of items"
            )
        patch = nn.Conv(self.width, sides, strides=sides, padding="VALID", dtype=self.dtype, name="patch")
        x = patch(x)
        grid = x.shape[1:3]
        x = x.reshape(len(x), -1, self.width) + sinusoidal_2d(grid, self.width)[None].astype(x.dtype)
        time, _ = Embedder(self.width, self.frequencies, self.dtype, name="embedder")(t)
        x = constrain(x + time[:, None], "batch", "length", "width")
        x, _ = Transformer(
            num_heads=self.num_heads, mlp_dim=self.mlp_dim, depth=self.depth, dtype=self.dtype, name="transformer"
        )(x, train=train)
        x = nn.Dense(self.width, dtype=self.dtype, dot_general=dot_general, name="projection")(x)
        pooled = x.astype(jnp.float32).mean(axis=1)
        norm = jnp.sqrt(jnp.maximum(jnp.square(pooled).sum(axis=-1, keepdims=True), 1e-12))  # has a gradient at 0
        return x, {"embedding": pooled / norm}


def parse(cfg: Mapping[str, Any], decoders: Mapping[str, Mapping]) -> tuple[tuple[str, ...], float, dict[str, Any]]:
    """(modalities, temperature, fields of `Environment`) of `model.joint`; decoders: the configs of `model.decoders`.

    `UserError` for modalities that are fewer than two or have no diffusion decoder, and for a bad temperature.
    """
    fields = plain(cfg)
    given, temperature = fields.pop("modalities", ()), fields.pop("temperature", 0.1)
    names = tuple(given) if isinstance(given, tuple) else (given,)
    diffusing = [name for name, block in decoders.items() if block and block.get("name") == "diffusion"]
    for name in names:
        if name not in diffusing:
            raise unknown("modality", name, diffusing, "model.joint.modalities (those with a 'diffusion' decoder)")
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"model.joint.modalities={names} must name two modalities or more, each once")
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise UserError(f"model.joint.temperature={temperature!r} must be a number more than 0")
    return tuple(sorted(names)), temperature, fields


def check(decoders: Mapping[str, nn.Module], processes: Mapping[str, type]) -> None:
    """Refuses decoders whose items do not go from noise to data in the same way."""
    found = {name: construct("process", processes, block.process) for name, block in decoders.items()}
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise UserError(
                f"model.joint: items are drawn together in one process, but decoders.{first}.process is {found[first]} "
                f"and decoders.{other}.process is {found[other]}"
            )


def _environments(tokens: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What each modality attends to, float[B, S, D]: the tokens of all others."""
    return {name: jnp.concatenate([x for of, x in tokens.items() if of != name], axis=1) for name in tokens}


def joint_losses(
    decoders: Mapping[str, Any],
    conditions: Mapping[str, jax.Array | None],
    items: Mapping[str, jax.Array],
    controls: Mapping[str, jax.Array | None],
    *,
    rng: jax.Array,
    train: bool,
) -> tuple[dict[str, dict[str, jax.Array]], dict[str, dict[str, jax.Array]]]:
    """The terms of the loss {X: {name: float32[B]}} of items that are noisy at one time, and embeddings {"noisy",
    "clean": {X: float32[B, D]}} of what the environment encoders see of them, at that time and without noise.

    Of the embeddings that are to be compared within the batch, at least one is to be of items without noise: of two
    noisy ones the time, which is that of their row, would tell which belong together.
    """
    dynamics = next(iter(decoders.values())).dynamics
    when, dropped, how = jax.random.split(rng, 3)
    x0, given, noise, noisy, tokens, losses = {}, {}, {}, {}, {}, {}
    embeddings = {"noisy": {}, "clean": {}}
    for i, (name, decoder) in enumerate(decoders.items()):
        x0[name], given[name] = decoder.prepare(conditions[name], items[name], dropped, train=train)
        noise[name] = jax.random.normal(jax.random.fold_in(how, i), x0[name].shape, x0[name].dtype)
    t = dynamics.draw_times(when, len(next(iter(x0.values()))))
    clean = jnp.zeros(t.shape)  # the time of data, as networks read it
    for name, decoder in decoders.items():
        noisy[name] = dynamics.noised(x0[name], t, noise[name])
        tokens[name], found = decoder.environment_encoder(*noisy[name], train=train)
        embeddings["noisy"][name] = found["embedding"]
        embeddings["clean"][name] = decoder.environment_encoder(x0[name], clean, train=train)[1]["embedding"]
    seen = _environments(tokens)
    for name, decoder in decoders.items():
        more = {"control": controls[name], "environment": seen[name]}
        output = decoder.denoiser(*noisy[name], given[name], **more, train=train)[0]
        losses[name] = dynamics.errors(output, x0[name], t, noise[name])
    return losses, embeddings


def joint_sample(
    decoders: Mapping[str, Any],
    conditions: Mapping[str, jax.Array | None],
    controls: Mapping[str, jax.Array | None],
    *,
    rng: jax.Array,
    batch_size: int,
    guidance: float = 1.0,
    **settings,
) -> dict[str, jax.Array]:
    """Items {X: float[B, *item_shape]} that are drawn together, in one `lax.scan`. settings: as in `Diffusion.sample`.

    The i-th of the decoders begins with the noise of `sample` with rng `jax.random.fold_in(rng, i)`.
    """
    dynamics = next(iter(decoders.values())).dynamics
    denoise = {
        name: d._denoiser(conditions[name], batch_size, guidance, controls[name]) for name, d in decoders.items()
    }
    observe = {name: decoder.make_observer() for name, decoder in decoders.items()}
    start = {name: d.noise(jax.random.fold_in(rng, i), batch_size) for i, (name, d) in enumerate(decoders.items())}
    shapes = {name: x.shape[1:] for name, x in start.items()}
    ends = [0]
    for shape in shapes.values():
        ends.append(ends[-1] + math.prod(shape))

    def cut(x):
        """{X: float[B, …]} of float[B, n], all items of a row in one."""
        return {name: x[:, a:b].reshape(-1, *shapes[name]) for name, a, b in zip(shapes, ends, ends[1:])}

    def together(x, t):
        """Predictions float[B, n], and behind these what the networks say of the variance, if they do."""
        parts = cut(x)
        seen = _environments({name: observe[name](part, t) for name, part in parts.items()})
        outputs = [denoise[name](part, t, seen[name]) for name, part in parts.items()]
        found = [dynamics.split(output)[: 1 + dynamics.learned] for output in outputs]
        return jnp.concatenate([part.reshape(len(part), -1) for kind in zip(*found) for part in kind], axis=1)

    x = jnp.concatenate([part.reshape(batch_size, -1) for part in start.values()], axis=1)
    how = {name: decoder.sampler_options(**settings) for name, decoder in decoders.items()}
    limits = [jnp.full(math.prod(shapes[name]), how[name]["clip"] or jnp.inf) for name in shapes]
    options = next(iter(how.values())) | {"clip": jnp.concatenate(limits)[None]}
    drawn = cut(dynamics.sample(together, x, jax.random.fold_in(rng, len(decoders)), **options))
    return {name: decoder._outside(drawn[name]) for name, decoder in decoders.items()}


def _flat(x: jax.Array | None) -> jax.Array | None:
    """Items of all rows in one axis: [B, N, …] -> [B·N, …]."""
    return None if x is None else x.reshape(-1, *x.shape[2:])


def put_losses(
    model, names: tuple[str, ...], inputs: Mapping[str, jax.Array], train: bool, out: dict[str, Any]
) -> None:
    """Puts what `joint_losses` gives of the items of a `VFM`, float[B, N, *item_shape], into its out[X] and
    out["joint"]; names: the modalities, or none."""
    if not names:
        return
    lead = inputs[names[0]].shape[:2]
    for name in names:
        if inputs[name].shape[:2] != lead:
            raise UserError(
                f"the batch has {list(inputs[name].shape[:2])} items of {name} and {list(lead)} of {names[0]}; "
                "what is generated together must be as many"
            )
    of = lambda field: {name: _flat(out[name].get(field)) for name in names}
    items = {name: _flat(inputs[name]) for name in names}
    decoders = {name: model.decoders[name] for name in names}
    rng = model.make_rng("noise")
    losses, seen = joint_losses(decoders, of("condition"), items, of("control"), rng=rng, train=train)
    for name in names:
        out[name]["losses"] = {term: loss.reshape(lead) for term, loss in losses[name].items()}
    embeddings = {kind: {name: x.reshape(*lead, -1) for name, x in found.items()} for kind, found in seen.items()}
    out["joint"] = {"embeddings": embeddings, "scale": 1 / model.joint["temperature"]}


def draw(model, out: Mapping[str, Any], *, rng: jax.Array, batch_size: int | None, **settings) -> dict[str, jax.Array]:
    """`VFM.sample_joint`."""
    if model.joint is None:
        raise UserError("VFM.sample_joint needs model.joint, which names the modalities that are drawn together")
    names = model.joint["modalities"]
    given = {field: {name: out.get(name, {}).get(field) for name in names} for field in ("condition", "control")}
    leads = {x.shape[:2] for found in given.values() for x in found.values() if x is not None}
    if len(leads) > 1:
        raise UserError(f"VFM.sample_joint: what is drawn together must be as many, not {sorted(leads)} items")
    lead = leads.pop() if leads else (batch_size or 1, 1)
    conditions, controls = ({name: _flat(x) for name, x in found.items()} for found in given.values())
    decoders = {name: model.decoders[name] for name in names}
    items = joint_sample(decoders, conditions, controls, rng=rng, batch_size=math.prod(lead), **settings)
    return {name: x.reshape(*lead, *x.shape[1:]) for name, x in items.items()}
