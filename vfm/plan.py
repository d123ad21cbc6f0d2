"""`config.mode=plan`: parameters, FLOPs, memory per device and mesh of a run, without training it."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vfm import budget, data, distributed, flops, model, objectives, report, tokenizers, tree
from vfm.train.optimizer import trained

# Tables of ids and of positions, and the head over the vocabulary: what "non-embedding" parameters leave out
# (Kaplan et al. 2020, section 2.1). Position tables hold an entry per place, and a head is a table read backwards.
EMBEDDINGS = (
    r"(.*/)?(embedding/embedding|(block_)?positions(/embedding)?|token_types/embedding)"
    r"|decoders_[^/]*/(head/)?(kernel|bias)"
)
# The order of the survey's picture; the roots of the parameter tree are `{block}_{modality}` and `backbone`.
BLOCKS = ("encoders", "input_projectors", "backbone", "output_projectors", "decoders", "signals")


def plan(experiment, path) -> dict[str, float]:
    """Prints the plan of a run and writes it to plan.json; returns it, flat name → number.

      parameters.{block}.{modality}, .total, .trainable, .frozen, .embeddings, .non_embedding
      flops.forward, .step        of one step on all devices: the loss alone, and with its gradient,
                                  as if nothing were rematerialised (the convention of MFU)
      flops.executed              with what rematerialisation computes again
      flops.per_token, .per_example, .6ND     6 × parameters without embeddings × tokens (Kaplan et al. 2020)
      step.examples, .tokens, .micro_batches
      memory.parameters, .gradients, .optimizer, .ema, .variables, .batch    bytes per device, exact
      memory.temporaries          what the compiled step needs besides: activations, gradients
      memory.total                arguments + results that are not written in place + temporaries
      mesh.devices, mesh.{axis}
      budget.*                    where `config.plan` asks for it, see vfm/budget.py

    The step is traced and compiled, never run, and no data is read. Where the backend gives no memory
    figures, `temporaries` is left out and `total` is the sum of the exact ones.
    """
    found, batch = {**analytic(experiment), **_mesh(experiment)}, abstract_batch(experiment)
    traced = experiment.train_step.trace(experiment.abstract_state, batch)
    found["flops.executed"] = flops.count_jaxpr(traced.jaxpr)
    found |= _memory(experiment, batch, traced)
    rows = []
    if budget.wanted(experiment.config):
        numbers, rows = budget.plan(experiment, found, _si, _bytes)
        found |= numbers
    if distributed.is_main():
        print(_text(experiment, found, rows))
        report.write_json(path / "plan.json", found)
    return found


def analytic(experiment) -> dict[str, float]:
    """What of `plan` needs no compiler: parameters.*, step.* and flops.* but `executed`."""
    sizes = _step(experiment)
    return {**_parameters(experiment), **sizes, **_flops(experiment, abstract_batch(experiment), sizes)}


def step_flops(experiment) -> int:
    """FLOPs of a training step on all devices as MFU takes them: without rematerialisation."""
    return _flops(experiment, abstract_batch(experiment), _step(experiment))["flops.step"]


def abstract_batch(experiment) -> dict[str, Any]:
    """The global training batch as ShapeDtypeStructs with shardings, from the config alone."""
    config, size = experiment.config, experiment.config.train.batch_size
    row = data.blank(config.data, layout=experiment.layout, tokenizer=_tokenizer(experiment))
    row |= {"example_mask": np.zeros((), np.float32), "skipped": np.zeros((), np.int32)}
    rows = lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=experiment.batch_sharding)
    return jax.tree.map(rows, row)


def _tokenizer(experiment):
    """The run's tokenizer; for one that is yet to be trained, another with the same special tokens: only special
    tokens shape a batch."""
    cfg = experiment.config.tokenizer
    if not tokenizers.untrained(cfg):
        return experiment.tokenizer
    return tokenizers.ByteTokenizer(tuple(dict.fromkeys((*tokenizers.SPECIAL, *cfg.get("special", ())))))


def _parameters(experiment) -> dict[str, int]:
    params = experiment.abstract_state.params
    learns = tree.flatten(trained(experiment.config.optimizer, params))
    blocks: dict[str, int] = {}
    for root in sorted(params, key=_block):
        name = ".".join(_block(root)[1:])
        blocks[name] = blocks.get(name, 0) + tree.count(params[root])
    total = tree.count(params)
    trainable = sum(math.prod(leaf.shape) for path, leaf in tree.flatten(params).items() if learns[path])
    bare = non_embedding(params)
    found = {**blocks, "total": total, "trainable": trainable, "frozen": total - trainable}
    found |= {"embeddings": total - bare, "non_embedding": bare}
    return {f"parameters.{name}": value for name, value in found.items()}


def non_embedding(params) -> int:
    """Parameters of a tree without tables of ids and positions and without heads over a vocabulary (EMBEDDINGS)."""
    leaves = tree.flatten(params).items()
    return sum(math.prod(leaf.shape) for path, leaf in leaves if not re.fullmatch(EMBEDDINGS, path))


def _block(root: str) -> tuple:
    """`encoders_image` → (0, "encoders", "image"), to sort by and to name."""
    for i, kind in enumerate(BLOCKS):
        if root == kind or root.startswith(f"{kind}_"):
            return (i, kind) if kind in ("backbone", "signals") else (i, kind, root[len(kind) + 1 :])
    return (len(BLOCKS), root)


def _mesh(experiment) -> dict[str, int]:
    axes = {f"mesh.{axis}": size for axis, size in experiment.mesh.shape.items()}
    return {"mesh.devices": experiment.mesh.size, **axes}


def _step(experiment) -> dict[str, int]:
    train = experiment.config.train
    tokens = train.batch_size * experiment.config.data.length
    return {"step.examples": train.batch_size, "step.tokens": tokens, "step.micro_batches": train.accumulate}


def _flops(experiment, batch, sizes) -> dict[str, float]:
    state = experiment.abstract_state
    plain = model.build(_without_remat(experiment.config.model))
    loss_fn = objectives.build(experiment.config.objective, plain)
    loss = lambda params, variables, batch, rng: loss_fn(params, variables, batch, rng, train=True)[0]
    step = flops.count(experiment.make_step(loss_fn), state, batch)
    return {
        "flops.forward": flops.count(loss, state.params, state.variables, batch, state.rng),
        "flops.step": step,
        "flops.per_token": step / sizes["step.tokens"],
        "flops.per_example": step / sizes["step.examples"],
        "flops.6ND": 6 * non_embedding(state.params) * sizes["step.tokens"],
    }


def _without_remat(cfg) -> dict[str, Any]:
    """The config of the same model with nothing computed twice."""
    inner = {key: _without_remat(value) if hasattr(value, "items") else value for key, value in cfg.items()}
    return {**inner, "remat": "none"} if "remat" in inner else inner


def _memory(experiment, batch, traced) -> dict[str, int]:
    state = experiment.abstract_state
    exact = {
        "parameters": device_bytes(state.params),
        "gradients": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "ema": device_bytes(state.ema),
        "variables": device_bytes(state.variables),
        "batch": device_bytes(batch),
    }
    with experiment.use_mesh():
        compiled = traced.lower().compile()
    stats = _statistics(compiled)
    if stats is None:
        found = {**exact, "total": sum(exact.values())}
    else:
        held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        found = {**exact, "temporaries": stats.temp_size_in_bytes, "total": held + stats.temp_size_in_bytes}
    return {f"memory.{name}": value for name, value in found.items()}


def _statistics(compiled):
    """The compiler's memory figures for one device, or None where the backend has none."""
    try:
        return compiled.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None


