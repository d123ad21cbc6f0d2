"""What the blocks of a model are to each other: who reads and gives what, and whether it fits."""

import inspect

import flax.linen as nn

from vfm.errors import UserError, unknown


def labels(model) -> tuple[str, ...]:
    """The names of the decoders that give one class for a whole sequence, sorted."""
    return tuple(sorted(name for name, block in model.decoders.items() if getattr(block, "whole_sequence", False)))


def generative(model) -> tuple[str, ...]:
    """The names of the decoders that draw items under a condition, sorted."""
    return tuple(sorted(name for name, block in model.decoders.items() if getattr(block, "generative", False)))


def autoencoded(model) -> tuple[str, ...]:
    """The modalities whose encoder and decoder are the two halves of an autoencoder, sorted."""
    return tuple(sorted({*model.encoders} & {*model.decoders} - {*generative(model), *labels(model), "text"}))


def controls(model) -> dict[str, str]:
    """X -> the modality whose items control what the generative decoder of X draws, for decoders that have one."""
    found = {name: getattr(model.decoders[name], "control", None) for name in generative(model)}
    for name, control in found.items():
        if control is not None and "from" not in control:
            raise UserError(f"model.decoders.{name}.control needs the field 'from', the modality that controls")
    return {name: control["from"] for name, control in found.items() if control is not None}


def modalities(model) -> tuple[str, ...]:
    """The modalities that the model knows, sorted, but for text that is tokens of the sequence; labels are none."""
    known = {*model.encoders, *model.decoders, *model.output_projectors, *controls(model).values()}
    return tuple(sorted(known - ({*labels(model)} if text_is_item(model) else {"text", *labels(model)})))


def text_is_item(model) -> bool:
    """Whether a whole text is an item like those of other modalities, not tokens of the sequence."""
    return "text" in model.encoders and bool(model.encoders["text"].item_shape)


def reads_two(backbone: nn.Module) -> bool:
    """Whether a backbone reads two sequences: what `inputs` and `tokens` give, and `decoder_tokens`."""
    return "decoder_x" in inspect.signature(type(backbone).__call__).parameters


def num_signals(model, name: str) -> int:
    """Sequence slots from which an item of a modality is generated; 0: the model cannot generate it."""
    projector, decoder = model.output_projectors.get(name), model.decoders.get(name)
    if model.backbone is None:
        return 0
    if projector is None and (name != model.centre or decoder is None) and name not in generative(model):
        return 0
    own = getattr(projector, "num_signals", None)
    return own or (decoder.num_tokens if decoder is not None else model.encoders[name].num_tokens)


def fit(giver, gives, taker, takes, what="width") -> None:
    if gives is not None and takes is not None and gives != takes:
        raise UserError(f"model: {giver} gives {what} {gives}, but {taker} takes {what} {takes}")


def _projected(model, name: str) -> tuple[str, int]:
    """The last block before the shared space of a modality, and the width that it gives."""
    encoder, projector = model.encoders[name], model.input_projectors.get(name)
    giver = f"encoders.{name} ({type(encoder).__name__})"
    if projector is None:
        return giver, encoder.width
    taker = f"input_projectors.{name} ({type(projector).__name__})"
    fit(giver, encoder.width, taker, projector.in_width)
    return taker, projector.width


def _check_read(model) -> None:
    for name in model.input_projectors:
        if name not in model.encoders:
            raise UserError(f"model: input_projectors.{name} has no encoder; add model.encoders.{name}")


def _check_aligned(model) -> None:
    """Refuses a model without a backbone whose embeddings do not have one width, or with blocks that need one."""
    _check_read(model)
    classes, draws, centre = labels(model), generative(model), model.encoders.get(model.centre)
    giver = f"encoders.{model.centre} ({type(centre).__name__})"
    for name in model.output_projectors:
        if name not in draws:
            raise UserError(
                f"model.output_projectors.{name} leads nowhere: without a backbone it is for a generative decoder"
            )
        if centre is None:
            raise UserError(
                f"model.centre={model.centre!r} is no encoder; without a backbone output_projectors.{name} reads its "
                "features"
            )
    for name, block in model.decoders.items():
        taker = f"decoders.{name} ({type(block).__name__})"
        if name in classes:
            if centre is None:
                raise UserError(
                    f"model.centre={model.centre!r} is no encoder; without a backbone decoders.{name} reads its "
                    "features"
                )
            fit(giver, centre.width, taker, block.in_width)
        elif name in draws:
            if centre is not None:
                _check_condition(model, name, giver, centre.width, centre.num_tokens)
        elif name not in model.encoders:
            raise UserError(f"model: {taker} needs a backbone, or encoders.{name} as the first half of an autoencoder")
        else:
            _check_halves(model, name)
    for name, encoder in model.encoders.items():
        if not encoder.item_shape and not hasattr(encoder, "item_dtype"):
            raise UserError(
                f"model.encoders.{name} ({type(encoder).__name__}) reads one token; without a backbone it must read "
                "whole items: for text, 'text_transformer'"
            )
    if model.alignment is None:
        for name in model.input_projectors:
            raise UserError(f"model.input_projectors.{name} leads nowhere: there is no backbone and no model.alignment")
        return
    (first, width), *others = (_projected(model, name) for name in model.encoders)
    for other, gives in others:
        if gives != width:
            raise UserError(f"model: the shared space has one width, but {first} gives {width} and {other} {gives}")


