"""What tasks found: as plain numbers, under names that no two share, and printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxlm.errors import ConfigError
from jaxlm.evals.tasks import Result
from jaxlm.telemetry.writers import json_line

AT_TIMES = ("eval/gap", "eval/word_perplexity")
"""Metrics of our own that some evaluations have and others don't: they are no task's in any."""


def plain(task: str, found: Result) -> Result:
    """A result of numbers, text and JSON of Python's own, where a task may give NumPy's and JAX's.

    Raises:
      ConfigError: something else is among them.
    """
    for field, kind, expected in (
        ("metrics", Mapping, "a dict"),
        ("intervals", Mapping, "a dict"),
        ("text", str, "lines, or ''"),
    ):
        if not isinstance(value := getattr(found, field), kind):
            raise ConfigError(f"task {task!r} gives {type(value).__name__} as its {field}; expected {expected}")
    metrics = {key: _number(task, key, value) for key, value in found.metrics.items()}
    intervals = {key: _interval(task, key, value) for key, value in found.intervals.items()}
    try:
        details = _listed(found.details)
        json_line(details)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"task {task!r} gives details that JSON can't hold: {error}") from error
    return Result(metrics, intervals, details, found.text)


def _listed(value: Any) -> Any:
    """With the arrays and numbers of NumPy and JAX in it as Python's lists and numbers."""
    if isinstance(value, Mapping):
        names = [name.item() if isinstance(name, np.generic) else name for name in value]
        return dict(zip(names, map(_listed, value.values()), strict=True))
    if isinstance(value, (list, tuple)):
        return list(map(_listed, value))
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, jax.Array)) else value


def _interval(task: str, key: str, value: Any) -> tuple[float, float]:
    try:
        low, high = value
    except (TypeError, ValueError) as error:
        what = f"task {task!r} gives {value!r} as the interval of {key!r}"
        raise ConfigError(f"{what}; expected two numbers, (low, high)") from error
    return _number(task, key, low), _number(task, key, high)


def _number(task: str, key: str, value: Any) -> float:
    """A number of Python's, NumPy's or JAX's."""
    try:
        if isinstance(value, (str, bytes)) or np.ndim(value):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task {task!r} gives {type(value).__name__} as {key!r}; expected a number") from error


def named(found: Mapping[str, Result], taken: Iterable[str]) -> dict[str, float]:
    """The metrics of tasks, named "eval/" and what each task calls its own: TASK/METRIC, where it is one of ours.

    Args:
      found: by the names of the tasks.
      taken: names of other metrics.

    Raises:
      ConfigError: two of the same name.
    """
    owners = dict.fromkeys(taken, "jaxlm itself")
    out = {}
    for task, result in found.items():
        for name, value in result.metrics.items():
            full = f"eval/{name}"
            if full in owners:
                raise ConfigError(
                    f"task {task!r} gives {name!r}, and {full!r} is of {owners[full]} already; "
                    f"give it another name, such as {task.rpartition(':')[2] + '/' + name!r}"
                )
            owners[full], out[full] = f"task {task!r}", value
    return out


def report(facts: Mapping[str, Any], found: Mapping[str, Result], as_json: bool) -> str:
    """What was found, as a line for each figure, or as one JSON object in a line.

    Args:
      facts: numbers by name.
      found: of tasks, whose metrics get their names from `named`.

    Raises:
      ConfigError: as `named`.
    """
    figures = {**facts, **named(found, (*facts, *AT_TIMES))}
    intervals = {f"eval/{name}": pair for result in found.values() for name, pair in result.intervals.items()}
    if as_json:
        details = {name: result.details for name, result in found.items()}
        return json_line(figures | ({"intervals": intervals, "details": details} if found else {}))
    width = max(20, *map(len, figures))
    lines = []
    for name, value in figures.items():
        interval = "  [{:,.4f}, {:,.4f}]".format(*intervals[name]) if name in intervals else ""
        lines.append(f"{name:<{width}} " + (f"{value:,}" if isinstance(value, int) else f"{value:,.4f}") + interval)
    return "\n".join(lines) + "\n" + "".join(result.text for result in found.values())
