"""`config.mode=generate`: input processing -> model -> output processing -> presentation."""

import json
import pathlib

import jax
import numpy as np

from vfm import distributed, report
from vfm.data.audio import read_audio
from vfm.data.image import read_image
from vfm.data.interleave import Input, Output, Text, interleave
from vfm.data.pairs import Task
from vfm.errors import UserError, unknown
from vfm.generate import generate


def answer(experiment, weights, path: pathlib.Path) -> dict[str, float]:
    """Answers one request, `config.generate`; writes generated.jsonl and generated.html to the folder.

      task         "image+text->text", "text->image", …: what is given and what is wanted; empty: continue the text
      text         the text input
      files        inputs of other modalities, "image=four.png,audio=tone.wav" (.npy, .png, .jpg, .wav)
      max_new      most new tokens; temperature: 0 is greedy; samples: how many answers

    Raises `UserError` for files that are missing, cannot be read, or do not fit the modality.
    """
    cfg, model, tokenizer = experiment.config.generate, experiment.model, experiment.tokenizer
    for field, lowest in (("max_new", 1), ("samples", 1), ("temperature", 0)):
        if not cfg[field] >= lowest:
            raise UserError(f"config.generate.{field}={cfg[field]} must be {lowest} or more")
    inputs, output = Task.split(cfg.task) if cfg.task else (("text",), "text")
    files = _files(cfg.files)
    for name in {*inputs, output} - {"text"}:
        experiment.layout.modality(name)
    for name in files:
        if name not in inputs:
            raise UserError(f"config.generate.files gives {name!r}, which is no input of the task {cfg.task!r}")
    if missing := set(inputs) - {"text"} - set(files):
        raise UserError(f"config.generate.files: the task {cfg.task!r} needs {', '.join(sorted(missing))}=FILE")
    segments = [Text([tokenizer.bos_id])]
    for name in inputs:
        item = None if name == "text" else _read(experiment, name, files[name])
        if item is not None and not np.isfinite(item).all():
            raise UserError(f"config.generate.files: {name}={files[name]} holds numbers that are not finite")
        segments.append(Text(cfg.text) if name == "text" else Input(name, item))
    if cfg.task:
        segments.append(Text([tokenizer.token_id(f"<{output}>")]))
    if output != "text":
        segments.append(Output(output))
    row = interleave(segments, experiment.layout, tokenizer)
    size = cfg.samples if output == "text" else 1
    # The mesh divides the batch; rows are alike until sampling parts them.
    full = -(-size // experiment.config.eval.batch_size) * experiment.config.eval.batch_size
    host = {**jax.tree.map(lambda x: np.stack([x] * full), row), "example_mask": np.ones((full,), np.float32)}
    batch, variables = experiment.put(host), {"params": weights["params"], **weights["variables"]}
    page = report.Report(experiment.config.title or "vfm")
    cells = [("text", cfg.text)] if "text" in inputs else []
    cells += [_cell(experiment, name, host["inputs"][name][0, 0]) for name in files]
    records, rows = [], []
    if output == "text":
        with experiment.use_mesh():
            tokens = experiment.fetch(
                generate(
                    model,
                    variables,
                    batch,
                    max_new=cfg.max_new,
                    eos_id=tokenizer.eos_id,
                    temperature=cfg.temperature,
                    rng=jax.random.key(experiment.config.seed),
                )
            )
        for ids in tokens[:size].tolist():
            text = tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)
            records.append({"task": cfg.task, "text": cfg.text, "files": files, "answer": text})
            rows.append([*cells, ("text", text)])
            if distributed.is_main():
                print(text)
    else:
        found = experiment.forward(variables, batch)[output]
        key = "decoded" if "decoded" in found else "predicted"
        item = experiment.fetch(found[key])[0, 0]
        file = path / f"generated_{output}.npy"
        records.append({"task": cfg.task, "text": cfg.text, "files": files, "answer": file.name, "is": key})
        rows.append(
            [
                *cells,
                _cell(experiment, output, item)
                if key == "decoded"
                else ("text", f"features of {output}, {item.shape}, in {file.name}"),
            ]
        )
        if distributed.is_main():
            np.save(file, item)
            print(f"wrote {file}")
    if distributed.is_main():
        report.write_atomic(path / "generated.jsonl", "".join(f"{json.dumps(r)}\n" for r in records).encode())
        page.samples("generated", rows, f"Request: {cfg.task or 'continue the text'}")
        page.write(path, "generated.html")
        print(f"wrote {path / 'generated.html'}")
    return {}


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
            return np.load(path, allow_pickle=False).astype(np.float32)
        except ValueError as error:
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
