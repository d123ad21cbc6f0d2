"""The five blocks wired into one model: encoder -> input projector -> backbone -> output projector -> decoder."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from vfm.blocks import TABLES, build_block
from vfm.data.interleave import Layout, Modality
from vfm.decoders import joint as together
from vfm.decoders.diffusion import PROCESSES
from vfm.errors import UserError, unknown
from vfm.sharding import constrain
from vfm.wiring import check, controls, generative, labels, modalities, num_signals, reads_two, text_is_item

# Arguments that go to the backbone as they are, where it has them.
BACKBONE_INPUTS = (
    "input_mask",
    "segment_ids",
    "positions",
    "token_types",
    "prefix",
    "block_positions",
    "order",
    "decoder_mask",
    "decoder_segment_ids",
    "decoder_positions",
)
# The arguments of `VFM.__call__` that a batch may hold.
INPUTS = ("tokens", "inputs", "starts", "signal_starts", "masked", "decoder_tokens", *BACKBONE_INPUTS)


class VFM(nn.Module):
    """A vertical foundation model over any modalities, one of which is the centre (survey equations 1 to 5).

    F_X = ME_X(D_X); F_C = IP_{X->C}(F_X); F̂_C = BC(F_C); F̂_X = OP_{C->X}(F̂_C); D̂_X = MD_X(F̂_X). The centre has no
    projectors, so a single-modality model is this class with empty projector mappings. Parameter roots are the blocks:
    encoders_X, input_projectors_X, backbone, output_projectors_X, decoders_X; and `signals_X` float[K, D], the learned
    inputs of the K sequence slots from which an item of X is generated (the signal tokens of NExT-GPT).

    alignment: {temperature, max_scale, bias} makes the encoders and input projectors a space that is shared by all
    modalities (survey section 1.3; CLIP, Radford et al. 2021): each item gets an embedding of length 1. `logit_scale`
    float32[], the logarithm of the factor of their products, is learned, and so is `logit_bias` if bias is a number
    (SigLIP, Zhai et al. 2023).

    Without a backbone every modality is read item by item, text too. Decoders of labels then read the summaries of the
    centre's items, float[B, N, W]; a decoder of a modality that has an encoder is the second half of an autoencoder;
    and a generative decoder takes the features of the centre's items, through its output projector if there is one, as
    its condition, or none where the centre has no encoder.

    A generative decoder (see `vfm.decoders`) draws items under a condition: the hidden states of the signals, or the
    features just named. The call gives the terms of its loss for the items of `inputs`, if there is an rng "noise";
    `sample` draws items. joint: {modalities, temperature} of diffusion decoders whose items are drawn together, by
    `sample_joint` (CoDi, see `vfm.decoders.joint`). Where a call generates an item of each of them, their losses are
    those of joint generation, and out["joint"] has embeddings {"noisy", "clean": {X: float32[B, N, E]}} of what the
    decoders see of each other, and the scale of their products; `sample` draws one of them alone.

    Args of the call (B rows, T sequence positions, N items of a modality per row):
      tokens: int32[B, T]; any value where no text stands. None: a model or a call without text.
      inputs: {X: float[B, N, *item_shape]}.
      starts: {X: int32[B, N]}, where the features of each item begin in the sequence; -1: the item is not an input.
      signal_starts: {X: int32[B, N]}, where the signal slots of each item begin; -1: the item is not generated.
      masked: {X: bool[B, N, P]}, which slots of the items hold the learned inputs of X's signals instead of features.
      input_mask: bool[B, T], False at padding. segment_ids, positions: int32[B, T], for packed rows. token_types,
        prefix, block_positions, order: see the backbones that have them.
      decoder_tokens: int32[B, U], for a backbone that reads two sequences: its encoder then reads all of the above but
        the signals, which stand in the decoder's sequence, and its decoder reads these tokens. decoder_mask:
        bool[B, U]; decoder_segment_ids, decoder_positions: int32[B, U].
      cache: the backbone's cache, for generation token by token.

    Returns (logits, out). logits: float[B, T, V] of the text decoder (U for T with an encoder–decoder); without one
    those of a decoder of labels, float[B, classes], if there is one, else None. out["backbone"] is the backbone's dict,
    out["output"] float[B, T, D] what it gave; out[X] has features float[B, N, P, W] = ME(item), predicted
    float[B, N, P, W] = OP(hidden states of the signals), recovered float[B, N, P, W] = OP(hidden states of the slots of
    a masked item), decoded and reconstructed float[B, N, *item_shape] = MD(predicted) and MD(features), where blocks
    exist, and encoder and decoder, the dicts of ME(item) and MD(features), of B·N items; for a generative decoder
    condition float[B, N, P, W] in place of predicted, and losses {name: float[B, N]}; for labels logits and pooled
    float[B, D]. With an alignment
    out[X]["embedding"]: float32[B, N, E]; out["logit_scale"]: float32[], at most max_scale; and out["logit_bias"].
    """

    centre: str
    encoders: Mapping[str, nn.Module]
    input_projectors: Mapping[str, nn.Module]
    backbone: nn.Module | None
    output_projectors: Mapping[str, nn.Module]
    decoders: Mapping[str, nn.Module]
    alignment: Mapping[str, Any] | None = None
    discriminators: Mapping[str, nn.Module] = FrozenDict()
    joint: Mapping[str, Any] | None = None

    def setup(self):
        if self.alignment is not None:
            start = -math.log(self.alignment["temperature"])
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(start), (), jnp.float32)
            bias = self.alignment["bias"]
            if bias is not None:
                self.logit_bias = self.param("logit_bias", nn.initializers.constant(bias), (), jnp.float32)
        self.signals = {
            name: self.param(
                f"signals_{name}", nn.initializers.normal(self.backbone.width**-0.5), (count, self.backbone.width)
            )
            for name in modalities(self)
            if (count := num_signals(self, name))
        }

    def __call__(
        self,
        tokens=None,
        *,
        inputs=None,
        starts=None,
        signal_starts=None,
        masked=None,
        decoder_tokens=None,
        cache=None,
        train: bool,
        **rest,
    ):
        inputs, starts, signal_starts, masked = inputs or {}, starts or {}, signal_starts or {}, masked or {}
        out: dict[str, Any] = self._scale()
        if self.is_initializing():
            for name, block in self.discriminators.items():
                block(jnp.zeros((1, *self.item_block(name).item_shape)), train=train)
        if self.backbone is None:
            if tokens is not None or cache is not None or rest or starts or signal_starts:
                raise UserError("a model without a backbone reads no sequence: it takes `inputs` alone")
            return self._items_alone(inputs, train, out)
        call = self._backbone_call(rest, decoder_tokens, tokens is not None or bool(inputs), cache)
        for name in masked:
            if not all(name in group for group in (self.encoders, inputs, starts)):
                raise unknown("modality", name, starts, "`masked`, whose items must have a place in the sequence")
        mask = call.get("input_mask")
        x = self._embed(tokens, mask, train) if tokens is not None or mask is not None else None
        for name, items in inputs.items():
            if name not in self.encoders:
                continue  # a target only
            out[name], features = self._encode(name, items, train)
            self._reconstruct(name, features, items, train, out)
            if name in starts:
                slots = self._project_in(name, features, train)
                if name in masked:
                    slots = self._mask(name, slots, masked[name])
                x = place(x, slots, starts[name])
        separate = reads_two(self.backbone)
        y = self._embed(decoder_tokens, call.get("decoder_mask"), train) if decoder_tokens is not None else x
        for name, at in signal_starts.items():
            if name in self.signals:
                signals = self.signals[name].astype(y.dtype)
                y = place(y, signals[None].repeat(at.size, axis=0), at)
        y = constrain(y, "batch", "length", "width")
        if separate:
            x = None if x is None else constrain(x, "batch", "length", "width")
            call["decoder_x"] = y
            if decoder_tokens is None:
                # The decoder reads the encoder's sequence (see `EncoderDecoder`), padding and all.
                for name in ("mask", "segment_ids", "positions"):
                    of_encoder = call.get("input_mask" if name == "mask" else name)
                    if of_encoder is not None:
                        call.setdefault(f"decoder_{name}", of_encoder)
        x, out["backbone"] = self.backbone(x if separate else y, **call, train=train)
        out["output"] = x
        jointly = self._jointly(inputs, [name for name in signal_starts if name in self.signals])
        for name, at in signal_starts.items():
            if name in self.signals:
                hidden = gather(x, at, self.signals[name].shape[0])
                found = self._generate(name, hidden, at.shape, inputs, train, name in jointly)
                out[name] = {**out.get(name, {}), **found}
        together.put_losses(self, jointly, inputs, train, out)
        for name, which in masked.items():
            hidden = self._project_out(name, gather(x, starts[name], which.shape[2]), train)
            out[name]["recovered"] = hidden.reshape(*which.shape[:2], *hidden.shape[1:])
        logits = self._label(x, call.get("decoder_mask" if separate else "input_mask"), train, out)
        return (self.text_logits(x, train=train) if "text" in self.decoders else logits), out

    def text_logits(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float[B, T, V] of the text decoder for what the backbone gave, out["output"] float[B, T, D]."""
        h = self._project_out("text", x, train)
        extra = {"attend": self.encoders["text"].attend} if self.decoders["text"].tied else {}
        return self.decoders["text"](h, train=train, **extra)[0]

    def _backbone_call(self, given, decoder_tokens, reads: bool, cache) -> dict[str, Any]:
        """The arguments of the backbone; `UserError` for one that it, or the model, does not have."""
        takes = inspect.signature(type(self.backbone).__call__).parameters
        call = {name: value for name, value in {**given, "cache": cache}.items() if value is not None}
        what = f"model.backbone ({type(self.backbone).__name__})"
        for name in given:
            if name not in BACKBONE_INPUTS:
                raise unknown("argument", name, INPUTS, "the call of the model")
        for name in call:
            if name not in takes:
                raise UserError(f"{what} takes no {name}; it has {', '.join(n for n in takes if n != 'self')}")
        if reads_two(self.backbone):
            if decoder_tokens is None and (cache is not None or not reads):
                raise UserError(f"{what} needs decoder_tokens")
        elif decoder_tokens is not None:
            raise UserError(f"{what} takes no decoder_tokens; they are for encoder_decoder and cross_encoder")
        return call

    def _scale(self) -> dict[str, jax.Array]:
        if self.alignment is None:
            return {}
        scale = {"logit_scale": jnp.exp(jnp.minimum(self.logit_scale, math.log(self.alignment["max_scale"])))}
        return scale if self.alignment["bias"] is None else {**scale, "logit_bias": self.logit_bias}

    def _encode(self, name, items, train):
        """What `out` holds of items [B, N, …], and their features float[B·N, P, W]."""
        lead = items.shape[:2]
        features, encoder_out = self.encoders[name](items.reshape(-1, *items.shape[2:]), train=train)
        out = {"features": features.reshape(*lead, *features.shape[1:]), "encoder": encoder_out}
        if self.alignment is not None:
            y = self._project_in(name, _summary(features, encoder_out)[:, None], train)[:, 0].astype(jnp.float32)
            norm = jnp.sqrt(jnp.maximum(jnp.square(y).sum(axis=-1, keepdims=True), 1e-12))  # has a gradient at 0
            out["embedding"] = (y / norm).reshape(*lead, -1)
        return out, features

    def _label(self, x, mask, train, out):
        """Puts what the decoders of labels give for x float[B, T, D] into `out`; their logits, or None."""
        logits = None
        for name in labels(self):
            found, pooled = self.decoders[name](x, input_mask=mask, train=train)
            out[name] = pooled
            if self.decoders[name].num_classes is not None:
                out[name], logits = {"logits": found, **pooled}, found
        return logits

    def _embed(self, tokens, mask, train):
        """Features of the centre for tokens int32[B, T]; zeros where there is no text."""
        if tokens is not None and "text" in self.encoders:
            x, _ = self.encoders["text"](tokens, train=train)
            return self._project_in("text", x, train)
        shape = mask.shape if tokens is None else tokens.shape
        return jnp.zeros((*shape, self.backbone.width), jnp.dtype(self.backbone.dtype))

    def _project_in(self, name, features, train):
        return self.input_projectors[name](features, train=train)[0] if name in self.input_projectors else features

    def _project_out(self, name, hidden, train):
        return self.output_projectors[name](hidden, train=train)[0] if name in self.output_projectors else hidden

    def _mask(self, name, features, which):
        """Features float[B·N, P, D] with the inputs of the signals where `which` bool[B, N, P] says so."""
        signals, count = self.signals.get(name), features.shape[1]
        if signals is None or len(signals) != count or reads_two(self.backbone):
            raise UserError(
                f"model: slots of {name} can be masked with an output projector that has a signal for each of the "
                f"{count} slots, and a backbone that reads items and text as one sequence"
            )
        return jnp.where(which.reshape(-1, count, 1), signals[None].astype(features.dtype), features)

    def _items_alone(self, inputs, train, out):
        """What a model without a backbone gives: (logits of labels or None, out)."""
        condition = summary = lead = None
        for name, items in inputs.items():
            if name in self.encoders:
                out[name], features = self._encode(name, items, train)
                self._reconstruct(name, features, items, train, out)
                if name == self.centre:
                    condition, lead = features, items.shape[:2]
                    summary = _summary(features, out[name]["encoder"]).reshape(*lead, -1)
        jointly = self._jointly(inputs, generative(self))
        for name in generative(self):
            items = inputs.get(name)
            given = items if items is not None else inputs.get(controls(self).get(name))
            if condition is not None:
                if items is not None and items.shape[:2] != lead:
                    raise UserError(
                        f"the model generates an item of {name} from each item of {self.centre}, but the batch has "
                        f"{list(items.shape[:2])} of {name} and {list(lead)} of {self.centre}"
                    )
                found = self._generate(name, condition, lead, inputs, train, name in jointly)
            elif given is not None and self.centre not in self.encoders:
                found = self._generate(name, None, given.shape[:2], inputs, train, name in jointly)
            else:
                continue
            out[name] = {**out.get(name, {}), **found}
        together.put_losses(self, jointly, inputs, train, out)
        return (self._label(summary, None, train, out) if summary is not None else None), out

    def _reconstruct(self, name, features, items, train, out):
        """Puts MD(features) into out[name], if there is a decoder that takes the encoder's features."""
        if name in self.decoders and name not in (*generative(self), *labels(self)):
            item, out[name]["decoder"] = self.decoders[name](features, train=train)
            out[name]["reconstructed"] = item.reshape(*items.shape[:2], *item.shape[1:])

    def _jointly(self, inputs, generated) -> tuple[str, ...]:
        """The modalities whose losses are those of joint generation."""
        names = self.joint["modalities"] if self.joint is not None else ()
        ready = self.has_rng("noise") or self.is_initializing()
        return names if ready and all(name in inputs and name in generated for name in names) else ()

    def _generate(self, name, hidden, lead, inputs, train, jointly=False):
        """What `out` holds of the items [B, N, …] generated from hidden float[B·N, K, D], or from nothing (None).

        jointly: their losses come later.
        """
        predicted = None if hidden is None else self._project_out(name, hidden, train)
        if name not in generative(self):
            out = {"predicted": predicted.reshape(*lead, *predicted.shape[1:])}
            if name in self.decoders:
                item, _ = self.decoders[name](predicted, train=train)
                out["decoded"] = item.reshape(*lead, *item.shape[1:])
            return out
        out = {} if predicted is None else {"condition": predicted.reshape(*lead, *predicted.shape[1:])}
        items, control = inputs.get(name), inputs.get(controls(self).get(name))
        more = {}
        if control is not None:
            if control.shape[:2] != tuple(lead):
                raise UserError(
                    f"the batch has {list(control.shape[:2])} items of {controls(self)[name]}, which control the "
                    f"{list(lead)} items of {name}"
                )
            out["control"], more["control"] = control, control.reshape(-1, *control.shape[2:])
        if items is not None and not jointly and (self.has_rng("noise") or self.is_initializing()):
            _, found = self.decoders[name](predicted, items.reshape(-1, *items.shape[2:]), **more, train=train)
            out["losses"] = {term: loss.reshape(lead) for term, loss in found["losses"].items()}
            if "scales" in found:
                out["scales"] = found["scales"].reshape(*lead, -1)
        return out

    def sample(self, name: str, out: Mapping[str, Any], *, rng: jax.Array, batch_size: int | None = None, **settings):
        """Items of a modality that has a generative decoder, float[B, N, *item_shape], under the conditions in `out`.

        out: what a call gave. Where there are no conditions, batch_size items are drawn, N = 1. settings: those of the
        decoder's `sample`.
        """
        if name not in generative(self):
            raise unknown("modality", name, generative(self), "the generative decoders of the model")
        condition, control = (out.get(name, {}).get(field) for field in ("condition", "control"))
        if control is not None:
            settings = {"control": control.reshape(-1, *control.shape[2:]), **settings}
            batch_size = batch_size or len(settings["control"])
        if condition is None:
            return self.decoders[name].sample(None, rng=rng, batch_size=batch_size or 1, **settings)[:, None]
        lead = condition.shape[:2]
        items = self.decoders[name].sample(condition.reshape(-1, *condition.shape[2:]), rng=rng, **settings)
        return items.reshape(*lead, *items.shape[1:])

    def sample_joint(self, out: Mapping[str, Any], *, rng: jax.Array, batch_size: int | None = None, **settings):
        """Items {X: float[B, N, *item_shape]} of the modalities of `model.joint`, drawn together.

        Arguments as in `sample`.
        """
        return together.draw(self, out, rng=rng, batch_size=batch_size, **settings)

    def discriminate(self, name: str, items: jax.Array, *, train: bool):
        """Logits of the discriminator of a modality for items float[B, N, *item_shape]: (float[B·N, …], its dict)."""
        if name not in self.discriminators:
            raise unknown("modality", name, self.discriminators, "model.discriminators")
        return self.discriminators[name](items.reshape(-1, *items.shape[2:]), train=train)

    def item_block(self, name: str) -> nn.Module:
        """What says what the raw items of a modality are: its encoder, or its decoder, or the one that it controls."""
        if name in self.encoders or name in self.decoders:
            return self.encoders[name] if name in self.encoders else self.decoders[name]
        return next(self.decoders[of].control_item for of, source in controls(self).items() if source == name)

    def init_cache(self, batch_size: int, length: int, encoder_length: int | None = None):
        """The backbone's empty cache for `length` tokens, and `encoder_length` of the encoder of an encoder–decoder."""
        lengths = (length,) if encoder_length is None else (length, encoder_length)
        return self.backbone.init_cache(batch_size, *lengths)


