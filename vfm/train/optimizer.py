"""Optimizers and learning-rate schedules by name, with per-path groups.

The section `config.optimizer`:

    name                       one of OPTIMIZERS; its hyperparameters (b1, eps, momentum, …) stand beside it
    learning_rate              the peak learning rate
    schedule                   {name: one of SCHEDULES, warmup_steps, end_value, …}; absent: constant
    clip_norm                  largest global norm of the gradient (2-norm); 0, None or absent: no clipping
    weight_decay               a number (for kernels and embeddings only), or rows (regex, number)
    learning_rate_multipliers  rows (regex, factor); absent: 1 everywhere
    frozen                     regexes; these parameters get no update and have no optimizer state

Regexes match whole parameter paths (`vfm.tree.match`); rows must cover every parameter, and the first that
matches wins.
"""

import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vfm import tree
from vfm.errors import UserError, unknown

# Kernels (those of experts too) and embedding tables decay. Biases, norm scales, signal tokens and other leaves do not.
DECAYED = r"(.*[/_])?(kernel|embedding|experts_(up|gate|down))"


# Schedules: (peak, steps, fields of config.optimizer.schedule) -> optax schedule without its warm-up, counted
# from the end of the warm-up.


def _constant(peak, steps, warmup_steps, end_value=0.0):
    """The peak for ever. There is no end value."""
    if end_value not in (0, peak):
        raise UserError(f"optimizer.schedule: constant never reaches end_value={end_value}; leave it out")
    return optax.constant_schedule(peak)


def _linear(peak, steps, warmup_steps, end_value=0.0):
    """A straight line to end_value at the last step."""
    return optax.linear_schedule(peak, end_value, _rest(steps, warmup_steps))


def _cosine(peak, steps, warmup_steps, end_value=0.0):
    """Half a cosine wave to end_value at the last step (SGDR, arXiv:1608.03983, without restarts)."""
    return optax.cosine_decay_schedule(peak, _rest(steps, warmup_steps), alpha=end_value / peak)