def device_bytes(struct) -> int:
    """Bytes that one device holds of a tree of arrays, or of ShapeDtypeStructs with shardings."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(size, jax.tree.leaves(struct)))


def _text(experiment, found: Mapping[str, float], more: budget.Rows) -> str:
    """The plan as an aligned table; more: its last rows."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items() if size > 1)
    device, total = experiment.mesh.devices.flat[0], found["parameters.total"]
    micro, examples = found["step.micro_batches"], found["step.examples"]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    notes = {
        "gradients": "in the temporaries" if "memory.temporaries" in found else "",
        "temporaries": "activations and gradients, of the compiled step",
        "total": f"of {_bytes(limit)}" if limit else "",
    }
    if "memory.temporaries" not in found:
        notes["total"] = f"without activations: the {device.platform} backend gives no memory figures"

    def section(prefix, show, note=lambda name, value: ""):
        for name, value in found.items():
            if name.startswith(f"{prefix}."):
                name = name.removeprefix(f"{prefix}.")
                yield f"  {name.replace('_', ' ')}", show(value), note(name, value)

    share = lambda name, value: f"{value / total:6.1%}"
    rows = [
        ("parameters", "", ""), *section("parameters", "{:,}".format, share),
        ("FLOPs, matrix products and convolutions", "", ""), *section("flops", _si),
        ("one training step", "", ""),
        ("  examples", f"{examples:,}", f"{micro} × {examples // micro:,}" if micro > 1 else ""),
        ("  tokens", f"{found['step.tokens']:,}", f"{examples:,} × {found['step.tokens'] // examples:,}"),
        ("memory per device", "", ""), *section("memory", _bytes, lambda name, _: notes.get(name, "")),
        *more,
    ]  # fmt: skip
    wide = max(len(name) for name, value, _ in rows if value)
    high = max(len(value) for _, value, _ in rows)
    lines = [
        f"plan{': ' + title if (title := experiment.config.get('title')) else ''}",
        f"mesh: {found['mesh.devices']} × {device.device_kind}" + (f" ({mesh})" if mesh else ""),
    ]
    return "\n".join([*lines, *(f"{a:{wide}}  {b:>{high}}  {c}".rstrip() for a, b, c in rows)])


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:,.0f} {units[power]}" if power == 0 else f"{value:,.2f} {units[power]}"


def _si(value: float) -> str:
    return _scaled(value, 1000, ("  FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs"))


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("  B", "KiB", "MiB", "GiB", "TiB"))
