"""`config.mode=generate`: input processing -> model -> output processing -> presentation."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np

from vfm import distributed, report
from vfm.beam import beam_search
from vfm.data.audio import read_audio
from vfm.data.image import read_image
from vfm.data.interleave import Input, Output, Text, check_shape, interleave
from vfm.data.pairs import Task
from vfm.errors import UserError, unknown
from vfm.evaluate.generation import drawer, sampler_settings
from vfm.generate import bucket, check_length, fill, generate, stream
from vfm.sampling import Sampling
from vfm.stopping import TextStream, cut, stop_strings
from vfm.tokenizers import ImageTokenizer
from vfm.wiring import controls, generative

# Fields of `config.generate` that are those of `Sampling`.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "min_new")
EARLY_STOPPING = {"false": False, "true": True, "never": "never"}


def answer(experiment, weights, path: pathlib.Path) -> dict[str, float]:
    """Answers one request, `config.generate`; writes generated.jsonl and generated.html to the folder.

      task         "image+text->text", "text->image", …: what is given and what is wanted; empty: continue the text
      text         the text input; names of special tokens in it are these tokens for an encoder (masks, sentinels)
      files        inputs of other modalities, "image=four.png,audio=tone.wav" (.npy, .png, .jpg, .wav)
      max_new      most new tokens, min_new: fewest; stop: strings that end an answer, and are left out of it
      samples      how many answers
      stream       print the answer as it comes
      temperature  0: the best token, else a draw after the filters top_k, top_p, min_p
      repetition_penalty, no_repeat_ngram_size: see `Sampling`
      beams        more than 1: beam search; length_penalty, early_stopping (false, true, never): see `beam_search`
      mask, steps  of an encoder-only backbone, which fills the masks of the text: see `fill`

    A generative decoder draws `samples` items, with the settings of its sampler in `config.eval.generation`. A model
    without a backbone draws under the item of its centre, "label->image": a class is given as `text`, "3"; the items of
    other modalities as files. Where the decoder has a control, it may be given as well: "label+edges->image".

    Raises `UserError` for fields out of range, and for files that are missing, cannot be read, or do not fit the
    modality.
    """
    cfg, model = experiment.config.generate, experiment.model
    draws = generative(model)
    if model.backbone is None and not draws:
        raise UserError(
            "config.mode=generate needs a backbone or a generative decoder; evaluators tell what an autoencoder gives "
            "back and draws (config.mode=evaluate)"
        )
    _check(experiment, cfg)
    inputs, output = Task.split(cfg.task) if cfg.task else (("text",), "text")
    if model.backbone is None:
        drawn = output if output in draws else draws[0]
        control = controls(model).get(drawn)
        asked = [f"{model.centre}->{drawn}", *([f"{model.centre}+{control}->{drawn}"] if control else [])]
        if output not in draws or set(inputs) - {control} != {model.centre}:
            raise UserError(
                f"config.generate.task={cfg.task!r} must be {' or '.join(map(repr, asked))} with this model, which has "
                "no backbone"
            )
    if "text" in (*inputs, output) and isinstance(experiment.tokenizer, ImageTokenizer):
        raise UserError(
            f"config.mode=generate writes text, and the tokens of tokenizer {experiment.config.tokenizer.name!r} are "
            "images; the evaluator 'visual' draws them (config.mode=evaluate)"
        )
    files = _files(cfg.files)
    for name in {*inputs, output} - {"text"}:
        experiment.layout.modality(name)
    alone = model.backbone is None  # the class of an item of its centre, or nothing, is given then
    given_as_text = {name for name in inputs if name == "text" or (alone and not _from_file(experiment, name))}
    for name in files:
        if name not in inputs:
            raise UserError(f"config.generate.files gives {name!r}, which is no input of the task {cfg.task!r}")
    if missing := set(inputs) - given_as_text - set(files):
        raise UserError(f"config.generate.files: the task {cfg.task!r} needs {', '.join(sorted(missing))}=FILE")
    row = _row(experiment, inputs, output, files) if model.backbone is not None else _items(experiment, files)
    count = cfg.samples if output == "text" or output in draws else 1
    shards = math.prod(experiment.mesh.shape[axis] for axis in experiment.rules["batch"])
    full = -(-count // shards) * shards  # the mesh divides the batch; rows are alike until sampling parts them
    host = {**jax.tree.map(lambda x: np.stack([x] * full), row), "example_mask": np.ones((full,), np.float32)}
    batch, variables = experiment.put(host), {"params": weights["params"], **weights["variables"]}
    page = report.Report(experiment.config.title or "vfm")
    cells = [("text", cfg.text)] if cfg.text and given_as_text & {*inputs} else []
    cells += [_cell(experiment, name, host["inputs"][name][0, 0]) for name in files]
    request = {"task": cfg.task, "text": cfg.text, "files": files}
    records, rows = [], []
    if output == "text":
        with experiment.use_mesh():
            found = _texts(experiment, variables, batch)
        for text, more in found:
            records.append({**request, "answer": text, **more})
            rows.append([*cells, ("text", text)])
    elif output in draws:
        draw = drawer(experiment, output, sampler_settings(experiment))
        items = experiment.fetch(draw(variables, batch, jax.random.key(experiment.config.seed)))[:count, 0]
        for i, item in enumerate(items):
            file = path / f"generated_{output}{f'_{i}' if count > 1 else ''}.npy"
            records.append({**request, "answer": file.name, "is": "drawn"})
            rows.append([*cells, _cell(experiment, output, item)])
            if distributed.is_main():
                np.save(file, item)
                print(f"wrote {file}")
    else:
        found = experiment.forward(variables, batch)[output]
        key = "decoded" if "decoded" in found else "predicted"
        item = experiment.fetch(found[key])[0, 0]
        file = path / f"generated_{output}.npy"
        records.append({**request, "answer": file.name, "is": key})
        shown = ("text", f"features of {output}, {item.shape}, in {file.name}")
        rows.append([*cells, _cell(experiment, output, item) if key == "decoded" else shown])
        if distributed.is_main():
            np.save(file, item)
            print(f"wrote {file}")
    if distributed.is_main():
        report.write_atomic(path / "generated.jsonl", "".join(f"{json.dumps(r)}\n" for r in records).encode())
        page.samples("generated", rows, f"Request: {cfg.task or 'continue the text'}")
        page.write(path, "generated.html")
        print(f"wrote {path / 'generated.html'}")
    return {}


def _check(experiment, cfg) -> None:
    """Refuses fields out of range, and those that do not go together."""
    for field, lowest in (("max_new", 1), ("samples", 1), ("beams", 1), ("steps", 1)):
        if not cfg[field] >= lowest:
            raise UserError(f"config.generate.{field}={cfg[field]} must be {lowest} or more")
    try:
        Sampling(**{name: cfg[name] for name in SAMPLING})
    except UserError as error:
        raise UserError(f"config.generate.{error}") from None
    if not math.isfinite(cfg.length_penalty):
        raise UserError(f"config.generate.length_penalty={cfg.length_penalty} must be a finite number")
    if cfg.early_stopping not in EARLY_STOPPING:
        raise unknown("value", cfg.early_stopping, EARLY_STOPPING, "config.generate.early_stopping")
    for text in cfg.stop:
        if not isinstance(text, str) or not text:
            raise UserError(f"config.generate.stop={cfg.stop!r} must hold strings that are not empty")
    if cfg.beams > 1 and cfg.temperature:
        raise UserError(
            f"config.generate.beams={cfg.beams} searches for the best answer: set temperature to 0, or beams to 1"
        )
    if 1 < cfg.beams < cfg.samples:
        raise UserError(f"config.generate.samples={cfg.samples} is more than config.generate.beams={cfg.beams}")
    in_order = getattr(experiment.model.backbone, "kind", "encoder_only") != "encoder_only"
    if cfg.stream and (cfg.samples > 1 or cfg.beams > 1 or not in_order):
        raise UserError(
            "config.generate.stream prints one answer as it comes: set samples and beams to 1 (an encoder-only "
            "backbone has no such order)"
        )


def _from_file(experiment, name: str) -> bool:
    """Whether a modality has an encoder or controls a decoder, and items that are more than one number."""
    known = {*experiment.model.encoders, *controls(experiment.model).values()}
    return name in known and bool(experiment.layout.modality(name).item_shape)


def _items(experiment, files) -> dict:
    """The items of the centre and of a control as one row of a batch for a model without a backbone."""
    cfg, centre, found = experiment.config.generate, experiment.model.centre, {}
    for name in files:
        item = _read(experiment, name, files[name])
        if not experiment.layout.modality(name).readable(item):
            raise UserError(f"config.generate.files: {name}={files[name]} holds numbers that are not finite")
        found[name] = check_shape(name, experiment.layout.modality(name), item)[None]
    if centre in found or centre not in experiment.model.encoders:
        return {"inputs": found} if found else {}
    classes = getattr(experiment.model.encoders[centre], "num_classes", None)
    if _from_file(experiment, centre) or not cfg.text.isdecimal() or (classes and int(cfg.text) >= classes):
        known = f", 0 to {classes - 1}" if classes else ""
        raise UserError(
            f"config.generate.text={cfg.text!r} must be the number of a class{known}; items of {centre} that are more "
            f"than that are given by config.generate.files={centre}=FILE"
        )
    return {"inputs": {**found, centre: np.array([int(cfg.text)], np.int32)}}


def _row(experiment, inputs, output, files) -> dict:
    """The prompt as one row of a batch, padded to one of few lengths."""
    cfg, model, tokenizer = experiment.config.generate, experiment.model, experiment.tokenizer
    kind, max_len = model.backbone.kind, model.backbone.max_len
    before, after = _frame(experiment)
    segments = [Text(before)]
    for name in inputs:
        item = None if name == "text" else _read(experiment, name, files[name])
        if item is not None and not experiment.layout.modality(name).readable(item):
            raise UserError(f"config.generate.files: {name}={files[name]} holds numbers that are not finite")
        text = tokenizer.encode(cfg.text, allow_special=True) if kind != "decoder_only" else cfg.text
        segments.append(Text(text) if name == "text" else Input(name, item))
    if cfg.task:
        segments.append(Text([tokenizer.token_id(f"<{output}>")]))
    segments.append(Text(after) if output == "text" else Output(output))
    row = interleave(segments, dataclasses.replace(experiment.layout, length=max_len), tokenizer)
    length, most = int(row["input_mask"].sum()), max_len
    if output == "text" and kind == "decoder_only":
        check_length(model, length, cfg.max_new)
        most -= cfg.max_new
    if kind == "encoder_only" and tokenizer.token_id(cfg.mask) not in row["tokens"]:
        raise UserError(f"config.generate.text={cfg.text!r} has no {cfg.mask} to be filled")
    size = bucket(length, most)
    return {name: x if isinstance(x, dict) else x[:size] for name, x in row.items()}


def _frame(experiment) -> tuple[list[int], list[int]]:
    """The ids before and behind a prompt, as in training."""
    kind, tokenizer = experiment.model.backbone.kind, experiment.tokenizer
    if kind == "decoder_only":
        return [tokenizer.bos_id], []
    return ([] if kind == "encoder_decoder" and not _is_bart(experiment) else [tokenizer.bos_id]), [tokenizer.eos_id]


def _is_bart(experiment) -> bool:
    return experiment.config.data.get("corruption", {}).get("name") == "text_infilling"


def _texts(experiment, variables, batch) -> list[tuple[str, dict]]:
    """(answer, what else is known of it) for `config.generate.samples` answers; prints them."""
    cfg, model, tokenizer = experiment.config.generate, experiment.model, experiment.tokenizer
    say = print if distributed.is_main() else lambda *_, **__: None
    if model.backbone.kind == "encoder_only":
        mask_id = tokenizer.token_id(cfg.mask)
        never = [*experiment.unused_ids, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
        tokens = experiment.fetch(fill(model, variables, batch, mask_id=mask_id, steps=cfg.steps, suppress=never))
        text = tokenizer.decode(tokens[0][experiment.fetch(batch["input_mask"])[0]])
        say(text)
        return [(text, {})] * cfg.samples
    call = {
        "max_new": cfg.max_new,
        "eos_id": tokenizer.eos_id,
        "start_id": tokenizer.eos_id if _is_bart(experiment) else tokenizer.pad_id,
        "suppress": experiment.unused_ids,
        "stop": stop_strings(cfg.stop, tokenizer, model.decoders["text"].vocab_size) if cfg.stop else (),
        **{name: cfg[name] for name in SAMPLING},
    }
    keys = {"rng": jax.random.key(experiment.config.seed)}
    if cfg.stream:
        text, written = TextStream(tokenizer, cfg.stop), []

        def write(piece):
            written.append(piece)
            say(piece, end="", flush=True)

        for tokens in stream(model, variables, batch, **call, **keys):
            token = int(experiment.fetch(tokens)[0])
            write(text.push(token) if token != tokenizer.eos_id else "")
        write(text.finish())
        say()
        return [("".join(written), {})]
    scores = None
    if cfg.beams > 1:
        options = {"length_penalty": cfg.length_penalty, "early_stopping": EARLY_STOPPING[cfg.early_stopping]}
        found = beam_search(model, variables, batch, beams=cfg.beams, num_return=cfg.samples, **options, **call)
        tokens, scores = (experiment.fetch(x)[0] for x in found)
    else:
        tokens = experiment.fetch(generate(model, variables, batch, **call, **keys))
    answers = []
    for i, ids in enumerate(tokens[: cfg.samples].tolist()):
        ids = ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids
        answers.append((cut(tokenizer.decode(ids), cfg.stop), {} if scores is None else {"score": float(scores[i])}))
        say(answers[-1][0])
    return answers


def _files(spec: str) -> dict[str, str]:
    files = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, file = part.partition("=")
        if not equals or not file:
            raise UserError(f"config.generate.files: {part!r} must have the form modality=FILE")
        files[name.strip()] = file.strip()
    return files


def _read(experiment, name: str, file: str) -> np.ndarray:
    """The item of a file, brought to the form that the modality's encoder takes."""
    path, shape = pathlib.Path(file), experiment.layout.modality(name).item_shape
    if not path.is_file():
        raise UserError(f"config.generate.files: {name}={file}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            found = np.load(path, allow_pickle=False)
            if not isinstance(found, np.ndarray):
                raise ValueError("it is an archive of several arrays")
            return found.astype(np.float32)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"config.generate.files: {file} is not a .npy array: {error}") from None
    if suffix in (".png", ".jpg", ".jpeg") and len(shape) == 3:
        return read_image(path, "L" if shape[-1] == 1 else "RGB", shape[:2])
    if suffix == ".wav" and len(shape) == 1:
        return read_audio(path, experiment.model.encoders[name].sample_rate, shape[0])
    raise unknown(
        "kind of file",
        suffix,
        (".npy", ".png", ".jpg", ".wav"),
        f"config.generate.files ({name} takes items of shape {shape})",
    )


def _cell(experiment, name, item):
    rate = getattr(experiment.model.encoders.get(name), "sample_rate", None)
    if rate:
        return ("audio", item, rate)
    if item.ndim == 3:
        return ("image", np.clip(item, 0, 1))
    return ("text", np.array2string(item, precision=2, threshold=8))