def _wsd(peak, steps, warmup_steps, end_value=0.0, decay_fraction=0.1):
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): the peak, then a straight line to end_value during
    the last `decay_fraction` of all steps."""
    rest = _rest(steps, warmup_steps)
    decay = max(1, round(decay_fraction * steps))
    if not (decay_fraction > 0 and decay <= rest):
        raise UserError(
            f"optimizer.schedule: decay_fraction={decay_fraction} of {steps} steps must be more than 0 and "
            f"at most the {rest} steps after the warm-up"
        )
    return optax.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, end_value, decay)], [rest - decay]
    )


def _rsqrt(peak, steps, warmup_steps, end_value=0.0, timescale=None):
    """peak · sqrt(timescale / (timescale + steps since the warm-up)), never below end_value
    (arXiv:1706.03762, section 5.3). The timescale is warmup_steps by default, or 10,000 without a warm-up."""
    timescale = timescale or warmup_steps or 10_000
    # During the warm-up `join_schedules` asks for negative steps too, and drops the answer.
    decay = lambda step: jnp.sqrt(timescale / (timescale + jnp.maximum(step, 0)))
    return lambda step: jnp.maximum(peak * decay(step), end_value)


SCHEDULES: dict[str, Callable] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "wsd": _wsd,
}


def _rest(steps: int, warmup_steps: int) -> int:
    if warmup_steps >= steps:
        raise UserError(
            f"optimizer.schedule: warmup_steps={warmup_steps} leaves no step for the decay; it must be less "
            f"than train.steps={steps}"
        )
    return steps - warmup_steps


def build_schedule(cfg, steps: int) -> optax.Schedule:
    """The learning rate of every step.

    With `warmup_steps` = W it rises on a straight line from 0 at step 0 to the peak at step W, then follows
    the schedule, and stays at its last value after `steps`.

    Args:
      cfg: config.optimizer (`learning_rate` and `schedule` are read).
      steps: train.steps, the length of the whole run.

    Raises UserError for unknown names and fields and for values that do not fit.
    """
    peak = _learning_rate(cfg)
    fields = _fields(cfg.get("schedule") or {})
    name = fields.pop("name", "constant")
    warmup_steps = fields.pop("warmup_steps", 0)
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES, "optimizer.schedule.name")
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise UserError(f"optimizer.schedule: warmup_steps={warmup_steps!r} must be a whole number >= 0")
    end_value = fields["end_value"] = fields.get("end_value") or 0.0
    if not 0 <= end_value <= peak:
        raise UserError(f"optimizer.schedule: end_value={end_value} must be from 0 to learning_rate={peak}")
    main = _call(SCHEDULES[name], fields, "optimizer.schedule", peak, steps, warmup_steps)
    if warmup_steps == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), main], [warmup_steps])


# Optimizers: hyperparameters -> the direction of the step, before weight decay and learning rate.


def _adamw(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=None, nesterov=False):
    """AdamW (arXiv:1711.05101; Adam: arXiv:1412.6980)."""
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=nesterov)


def _adafactor(
    decay_rate=0.8,
    clipping_threshold=1.0,
    multiply_by_parameter_scale=True,
    min_dim_size_to_factor=128,
    momentum=None,
    eps=1e-30,
):
    """Adafactor (arXiv:1804.04235): second moments factored into rows and columns of the two largest
    dimensions.

    The block of the update clipping and of the parameter scale is one parameter, hence all layers of a
    scanned stack.
    """
    parts = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor, epsilon=eps)
    ]
    if clipping_threshold is not None:
        parts.append(optax.clip_by_block_rms(clipping_threshold))
    if multiply_by_parameter_scale:
        parts.append(optax.scale_by_param_block_rms())
    if momentum is not None:
        parts.append(optax.ema(momentum, debias=False))
    return optax.chain(*parts)


def _lion(b1=0.9, b2=0.99, mu_dtype=None):
    """Lion (arXiv:2302.06675): the sign of an interpolated momentum."""
    return optax.scale_by_lion(b1, b2, mu_dtype=mu_dtype)


def _sgd(momentum=None, nesterov=False):
    """Stochastic gradient descent, with heavy-ball or Nesterov momentum when `momentum` is given."""
    return optax.identity() if momentum is None else optax.trace(momentum, nesterov)


OPTIMIZERS: dict[str, Callable] = {"adafactor": _adafactor, "adamw": _adamw, "lion": _lion, "sgd": _sgd}

_COMMON = (
    "name", "learning_rate", "schedule", "clip_norm", "weight_decay", "learning_rate_multipliers", "frozen"
)  # fmt: skip


def build_optimizer(
    cfg, params_shape, steps: int, schedule: optax.Schedule | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation and the learning-rate schedule of config.optimizer.

    The step of a parameter p with gradient g is `-lr · multiplier · (direction(clip(g)) + decay · p)`. The
    decay is decoupled from the gradient for every optimizer (arXiv:1711.05101), so Lion and SGD decay like
    AdamW. Frozen parameters get an update of exactly zero whatever their gradient (also NaN), take no part in
    the clipping norm, and have no state.

    Args:
      cfg: config.optimizer, see the head of this file.
      params_shape: the parameters, or their ShapeDtypeStructs.
      steps: train.steps.
      schedule: in place of that of cfg.

    Raises UserError for unknown names and fields, a parameter that no row covers, and a row that covers
    nothing.
    """
    schedule = schedule or build_schedule(cfg, steps)
    fields = _fields(cfg)
    name = fields.get("name", "adamw")
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS, "optimizer.name")
    hyperparameters = {key: value for key, value in fields.items() if key not in _COMMON}
    direction = _call(OPTIMIZERS[name], hyperparameters, "optimizer", also=_COMMON)

    parts = []
    clip_norm = fields.get("clip_norm")
    if clip_norm:
        if not clip_norm > 0:
            raise UserError(f"optimizer.clip_norm={clip_norm} must be positive, or 0 for no clipping")
        parts.append(optax.clip_by_global_norm(clip_norm))
    parts.append(direction)
    decay = _decay(fields.get("weight_decay"), params_shape)
    if any(decay.values()):
        parts.append(_add_decayed(decay))
    multipliers = _rows(fields.get("learning_rate_multipliers"), params_shape, "learning_rate_multipliers")
    if multipliers:
        parts.append(_multiply(multipliers))
    parts.append(optax.scale_by_learning_rate(schedule))
    tx = optax.chain(*parts)

    if fields.get("frozen"):
        labels = jax.tree.map(lambda learns: "trained" if learns else "frozen", trained(cfg, params_shape))
        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    return tx, schedule


