"""Schedules as shapes: a multiplier in [0, 1] over the steps of a run, times a peak that may be traced.

Every shape has the signature `shape(steps, *, warmup, final, ...) -> (count -> multiplier)`, so that swapping one for
another is one word. The same words mean the same everywhere:

- `steps` is the length of the run; from there on the multiplier stays what it is.
- `warmup` rises linearly from 0 to 1 (`one_cycle`: half a cosine, from `initial`). At its end the multiplier is 1. One
  of less than a step is none.
- `final` is the multiplier at the end of the run, as a fraction of the peak: at count `steps`, one after the count of
  the last step. It is a floor where the end follows from something else (`inverse_square_root`), and not used where
  nothing decays (`constant`) or all is given (`piecewise`).
- A length or place below 1 is a fraction of the run, from 1 on a number of steps.

Numbers may be traced, except `cycles` and the boundaries of `join`, which shape the program. A wrong one that isn't
traced is a ConfigError. A shape of one's own needs nothing but the signature, and is named `my_module:sawtooth`:

    def sawtooth(steps, *, warmup=0.0, final=0.0, teeth=4.0):
        rise = schedules.constant(steps, warmup=warmup)  # the warmup alone
        return lambda count: rise(count) * (1 - (1 - final) * (teeth * count / steps % 1))
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import errors, lookup  # not their names: a function in this module is a schedule

Number = Float[Array, ""] | float
Shape = Callable[[Int[Array, ""] | int], Float[Array, ""]]

_FRACTION_OR_STEPS = "a fraction of the run below 1, or steps"


def constant(steps: int, *, warmup: Number = 0.0, final: Number = 1.0) -> Shape:
    """1 after the warmup; `final` is not used."""
    return _after_warmup(steps, warmup, final, lambda count, start: jnp.ones_like(count))


def linear(steps: int, *, warmup: Number = 0.0, final: Number = 0.0) -> Shape:
    """A line from 1 to `final`."""
    return _decay(steps, warmup, final, lambda x: 1 - x)


def cosine(steps: int, *, warmup: Number = 0.0, final: Number = 0.0) -> Shape:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""
    return _decay(steps, warmup, final, _half_cosine)


warmup_linear, warmup_cosine = linear, cosine  # also called so elsewhere: here every shape has a warmup


def polynomial(steps: int, *, warmup: Number = 0.0, final: Number = 0.0, power: Number = 2.0) -> Shape:
    """(1 - progress)^power, from 1 to `final`."""
    _check("power", power, 1e-6, math.inf, "a number above 0")
    return _decay(steps, warmup, final, lambda x: (1 - x) ** power)


def exponential(steps: int, *, warmup: Number = 0.0, final: Number = 0.01) -> Shape:
    """final^progress: the same factor each step. It halves every h steps if final is 0.5^((steps - warmup) / h)."""
    _check("final", final, 1e-30, 1, "above 0, which an exponential never reaches, up to 1")
    low = jnp.clip(jnp.asarray(final, jnp.float32), 0, 1)
    return _after_warmup(steps, warmup, final, lambda count, start: low ** _progress(count, start, steps))


def inverse_square_root(steps: int, *, warmup: Number = 0.0, final: Number = 0.0, timescale: Number = 0.0) -> Shape:
    """sqrt(timescale / (timescale + count - warmup)), and never below `final`.

    Args:
      timescale: 0 for the warmup, which gives sqrt(warmup / count) (Vaswani et al. 2017, arXiv:1706.03762); or a
        fraction of the run, or steps, for a decay that does not depend on the warmup (Zhai et al. 2022,
        arXiv:2106.04560). At least one step.
    """
    _check("timescale", timescale, 0, math.inf, "0 for the warmup, a fraction of the run below 1, or steps")

    def after(count: jax.Array, start: jax.Array) -> jax.Array:
        own = _length(timescale, steps)
        scale = jnp.maximum(jnp.where(own > 0, own, start), 1)
        return jnp.maximum(jnp.sqrt(scale / (scale + jnp.maximum(count - start, 0))), final)

    return _after_warmup(steps, warmup, final, after)


def cosine_restarts(
    steps: int, *, warmup: Number = 0.0, final: Number = 0.0, cycles: int = 4, t_mult: Number = 1.0
) -> Shape:
    """SGDR: so many times half a cosine from 1 to `final` (Loshchilov and Hutter 2017, arXiv:1608.03983).

    A cycle is `t_mult` times as long as the one before, and the last ends with the run: the first takes
    (steps - warmup) (t_mult - 1) / (t_mult^cycles - 1) steps.
    """
    _check("t_mult", t_mult, 1, math.inf, "at least 1")
    _check("cycles", cycles, 1, math.inf, "a whole number of at least 1", whole=True)

    def after(count: jax.Array, start: jax.Array) -> jax.Array:
        lengths = jnp.maximum(t_mult, 1.0) ** (jnp.arange(cycles, dtype=jnp.float32) + 1 - cycles)
        shares = jnp.cumsum(lengths) / jnp.sum(lengths)
        ends = _whole(start + (steps - start) * shares).at[-1].set(steps)
        starts = jnp.concatenate([start[None], ends[:-1]])
        cycle = jnp.sum(count >= ends[:-1])
        return _between(final, _half_cosine(_progress(count, starts[cycle], ends[cycle])))

    return _after_warmup(steps, warmup, final, after)


def warmup_stable_decay(
    steps: int, *, warmup: Number = 0.0, final: Number = 0.0, cooldown: Number = 0.2, tail: str = "linear"
) -> Shape:
    """1 until the last `cooldown` of the run, then to `final` (WSD: Hu et al. 2024, arXiv:2404.06395).

    Args:
      cooldown: a fraction of the run or whole steps; it begins at the end of the warmup at the earliest.
      tail: "linear" 1 - x; "sqrt" 1 - sqrt(x) (Hägele et al. 2024, arXiv:2405.18392); "cosine".
    """
    tails = {"linear": lambda x: 1 - x, "sqrt": lambda x: 1 - jnp.sqrt(x), "cosine": _half_cosine}
    _check_name("tail", tail, tails)
    _check("cooldown", cooldown, 0, steps, f"a fraction of the run below 1, or whole steps of its {steps}", whole=True)

    def after(count: jax.Array, start: jax.Array) -> jax.Array:
        start = jnp.maximum(start, steps - _length(cooldown, steps))
        return _between(final, tails[tail](_progress(count, start, steps)))

    return _after_warmup(steps, warmup, final, after)


def one_cycle(steps: int, *, warmup: Number = 0.3, final: Number = 4e-6, initial: Number = 0.04) -> Shape:
    """Half a cosine from `initial` up to 1 in the warmup, and another down to `final`.

    Super-convergence (Smith and Topin 2018, arXiv:1708.07120) in the form and with the defaults of optax; PyTorch's has
    both ends one step earlier. The paper's three lines are `piecewise` with lines between.
    """
    _check("initial", initial, 0, 1, "from 0 to 1")
    return _decay(steps, warmup, final, _half_cosine, rise=lambda x: _between(initial, _half_cosine(1 - x)))


def piecewise(
    steps: int,
    *,
    warmup: Number = 0.0,
    final: Number = 0.0,
    boundaries: tuple[Number, ...] | Number = (0.5, 0.75),
    multipliers: tuple[Number, ...] | Number = (0.1, 0.01),
    interpolation: str = "step",
) -> Shape:
    """1, then from each boundary on its multiplier; `final` is not used.

    Args:
      boundaries: increasing fractions of the run or whole steps. One within the warmup counts from the warmup's end.
      multipliers: one a boundary, of the peak (not of the multiplier before, as in optax).
      interpolation: "step", or "linear" for lines from point to point.
    """
    _check_name("interpolation", interpolation, ("step", "linear"))
    places, values = _boundaries(boundaries, steps), _tuple(multipliers)
    if len(places) != len(values):
        raise errors.ConfigError(f"the schedule has {len(places)} boundaries and {len(values)} multipliers")
    for value in values:
        _check("multipliers", value, 0, 1, "from 0 to 1 each")

    def after(count: jax.Array, start: jax.Array) -> jax.Array:
        at = jnp.stack([start, *(jnp.maximum(start, _length(place, steps)) for place in places)])
        levels = jnp.stack([jnp.asarray(value, jnp.float32) for value in (1.0, *values)])
        if interpolation == "linear":
            return jnp.interp(count, at, levels)
        return levels[jnp.sum(count >= at[1:])]

    return _after_warmup(steps, warmup, final, after)


def join(
    steps: int,
    *,
    warmup: Number = 0.0,
    final: Number = 0.0,
    parts: tuple[str, ...] | str = ("constant", "linear"),
    boundaries: tuple[float, ...] | float = (0.5,),
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> Shape:
    """One schedule after another, each from the multiplier at which the one before it ended.

        {"schedule": "join", "parts": ("inverse_square_root", "linear"), "boundaries": (0.8,), "warmup": 0.02,
         "final": 0.0, "arguments": {"inverse_square_root": {"timescale": 0.1}}}

    Args:
      warmup: of the first part, in which it ends, as of the run.
      final: of each part whose table holds none, as a fraction of the run's peak.
      parts: names of schedules, or free names whose tables say which `schedule` they are; "a,b" from a flag.
      boundaries: where the second part and those after it begin: increasing fractions of the run or whole steps.
      arguments: part -> its arguments, where fractions are of the part. `peak`, a fraction of the run's, restarts the
        multiplier there.
    """
    _check_steps(steps)
    names = tuple(name.strip() for name in parts.split(",")) if isinstance(parts, str) else tuple(parts)
    starts = [0, *(round(place * steps if place < 1 else place) for place in _boundaries(boundaries, steps))]
    if len(names) != len(starts):
        raise errors.ConfigError(
            f"{len(names)} schedules are joined by {len(names) - 1} boundaries, not {boundaries!r}"
        )
    given = {} if arguments is None else arguments
    if not isinstance(given, Mapping) or not all(isinstance(table, Mapping) for table in given.values()):
        example = {names[-1]: {"final": 0.1}}
        raise errors.ConfigError(f"the schedule's arguments are {given!r}; expected a table by part, such as {example}")
    tables = {name: dict(table) for name, table in given.items()}
    for name in tables:
        _check_name("arguments", name, names)
    _check("warmup", warmup, 0, math.inf, _FRACTION_OR_STEPS)
    _check("final", final, 0, 1, "from 0 to 1")
    if starts[1:] and not isinstance(warmup, jax.core.Tracer) and "warmup" not in tables.get(names[0], {}):
        last = float(warmup) * (steps if float(warmup) < 1 else 1)
        if round(last) > starts[1]:  # rounded as boundaries are
            what = f"the schedule's warmup takes {last:g} steps, and its first part, {names[0]!r}, ends at {starts[1]}"
            raise errors.ConfigError(f"{what}, before the peak is reached; make the warmup shorter")

    segments: list[tuple[int, int, Number, Shape]] = []  # start, length, peak, shape
    level: Number = 1.0
    for name, start, end in zip(names, starts, [*starts[1:], steps], strict=True):
        length = max(end - start, 1)
        table: dict[str, Any] = {"final": final} | tables.get(name, {})
        level = table.pop("peak", level)
        _check(f"{name}.peak", level, 0, 1, "from 0 to 1")
        _check(f"{name}.final", table["final"], 0, 1, "from 0 to 1")
        table["final"] = jnp.clip(table["final"] / jnp.maximum(level, 1e-30), 0, 1)
        if start == 0:
            rise = _length(warmup, steps)  # in steps; less than one is a fraction of the part again
            table = {"warmup": jnp.where(rise < 1, rise / length, rise)} | table
        shape = _part(table.pop("schedule", name), length, table)
        segments.append((start, length, level, shape))
        level = level * shape(length)

    def joined(count: Int[Array, ""] | int) -> Float[Array, ""]:
        count = jnp.clip(jnp.asarray(count), 0, steps)
        value = jnp.float32(0)
        for start, length, peak, shape in segments:
            value = jnp.where(count >= start, peak * shape(jnp.clip(count - start, 0, length)), value)
        return jnp.clip(value.astype(jnp.float32), 0, 1)

    return joined


def _part(name: str, steps: int, arguments: Mapping[str, Any]) -> Shape:
    function = lookup.find("schedule", name, sys.modules[__name__])
    parameters = inspect.signature(function).parameters
    known = set(parameters) - {"steps"}
    for key in arguments:
        if key not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise errors.ConfigError(f"schedule {name!r} takes no argument {key!r}: {errors.nearest(key, known)}")
    return function(steps, **arguments)


def _decay(
    steps: int,
    warmup: Number,
    final: Number,
    fall: Callable[[jax.Array], jax.Array],
    rise: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Shape:
    """After the warmup from 1 to `final`, as `fall` of the progress goes from 1 to 0."""

    def after(count: jax.Array, start: jax.Array) -> jax.Array:
        return _between(final, fall(_progress(count, start, steps)))

    return _after_warmup(steps, warmup, final, after, rise)


def _after_warmup(
    steps: int,
    warmup: Number,
    final: Number,
    after: Callable[[jax.Array, jax.Array], jax.Array],
    rise: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Shape:
    """`rise` of the progress in the warmup, then `after(count, end of the warmup)`, both float32[]; kept in [0, 1]."""
    _check_steps(steps)
    _check("warmup", warmup, 0, math.inf, _FRACTION_OR_STEPS)
    _check("final", final, 0, 1, "from 0 to 1")

    def shape(count: Int[Array, ""] | int) -> Float[Array, ""]:
        count = jnp.clip(jnp.asarray(count, jnp.float32), 0, steps)
        start = _length(warmup, steps)
        start = jnp.where(start < 1, 0, start)  # else the first step, at 0, would be lost to less than one
        return jnp.clip(jnp.where(count < start, rise(count / jnp.maximum(start, 1)), after(count, start)), 0, 1)

    return shape


def _half_cosine(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.cos(jnp.pi * x))


def _between(low: Number, x: jax.Array) -> jax.Array:
    """From `low` to 1 as x goes from 0 to 1."""
    low = jnp.asarray(low, jnp.float32)
    return low + (1 - low) * jnp.clip(x, 0, 1)


def _progress(count: jax.Array, start: jax.Array, end: jax.Array | int) -> jax.Array:
    """From 0 at the start to 1 at the end; 0 where they are one."""
    return jnp.clip((count - start) / jnp.maximum(end - start, 1e-6), 0, 1)


def _length(given: Number, steps: int) -> Float[Array, ""]:
    """A fraction of the run, or steps, as steps."""
    given = jnp.asarray(given, jnp.float32)  # an int times the steps may pass 2**31
    return _whole(jnp.where(given < 1, given * steps, given))


def _whole(steps: jax.Array) -> jax.Array:
    """The nearest whole number where float32 can't be trusted to tell: 0.29 of 100 steps is 29, not 29.000001."""
    return jnp.where(jnp.abs(steps - jnp.round(steps)) <= 1e-6 * steps, jnp.round(steps), steps)


