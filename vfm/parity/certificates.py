"""The list of all comparisons with trusted libraries, and how they are run and written down."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator

from vfm.parity import (
    functions,
    tokenizer_files,
    torch_adversarial,
    torch_cnn,
    transformers_audio,
    transformers_generation,
    transformers_llava,
    transformers_models,
    transformers_vision,
)

_LIBRARIES = (transformers_models, transformers_vision, transformers_llava, transformers_audio)


@dataclasses.dataclass(frozen=True)
class Check:
    """run() gives the largest absolute difference to the oracle, relative to the largest output where that is above
    one. needs: packages of the oracle, the first of which is it."""

    what: str
    needs: tuple[str, ...]
    tolerance: float
    run: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What a check found; difference None: it could not run, and `note` says why."""

    check: Check
    difference: float | None
    note: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.difference is not None and self.difference <= self.check.tolerance

    @property
    def skipped(self) -> bool:
        """Whether the oracle is not installed."""
        return self.note.endswith("is not installed")


def _family(name: str, part: str) -> float:
    found = _compare(name)
    return getattr(found, part) / max(1.0, found.scale)


@functools.cache
def _compare(name: str):
    return next(module for module in _LIBRARIES if name in module.MODELS).compare(name)


def _tokens(name: str, beams: int) -> float:
    """Share of generated tokens that differ."""
    found = transformers_generation.compare(name, beams=beams)
    return float((found.ours != found.theirs).mean())


def checks() -> Iterator[Check]:
    """All of them, the quick ones first."""
    torch, both = ("torch",), ("transformers", "torch")
    yield Check("attention: grouped, causal in chunks, padded", torch, 1e-5, functions.attention)
    yield Check("Transformer layer, post-norm", torch, 1e-5, functions.transformer_layer)
    yield Check("cross-entropy with smoothing, and gradient", torch, 1e-6, functions.cross_entropy)
    yield Check("AdamW, ten steps", torch, 1e-6, functions.adamw_step)
    yield Check("T5 relative buckets", both, 0.0, functions.relative_buckets)
    yield Check("log-mel spectrogram of Whisper", both, 1e-4, transformers_audio.whisper_log_mel)
    yield Check("filter bank of AST", both, 1e-4, transformers_audio.ast_fbank)
    cnns = {"ResNet": (torch_cnn.resnet, "batch"), "ResNet, groups": (torch_cnn.resnet, "group")}
    cnns |= {"ResNet, bottlenecks": (functools.partial(torch_cnn.resnet, bottleneck=True), "batch")}
    cnns |= {"VGG": (torch_cnn.vgg, "none"), "VGG, batch norm": (torch_cnn.vgg, "batch")}
    for name, (run, norm) in cnns.items():
        what = f"{name}: outputs, gradients, running averages"
        yield Check(what, torch, 1e-4, functools.partial(run, norm))
    for norm in ("batch", "group"):
        what = f"PatchGAN, {norm} norm: logits, gradients, running averages"
        yield Check(what, torch, 1e-4, functools.partial(torch_adversarial.patchgan, norm))
    yield Check("VQGAN: adaptive weight", torch, 1e-4, torch_adversarial.adaptive)
    for pattern in ("gpt2", "cl100k"):
        merges = functools.partial(tokenizer_files.merges, pattern)
        yield Check(f"BPE, {pattern} pattern: merges of the same texts", ("tokenizers",), 0.0, merges)
        for library in ("tokenizers", "tiktoken"):
            ids = functools.partial(tokenizer_files.ids, pattern, library)
            yield Check(f"BPE, {pattern} pattern: ids of held-out texts", (library,), 0.0, ids)
    for name in ("gpt2", "llama", "t5", "bart"):
        for beams in (1, 4):
            kind = "greedy" if beams == 1 else f"{beams} beams"
            yield Check(f"{name}: {kind}, tokens", both, 0.0, functools.partial(_tokens, name, beams))
    for name in (name for module in _LIBRARIES for name in module.MODELS):
        yield Check(f"{name}: outputs", both, 1e-4, functools.partial(_family, name, "forward"))
        yield Check(f"{name}: load → save → load there", both, 1e-5, functools.partial(_family, name, "round_trip"))


def certify(check: Check) -> Certificate:
    """Runs a check; one whose oracle is not installed is noted as such."""
    for package in check.needs:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return Certificate(check, None, f"{package} is not installed", 0.0)
    began = time.time()
    try:
        difference, note = float(check.run()), ""
    except Exception as error:  # a check that breaks must not hide the others
        difference, note = None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Certificate(check, difference, note, time.time() - began)


def table(found: list[Certificate]) -> str:
    """docs/certificates.md."""
    day = datetime.date.today().isoformat()
    passed, ran = sum(c.passed for c in found), sum(c.difference is not None for c in found)
    versions = {package: importlib.metadata.version(package) for package in ("jax", "flax")}
    lines = [
        "# Certificates",
        "",
        "Comparisons with trusted libraries, written by `python -m experiments.certify` (extra `parity`). The "
        "difference is the largest absolute one, divided by the largest output where that is above one; for tokens "
        "and merges it is the share that differs.",
        "",
        f"{passed} of {ran} checks passed on {day}, with {', '.join(f'{k} {v}' for k, v in versions.items())} on CPU; "
        f"{len(found) - ran} could not run.",
        "",
        "| what | oracle | largest difference | tolerance | result | date |",
        "|---|---|---|---|---|---|",
    ]
    for c in found:
        oracle = c.check.needs[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            oracle = f"{oracle} {importlib.metadata.version(oracle)}"
        value = f"{c.difference:.1e}" if c.difference is not None else "–"
        result = "pass" if c.passed else (c.note or "FAIL")
        lines.append(f"| {c.check.what} | {oracle} | {value} | {c.check.tolerance:.0e} | {result} | {day} |")
    return "\n".join(lines) + "\n"
