"""What a compute budget, a data size and an accelerator allow: what `config.plan` adds to `config.mode=plan`.

    law          FILE.json of fitted scaling laws (`scaling_laws.save`; a study of scaling writes one); "": none
    budget       training FLOPs; 0: those of this run
    tokens       different tokens that there are to train on; 0: as many as are wanted
    accelerator  name that holds a model of PEAK_FLOPS ("H100", "TPU v5p"), or "cpu", whose matrix products are then
                 timed; "": the device at hand
    utilisation  share of the peak that training reaches; 0: UTILISATION

Time is FLOPs / (devices × peak × utilisation). On CPU the peak is what a feed-forward block of this config's width
and batch reaches here, over all cores; devices of one CPU share it.

Memory of the proposed model is this config's: bytes of weights, gradients, moments and average by parameters, and
activations of this config's batch by parameters^(2/3), as width and depth grow alike. It is an estimate; the figures of
a config for that model, planned itself, are not.

The tier of customisation is that of table 1 of the survey (Chen et al. 2024), which orders three tiers by cost and
flexibility and gives no numbers. The rule here is ours: what training this config's model from scratch would need, by
the law, for the least compute, is compared with what there is. Data may be seen EPOCHS times, which is almost as good
as new data (Muennighoff et al. 2023). All that is needed: tier 3; at least PART of it: tier 2; less: tier 1.
"""

import math
import time
import types
from typing import Any

import jax
import jax.numpy as jnp

from vfm import scaling_laws
from vfm.errors import UserError
from vfm.train.logging import PEAK_FLOPS, peak_flops

UTILISATION = {"cpu": 0.6, "accelerator": 0.4}  # the first by `benchmarks.plan`: 0.35 (any-to-any) to 0.75 (GPT-2)
EPOCHS = 4
PART = 0.1
TIERS = {
    1: "keep the whole general model: low cost, low flexibility",
    2: "reuse pretrained blocks: medium",
    3: "build all five blocks from scratch: high",
}
Rows = list[tuple[str, str, str]]


def wanted(config) -> bool:
    """Whether `config.plan` asks for anything."""
    return any((config.get("plan") or {}).values())


def plan(experiment, found: dict[str, float], si, size) -> tuple[dict[str, float], Rows]:
    """(budget.* for plan.json, rows for the printed table) of a run whose plan is `found` so far.

      budget.flops_per_second, .step_seconds, .seconds      of this run, on all devices
      budget.flops, .n, .d, .loss, each with _low and _high     compute-optimal, and the interval of the laws
      budget.beyond       by what factor the budget lies outside the measured runs (1: inside)
      budget.optimal_seconds, .optimal_step_seconds, .optimal_steps, .optimal_memory
      budget.epochs, .gap, .tier      with config.plan.tokens; gap only where the file has measured it
      budget.this_loss, .this_beyond      of this run

    What the laws do not identify has no number. si, size: FLOPs and bytes as text.
    """
    cfg = experiment.config.plan
    for field in ("budget", "tokens", "utilisation"):
        if not (math.isfinite(cfg[field]) and cfg[field] >= 0) or (field == "utilisation" and cfg[field] > 1):
            most = " and at most 1" if field == "utilisation" else ""
            raise UserError(f"config.plan.{field}={cfg[field]} must be 0 or more{most}")
    if not cfg.law and (cfg.budget or cfg.tokens):
        raise UserError("config.plan.budget and .tokens need config.plan.law=FILE.json, the fitted laws of a study")
    laws = scaling_laws.load(cfg.law) if cfg.law else None
    if laws and "joint" not in laws.laws:
        raise UserError(f"{cfg.law} has no joint law of N and D; it has {', '.join(laws.laws) or 'none'}")
    speed, how = flops_per_second(experiment)
    run = {"step_seconds": found["flops.executed"] / speed}
    run["seconds"] = run["step_seconds"] * experiment.config.train.steps
    numbers, rows = {"flops_per_second": speed, **run}, [
        ("time", "", ""),
        ("  FLOPs per second", si(speed), how),
        ("  a step of this run", duration(run["step_seconds"]), ""),
        ("  this run", duration(run["seconds"]), f"{experiment.config.train.steps:,} steps"),
    ]  # fmt: skip
    if laws:
        more, lines = _by_law(experiment, found, laws, speed, si, size)
        numbers, rows = numbers | more, rows + lines
    return {f"budget.{name}": value for name, value in numbers.items()}, rows