def _check_condition(model, name: str, giver: str, width: int, tokens: int | None) -> None:
    """Refuses a generative decoder that does not take what it is conditioned on."""
    projector, block = model.output_projectors.get(name), model.decoders[name]
    if projector is not None:
        taker = f"output_projectors.{name} ({type(projector).__name__})"
        fit(giver, width, taker, projector.in_width)
        giver, width, tokens = taker, projector.width, projector.num_tokens or tokens
    taker = f"decoders.{name} ({type(block).__name__})"
    fit(giver, width, taker, block.in_width)
    fit(giver, tokens, taker, block.num_tokens, "number of features")


def _check_generative(model, name: str) -> None:
    """Refuses a generative decoder that does not fit what a backbone gives at its signals."""
    projector, decoder, encoder = (g.get(name) for g in (model.output_projectors, model.decoders, model.encoders))
    slots = getattr(projector, "num_signals", None) or decoder.num_tokens
    if slots is None:
        raise UserError(
            f"model.decoders.{name} ({type(decoder).__name__}) takes any number of features; set its num_tokens, the "
            "slots of the sequence that it is conditioned on"
        )
    backbone = f"backbone ({type(model.backbone).__name__})"
    _check_condition(model, name, backbone, model.backbone.width, slots)
    if encoder is not None:
        shapes = tuple(decoder.item_shape), tuple(encoder.item_shape)
        taker = f"encoders.{name} ({type(encoder).__name__})"
        fit(f"decoders.{name} ({type(decoder).__name__})", shapes[0], taker, shapes[1], "items of shape")


def _check_halves(model, name: str) -> None:
    """Refuses a decoder that does not turn the features of the encoder of the same name into its items."""
    encoder, decoder = model.encoders[name], model.decoders[name]
    first, second = f"encoders.{name} ({type(encoder).__name__})", f"decoders.{name} ({type(decoder).__name__})"
    fit(first, encoder.width, second, decoder.in_width)
    fit(first, encoder.num_tokens, second, decoder.num_tokens, "number of features")
    fit(second, tuple(decoder.item_shape or ()), first, tuple(encoder.item_shape), "items of shape")


def _check_discriminators(model) -> None:
    for name in model.discriminators:
        if name not in modalities(model):
            raise unknown("modality", name, modalities(model), "model.discriminators")


def check(model) -> None:
    """Refuses a chain of blocks that does not fit: `UserError` with both blocks and both sizes."""
    _check_discriminators(model)
    if model.backbone is None:
        return _check_aligned(model)
    if model.centre not in {*model.encoders, *model.decoders}:
        raise UserError(
            f"model.centre={model.centre!r} has neither an encoder nor a decoder; modalities: "
            f"{', '.join(sorted({*model.encoders, *model.decoders}))}"
        )

    width = model.backbone.width
    for name in model.encoders:
        fit(*_projected(model, name), f"backbone ({type(model.backbone).__name__})", width)
        if getattr(model.encoders[name], "patch_dropout", 0) and not getattr(
            model.input_projectors.get(name), "num_tokens", None
        ):
            raise UserError(
                f"model.encoders.{name}.patch_dropout would leave slots of the backbone's sequence empty; take an "
                "input projector that gives a number of features of its own, such as 'resampler', or no patch_dropout"
            )
    classes = labels(model)
    for name in classes:
        block = model.decoders[name]
        backbone = f"backbone ({type(model.backbone).__name__})"
        fit(backbone, width, f"decoders.{name} ({type(block).__name__})", block.in_width)
    items = (*model.output_projectors, *(n for n in model.decoders if n not in model.output_projectors))
    for name in (name for name in items if name not in classes):
        projector, decoder, encoder = (g.get(name) for g in (model.output_projectors, model.decoders, model.encoders))
        giver, gives, tokens = f"backbone ({type(model.backbone).__name__})", width, None
        if projector is not None:
            taker = f"output_projectors.{name} ({type(projector).__name__})"
            fit(giver, gives, taker, projector.in_width)
            giver, gives, tokens = taker, projector.width, projector.num_tokens
        elif name != model.centre and name not in generative(model):
            raise UserError(
                f"model: decoders.{name} has no output projector, and {name} is not the centre "
                f"({model.centre}); add model.output_projectors.{name}"
            )
        if decoder is None and encoder is None:
            raise UserError(
                f"model: {giver} has neither decoders.{name}, to generate items, nor encoders.{name}, to "
                "regress to its features; add one of them"
            )
        if name in generative(model):
            _check_generative(model, name)
            continue
        if decoder is not None:
            taker = f"decoders.{name} ({type(decoder).__name__})"
            fit(giver, gives, taker, decoder.in_width)
            fit(giver, tokens, taker, decoder.num_tokens, "number of features")
        if encoder is not None and name != "text":
            # The projector regresses to the encoder's features, and the decoder takes both.
            taker = f"encoders.{name} ({type(encoder).__name__}), its regression target,"
            fit(giver, gives, taker, encoder.width)
            fit(giver, tokens, taker, encoder.num_tokens, "number of features")
            if decoder is not None:
                _check_halves(model, name)
    _check_read(model)
    tied = getattr(model.decoders.get("text"), "tied", False)
    if tied and "text" not in model.encoders:
        raise UserError("model: decoders.text is tied, but there is no encoders.text to share a table with")
    if tied and not model.output_projectors.get("text"):
        fit(
            f"backbone ({type(model.backbone).__name__})",
            width,
            "encoders.text, tied to decoders.text,",
            model.encoders["text"].width,
        )
    if "text" in model.decoders and "text" in model.encoders and not tied:
        fit(
            "encoders.text",
            model.encoders["text"].vocab_size,
            "decoders.text",
            model.decoders["text"].vocab_size,
            "a vocabulary of",
        )