def _summary(features: jax.Array, encoder_out: Mapping[str, Any]) -> jax.Array:
    """float[B, W] of features float[B, P, W]: what the encoder gives for it, or their mean."""
    return encoder_out["pooled"] if "pooled" in encoder_out else features.mean(axis=1)


def place(x: jax.Array, features: jax.Array, starts: jax.Array) -> jax.Array:
    """Writes features float[B·N, L, D] into x float[B, T, D], item n of row b from starts[b, n] on; none at -1."""
    B, T, D = x.shape
    index = _slots(starts, features.shape[1], T)
    return jax.vmap(lambda row, i, f: row.at[i].set(f, mode="drop"))(
        x, index, features.reshape(B, -1, D).astype(x.dtype)
    )


def gather(x: jax.Array, starts: jax.Array, count: int) -> jax.Array:
    """The inverse of `place`: float[B·N, count, D] read from starts[b, n] on; zeros at -1."""
    B, T, D = x.shape
    index = _slots(starts, count, T)
    rows = jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(x, index)
    return rows.reshape(-1, count, D)


def _slots(starts, count, T):
    """int32[B, N·count] sequence indices; T (outside, so that it is dropped) for items with start -1."""
    index = starts[:, :, None] + jnp.arange(count)[None, None]
    return jnp.where(starts[:, :, None] < 0, T, index).reshape(starts.shape[0], -1)