def flops_per_second(experiment) -> tuple[float, str]:
    """(FLOP/s that a training step reaches on all devices, how that is known)."""
    cfg, devices = experiment.config.plan, experiment.mesh.size
    device = experiment.mesh.devices.flat[0]
    if cfg.accelerator and cfg.accelerator.lower() != "cpu":
        peak = peak_flops(types.SimpleNamespace(device_kind=cfg.accelerator))
        if peak is None:
            known = ", ".join(
                pattern.replace(r".*\b", "").replace(r"\b", "").replace(".*", "") for pattern, _ in PEAK_FLOPS
            )
            raise UserError(
                f"config.plan.accelerator={cfg.accelerator!r} has no known peak; known patterns: cpu, {known}"
            )
    else:
        peak = None if cfg.accelerator or device.platform == "cpu" else peak_flops(device)
        if peak is None and not cfg.accelerator and device.platform != "cpu":
            raise UserError(f"the peak of {device.device_kind!r} is not known; name a similar config.plan.accelerator")
    if peak is None:
        share = cfg.utilisation or UTILISATION["cpu"]
        measured = matmul_rate(_width(experiment.config.model), _rows(experiment))
        return share * measured, f"{share:.0%} of {measured:.3g}, measured in matrix products of this width and batch"
    share = cfg.utilisation or UTILISATION["accelerator"]
    name = cfg.accelerator or device.device_kind
    return share * devices * peak, f"{share:.0%} of {devices} × {peak:.3g}, the peak of {name} in bf16"