def trained(cfg, params_shape):
    """For every parameter whether it is trained: False for those of config.optimizer.frozen."""
    frozen = tuple(cfg.get("frozen") or ())
    rows = [(regex, False) for regex in frozen] + [(".*", True)]
    found = tree.match(params_shape, rows, "optimizer.frozen")
    if not any(jax.tree.leaves(found)):
        raise UserError(f"optimizer.frozen={frozen} freezes every parameter; nothing is left to train")
    return found


def state_shardings(tx, params_shape, param_shardings, mesh, opt_state_shape):
    """The shardings of the optimizer state, for `jit(init, out_shardings=…)` and for restoring.

    A leaf that mirrors a parameter (moments) is laid out like it. Everything else (step counts, Adafactor's
    rows and columns, which have another rank) is replicated.

    Args:
      tx: the transformation of `build_optimizer`.
      params_shape: the parameters or their ShapeDtypeStructs.
      param_shardings: a sharding per parameter, the same structure.
      mesh: the mesh on which the other leaves are replicated.
      opt_state_shape: `jax.eval_shape(tx.init, params_shape)`.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def follow(leaf, param, sharding):
        if isinstance(leaf, optax.MaskedNode):  # a parameter without state in this group
            return leaf
        return sharding if leaf.shape == param.shape else replicated

    return optax.tree.map_params(
        tx, follow, opt_state_shape, params_shape, param_shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )  # fmt: skip


def _add_decayed(decay: Mapping[str, float]) -> optax.GradientTransformation:
    """optax.add_decayed_weights with a value per path. It looks paths up, since under `partition` the frozen
    leaves are missing from the trees that it sees."""

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("weight decay needs the parameters: tx.update(grads, state, params)")
        add = lambda path, u, p: u + decay[path] * p if decay[path] else u
        return jax.tree.map(add, tree.paths(updates), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _multiply(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        return jax.tree.map(lambda path, u: factors[path] * u, tree.paths(updates), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _decay(value, params_shape) -> dict[str, float]:
    if value is None or isinstance(value, int | float):
        if value is not None and value < 0:
            raise UserError(f"optimizer.weight_decay={value} must not be negative")
        values = tree.match(
            params_shape, [(DECAYED, value or 0.0), (".*", 0.0)], "optimizer.weight_decay", allow_unused=True
        )
        return tree.flatten(values)
    return _rows(value, params_shape, "weight_decay")


def _rows(rows, params_shape, field: str) -> dict[str, float]:
    """Path → number from rows (regex, number); {} when there are no rows."""
    what = f"optimizer.{field}"
    if not rows:
        return {}
    if not isinstance(rows, tuple | list) or not all(isinstance(row, tuple | list) for row in rows):
        raise UserError(f"{what}={rows!r} must be a tuple of rows (regex, number)")
    values = tree.flatten(tree.match(params_shape, rows, what))
    for path, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UserError(f"{what}: the value {value!r} for {path!r} must be a number, 0 or more")
    return values


def _learning_rate(cfg) -> float:
    peak = cfg.get("learning_rate")
    if isinstance(peak, bool) or not isinstance(peak, int | float) or not peak > 0:
        raise UserError(f"optimizer.learning_rate={peak!r} must be a positive number")
    return float(peak)


def _fields(cfg) -> dict:
    return {key: cfg[key] for key in cfg}


def _call(function, fields, where, *args, also=()):
    """function(*args, **fields), where a field that it does not have is the user's error."""
    names = list(inspect.signature(function).parameters)[len(args) :]
    for field in fields:
        if field not in names:
            raise unknown(f"field of {function.__name__.strip('_')}", field, [*names, *also], where)
        default = inspect.signature(function).parameters[field].default
        if isinstance(default, float) and (
            isinstance(fields[field], bool) or not isinstance(fields[field], int | float)
        ):
            raise UserError(f"{where}.{field}={fields[field]!r} must be a number")
        if field == "mu_dtype" and fields[field] not in (None, "float32", "bfloat16", "float16"):
            raise unknown("dtype", fields[field], ("float32", "bfloat16", "float16"), f"{where}.mu_dtype")
    return function(*args, **fields)