def layout(model: VFM, length: int, items: int = 1) -> Layout:
    """What the data layer must know: sequence length, and shape and slots of every modality but text."""
    table = {}
    for name in modalities(model):
        encoder, projector = model.encoders.get(name), model.input_projectors.get(name)
        slots = (getattr(projector, "num_tokens", None) or encoder.num_tokens) if encoder is not None else 0
        block = model.item_block(name)
        kind = getattr(block, "item_dtype", "float32")
        # An item that is generated is compared with the true one, all of it.
        missing = getattr(encoder, "takes_missing", False) and name not in model.decoders
        table[name] = Modality(tuple(block.item_shape), slots, num_signals(model, name), items, kind, missing)
    return Layout(length, table)


def example_batch(model: VFM, length: int, batch_size: int = 1) -> dict[str, Any]:
    """A batch of zeros that reaches every parameter, as ShapeDtypeStructs: for initialisation and shape evaluation."""
    shapes = layout(model, length).modalities
    inputs = {
        name: jax.ShapeDtypeStruct((batch_size, 1, *m.item_shape), jnp.dtype(m.dtype))
        for name, m in shapes.items()
        if name in model.encoders or name in generative(model) or name in controls(model).values()
    }
    if model.backbone is None:
        return {"inputs": inputs}
    index = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
    batch = {
        "input_mask": jax.ShapeDtypeStruct((batch_size, length), bool),
        "inputs": inputs,
        "starts": {name: index for name in shapes if name in model.encoders},
        "signal_starts": {name: index for name in shapes},
    }
    if "text" in model.encoders and not text_is_item(model):
        batch["tokens"] = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        if reads_two(model.backbone):
            batch["decoder_tokens"] = batch["tokens"]
    return batch