def _tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)  # a flag's 0.5 is no tuple


def _boundaries(given: Any, steps: int) -> tuple[Any, ...]:
    places = _tuple(given)
    for place in places:
        _check("boundaries", place, 0, math.inf, "fractions of the run below 1, or whole steps", whole=True)
    if not any(isinstance(place, jax.core.Tracer) for place in places):
        in_steps = [place * steps if place < 1 else place for place in places]
        if any(a >= b for a, b in zip([0, *in_steps], [*in_steps, steps])):
            raise errors.ConfigError(
                f"the schedule's boundaries are {given!r}; expected above 0, increasing, before the run's end, {steps}"
            )
    return places


def _check(name: str, value: Any, low: float, high: float, expected: str, whole: bool = False) -> None:
    """Raises ConfigError unless `value` is traced, or within the bounds and (from 1 on, if asked for) whole."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        holds = low <= value <= high and value != math.inf and not (whole and value >= 1 and value % 1)
    except (TypeError, ValueError):
        holds = False
    if not holds:
        shown = value.tolist() if hasattr(value, "tolist") else value  # 0.5, not Array(0.5, dtype=float32)
        raise errors.ConfigError(f"the schedule's {name} is {shown!r}; expected {expected}")


def _check_steps(steps: Any) -> None:
    _check("steps", steps, 0, 2**31 - 1, "at most 2**31 - 1, as they are counted in int32")


def _check_name(argument: str, name: str, known: Any) -> None:
    if name not in known:
        raise errors.ConfigError(f"the schedule's {argument} has no {name!r}: {errors.nearest(str(name), known)}")
