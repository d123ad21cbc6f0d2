"""Analytic FLOPs of any function, counted on its jaxpr.

XLA's own cost analysis counts the body of a scan once, so a stack of 8 scanned layers reports the FLOPs of 1.
Here a scan counts `length` times, and a block that a user adds is counted with no code of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def count(fn: Callable, *args: Any) -> int:
    """FLOPs of `fn(*args)` on all devices together; nothing is compiled or executed.

    args: arrays, or trees of `ShapeDtypeStruct`s.

    A multiplication with its addition is 2 FLOPs. Matrix products and convolutions count, element-wise
    work does not (the usual convention: PaLM, Chowdhery et al. 2022, appendix B). The padding of a
    convolution counts as data; the holes of a dilated one do not, so the backward pass of a strided
    convolution costs about twice its forward pass. A scan counts `length` times; a `cond` as its largest
    branch; a `while` as often as it runs if that can be read off the program, else once; a `shard_map` on
    every device. What no result needs does not count; what rematerialisation computes again does.
    """
    return count_jaxpr(jax.make_jaxpr(fn)(*args))


def count_jaxpr(closed: ClosedJaxpr) -> int:
    """The same of a function that is traced already, such as `jax.jit(fn).trace(*args).jaxpr`."""
    return _whole(closed.jaxpr)


# Each rule: (equation, which of its results are needed) -> (FLOPs, which of its operands they need).


def _walk(jaxpr: Jaxpr, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
    """The same for a whole program: FLOPs that the wanted results need, and which arguments they need."""
    live = {id(var) for var, needed in zip(jaxpr.outvars, wanted) if needed}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        results = [id(var) in live for var in eqn.outvars]
        if not any(results) and not eqn.effects:
            continue
        flops, operands = _RULES.get(eqn.primitive.name, _other)(eqn, results)
        total += flops
        live |= {id(var) for var, needed in zip(eqn.invars, operands) if needed}
    return total, [id(var) in live for var in jaxpr.invars]


def _whole(jaxpr: Jaxpr) -> int:
    return _walk(jaxpr, [True] * len(jaxpr.outvars))[0]


def _jaxprs(value) -> list[Jaxpr]:
    """All programs in a parameter of an equation."""
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [j for item in value for j in _jaxprs(item)] if isinstance(value, tuple | list) else []


def _other(eqn, wanted):
    """Any primitive without a rule: whatever programs it holds, once."""
    inner = [j for value in eqn.params.values() for j in _jaxprs(value)]
    return sum(map(_whole, inner)), [True] * len(eqn.invars)


def _call(eqn, wanted):
    """A call of one inner program with the same operands and results."""
    inner = next(j for value in eqn.params.values() for j in _jaxprs(value))
    return _walk(inner, wanted)


def _scan(eqn, wanted):
    """Needs a fixed point: a carry may be needed by a later iteration only."""
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    carry = list(wanted[:carries])
    while True:
        flops, needed = _walk(eqn.params["jaxpr"].jaxpr, carry + wanted[carries:])
        more = [a or b for a, b in zip(carry, needed[consts : consts + carries])]
        if more == carry:
            return eqn.params["length"] * flops, needed[:consts] + carry + needed[consts + carries :]
        carry = more


def _while(eqn, wanted):
    once = _whole(eqn.params["body_jaxpr"].jaxpr) + _whole(eqn.params["cond_jaxpr"].jaxpr)
    return (_trips(eqn) or 1) * once, [True] * len(eqn.invars)


def _trips(eqn) -> int | None:
    """Iterations of a loop `while i < n` that adds a literal to i, if both start as literals; else None."""
    condition, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    skip, first = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carries, before, after = condition.invars[skip:], body.invars[first:], body.outvars
    initial = eqn.invars[skip + first :]
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return None
    i, n = condition.eqns[0].invars
    if i not in carries or not isinstance(start := initial[at := carries.index(i)], Literal):
        return None
    if n in carries and after[carries.index(n)] is before[carries.index(n)]:  # carried along unchanged
        n = initial[carries.index(n)]
    if not isinstance(n, Literal):
        return None
    for step in body.eqns:
        if step.outvars[0] is after[at] and step.primitive.name == "add":
            operand, by = step.invars
            if operand is before[at] and isinstance(by, Literal) and by.val > 0:
                return max(0, math.ceil((n.val - start.val) / by.val))
    return None


def _cond(eqn, wanted):
    branches = [_walk(branch.jaxpr, wanted) for branch in eqn.params["branches"]]
    needed = [any(column) for column in zip(*(operands for _, operands in branches))]
    return max(flops for flops, _ in branches), [True, *needed]


def _shard_map(eqn, wanted):
    flops, needed = _walk(eqn.params["jaxpr"], wanted)
    shape, axes = eqn.params["mesh"].shape, eqn.params["newly_manual_axes"]
    return flops * math.prod(shape[axis] for axis in axes), needed


def _pallas(eqn, wanted):
    programs = math.prod(n for n in eqn.params["grid_mapping"].grid if isinstance(n, int))
    return programs * _whole(eqn.params["jaxpr"]), [True] * len(eqn.invars)


def _dot(eqn, wanted):
    (contract, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    return 2 * eqn.outvars[0].aval.size * inner, [True] * len(eqn.invars)


def _ragged_dot(eqn, wanted):
    """A product for each group of rows; each row is in one group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), _ = numbers.dot_dimension_numbers
    inner = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    flops = 2 * eqn.outvars[0].aval.size * inner
    if set(numbers.lhs_ragged_dimensions) <= set(contract):  # the result has a dimension of groups
        flops //= eqn.invars[2].aval.shape[-1]
    return flops, [True] * len(eqn.invars)


def _convolution(eqn, wanted):
    params, kernel, out = eqn.params, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    numbers = params["dimension_numbers"]
    points = math.prod(out[d] for d in numbers.out_spec[:2]) * kernel[numbers.rhs_spec[1]]
    for i, (at_out, at_kernel) in enumerate(zip(numbers.out_spec[2:], numbers.rhs_spec[2:])):
        starts = np.arange(out[at_out]) * params["window_strides"][i] - params["padding"][i][0]
        taps = np.arange(kernel[at_kernel]) * params["rhs_dilation"][i]
        points *= int(((starts[:, None] + taps[None, :]) % params["lhs_dilation"][i] == 0).sum())
    return 2 * points, [True] * len(eqn.invars)


_CALLS = ("jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_RULES = {
    **dict.fromkeys(_CALLS, _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