def init(model: VFM, key: jax.Array, length: int) -> dict[str, Any]:
    """All variables of the model. Pure: call it inside `jit` with `out_shardings`."""
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), example_batch(model, length))
    return model.init(key, **batch, train=False)


_KINDS = tuple((kind, table) for kind, table in TABLES.items() if kind != "backbone")


def build(cfg: Mapping[str, Any]) -> VFM:
    """The model of `config.model`: {centre, dtype, encoders: {X: {name, **fields}}, input_projectors, backbone, …}.

    The projectors of the centre are left out, so that the centre can be changed by one field; not so in a model with an
    alignment and no backbone, where the centre has none but that of the pairs it is trained on. A model without a
    backbone has an alignment, or says backbone: None. `discriminators` {X: {name, **fields}} are for the objective
    `adversarial`. `joint` {modalities, temperature, **fields of `Environment`}: diffusion decoders that draw their
    items together. Raises `UserError` for unknown names and fields, and for a chain that does not fit, naming both
    blocks and both widths.
    """
    cfg = dict(cfg)
    alignment, joint = cfg.pop("alignment", None), cfg.pop("joint", None)
    alone = not cfg.get("backbone") and (alignment is not None or "backbone" in cfg)
    for field in () if alone else ("centre", "backbone"):
        if not cfg.get(field):
            raise UserError(f"model.{field} is missing; give {'a modality' if field == 'centre' else 'a block'}")
    centre, dtype = cfg.pop("centre", ""), cfg.pop("dtype", "float32")
    groups = {}
    for kind, table in _KINDS:
        blocks = dict(cfg.pop(kind, {}))
        if kind == "decoders" and joint:
            names, temperature, fields = together.parse(joint, blocks)
            build_block({"environment": together.Environment}, {**fields, "name": "environment"}, "model.joint")
            blocks |= {name: {**blocks[name], "environment": fields} for name in names}
            joint = FrozenDict({"modalities": names, "temperature": temperature})
        if kind.endswith("projectors") and not alone:
            blocks.pop(centre, None)
        # Frozen, so that the model is hashable and can be a static argument of jit.
        groups[kind] = FrozenDict(
            {
                name: build_block(table, block, f"model.{kind}.{name}", dtype)
                for name, block in sorted(blocks.items())
                if block
            }
        )
    backbone = cfg.pop("backbone", None)
    backbone = None if alone else build_block(TABLES["backbone"], backbone, "model.backbone", dtype)
    if cfg:
        known = ["centre", "dtype", "backbone", "alignment", "joint", *(k for k, _ in _KINDS)]
        raise unknown("field", next(iter(cfg)), known, "model")
    model = VFM(
        centre,
        groups["encoders"],
        groups["input_projectors"],
        backbone,
        groups["output_projectors"],
        groups["decoders"],
        None if alignment is None else _alignment(alignment),
        groups["discriminators"],
        joint or None,
    )
    check(model)
    if model.joint is not None:
        together.check({name: model.decoders[name] for name in model.joint["modalities"]}, PROCESSES)
    return model


def _alignment(cfg: Mapping[str, Any]) -> FrozenDict:
    """The fields of `model.alignment`; `UserError` for one that is unknown or out of range."""
    found = {"temperature": 0.07, "max_scale": 100.0, "bias": None}
    for field, value in dict(cfg).items():
        if field not in found:
            raise unknown("field", field, found, "model.alignment")
        if not isinstance(value, int | float) and not (field == "bias" and value is None):
            raise UserError(f"model.alignment.{field}={value!r} must be a number")
        if field != "bias" and not value > 0:
            raise UserError(f"model.alignment.{field}={value} must be more than 0")
        found[field] = value
    return FrozenDict(found)