def matmul_rate(width: int, rows: int, seconds: float = 0.5) -> float:
    """FLOP/s of the two matrix products of a feed-forward block, float32[rows, width] to 4 width and back, on the CPU:
    the best of repeated runs, since others may use the machine meanwhile."""
    rows = min(rows, 4096)
    device = jax.devices("cpu")[0]
    x, up, down = (
        jax.device_put(jnp.ones(shape, jnp.float32), device)
        for shape in ((rows, width), (width, 4 * width), (4 * width, width))
    )
    block = jax.jit(lambda x: jnp.tanh(x @ up) @ down)
    block(x).block_until_ready()
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        block(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 2 * rows * width * 4 * width / best


def _rows(experiment) -> int:
    train = experiment.config.train
    return max(1, train.batch_size // train.accumulate * experiment.config.data.length)


def _width(model) -> int:
    """The width of the backbone, or the largest that a block has."""
    widths = [64]

    def look(node):
        for name, value in node.items():
            if hasattr(value, "items"):
                look(value)
            elif name == "width" and isinstance(value, int):
                widths.append(value)

    look(model)
    return (model.get("backbone") or {}).get("width") or max(widths)


def _by_law(experiment, found, laws: scaling_laws.Laws, speed, si, size) -> tuple[dict[str, float], Rows]:
    cfg, law = experiment.config.plan, laws.laws["joint"]
    this_n = found["parameters.total" if laws.count == "total" else "parameters.non_embedding"]
    this_d = found["step.tokens"] * experiment.config.train.steps
    own = found["flops.step"] * experiment.config.train.steps
    best = scaling_laws.compute_optimal(law, cfg.budget or own, flops=laws.flops)
    numbers: dict[str, Any] = {"flops": best.budget, "beyond": best.beyond}
    n, d = best.n.value, best.d.value
    about = ", ".join(f"{name}: {value}" for name, value in laws.about.items() if isinstance(value, str))
    rows = [
        (f"compute-optimal, by {cfg.law}", "", ""),
        ("  law", law.form, f"N: {laws.count.replace('_', '-')} parameters; {len(law.loss)} cells; {about}"),
        ("  FLOPs", si(best.budget), f"{'of config.plan' if cfg.budget else 'of this run'}{_far(best.beyond)}"),
        _row("  parameters N", best.n, numbers, "n", _far(_beyond(law, "N", n))),
        _row("  tokens D", best.d, numbers, "d", _far(_beyond(law, "D", d))),
        _row("  loss", best.loss, numbers, "loss", f"; of a run {best.loss.run_low:.4g} to {best.loss.run_high:.4g}"),
    ]
    seconds = best.budget / speed
    numbers["optimal_seconds"] = seconds
    rows.append(("  time", duration(seconds), ""))
    if best.n.identified:
        per_step = laws.flops * n * found["step.tokens"] / speed
        memory = _memory(found, n / this_n)
        numbers |= {
            "optimal_step_seconds": per_step,
            "optimal_steps": d / found["step.tokens"],
            "optimal_memory": memory,
        }
        rows += [
            ("  a step", duration(per_step), f"{d / found['step.tokens']:,.0f} steps of this config's batch"),
            ("  memory per device", size(memory), "estimated from this config's"),
        ]
    if cfg.tokens and best.n.identified:
        more, lines = _few_data(law, laws, cfg.tokens, best)
        numbers |= more
        rows += lines
    this = law.predict({"N": this_n, "D": this_d})
    rows += [
        ("this run, by the law", "", ""),
        _row("  loss", this, numbers, "this_loss", f"; N = {this_n:,}, D = {this_d:,}{_far(this.beyond)}"),
    ]
    numbers["this_beyond"] = this.beyond
    tier, why = _tier(law, laws, this_n, best.budget, cfg.tokens)
    if tier:
        numbers["tier"] = tier
    rows += [("customisation, table 1 of the survey", "", ""), ("  tier", str(tier or "–"), why)]
    return numbers, rows


def _row(name: str, value, numbers: dict, key: str, note: str = "") -> tuple[str, str, str]:
    """A row of an Estimate or a Prediction, and its numbers; none of what is not identified."""
    if value.reason:
        return name, "not identified", value.reason
    numbers |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
    return name, f"{value.value:.4g}", f"{value.low:.4g} to {value.high:.4g}{note}"


def _few_data(law, laws, tokens: float, best) -> tuple[dict[str, float], Rows]:
    """What changes where there are only so many tokens."""
    epochs = best.d.value / tokens
    rows = [("  epochs", f"{epochs:.3g}", f"of {tokens:.4g} tokens")]
    numbers = {"epochs": epochs}
    if epochs <= 1:
        return numbers, [*rows, ("  train–validation gap", "none expected", "no token is seen twice")]
    gap = laws.laws.get("gap")
    if gap is None:
        rows.append(("  train–validation gap", "not measured", "the file has no law of repeated data"))
    else:
        ratio = tokens / best.n.value
        expected = gap.predict({"D_over_N": ratio, "epochs": epochs})
        rows.append(_row("  train–validation gap", expected, numbers, "gap", _far(expected.beyond)))
    once = best.budget / (laws.flops * tokens)
    loss = law.predict({"N": once, "D": tokens})
    rows.append(("  instead, each token once", f"{loss.value:.4g}" if not loss.reason else "not identified",
                 f"loss of N = {once:.4g}{_far(loss.beyond)}"))  # fmt: skip
    return numbers, rows


def _tier(law, laws, n: float, budget: float, tokens: float) -> tuple[int, str]:
    """(tier, why), or (0, why not)."""
    needed = scaling_laws.compute_optimal_tokens(law, n)
    if not needed.identified:
        return 0, f"the law does not say what this model needs: {needed.reason}"
    shares = {"compute": budget / (laws.flops * n * needed.value)}
    if tokens:
        shares["data"] = EPOCHS * tokens / needed.value
    least = min(shares.values())
    tier = 3 if least >= 1 else 2 if least >= PART else 1
    there = ", ".join(f"{share:.3g} × the {name}" for name, share in shares.items())
    return (
        tier,
        f"{TIERS[tier]}. There is {there} that training this model from scratch needs ({needed.value:.3g} tokens)",
    )


def _memory(found, ratio: float) -> float:
    """Bytes per device of this config's model with `ratio` times the parameters."""
    kept = sum(found[f"memory.{name}"] for name in ("parameters", "gradients", "optimizer", "ema"))
    activations = max(found.get("memory.temporaries", 0) - found["memory.gradients"], 0)
    rest = found["memory.batch"] + found["memory.variables"]
    return kept * ratio + activations * ratio ** (2 / 3) + rest


def _beyond(law, variable: str, value: float) -> float:
    column = law.x[:, law.variables.index(variable)]
    return max(value / column.max(), column.min() / value, 1.0)


def _far(beyond: float) -> str:
    return f"; {beyond:.3g} × beyond the measured range" if beyond > 1 else ""


def duration(seconds: float) -> str:
    """Seconds as text with a fitting unit."""
    for unit, size, least in (("days", 86400, 2), ("h", 3600, 2), ("min", 60, 2), ("s", 1, 1), ("ms", 1e-3, 1)):
        if seconds >= least * size:
            return f"{seconds / size:,.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{1e6 * seconds:.3g} µs"
