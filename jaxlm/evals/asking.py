"""From names of evaluations to what they find."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import lookup
from jaxlm.data import TokenFile, Tokenizer
from jaxlm.errors import ConfigError
from jaxlm.evals import tasks
from jaxlm.evals.tasks import Result, Subject
from jaxlm.model import gpt2
from jaxlm.model.gpt2 import PyTree
from jaxlm.telemetry.writers import json_line

ALWAYS = ("eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy", "eval/gap", "eval/word_perplexity")
"""Metrics that training or `evaluate` reports whatever the tasks are."""


def find(name: str) -> Callable[[Subject], Result]:
    """The evaluation that a name of `eval.tasks` or --task means.

    Raises:
      ConfigError: there is none.
    """
    function = lookup.find("task", name, tasks)

    def ask(subject: Subject) -> Result:
        found = function(subject)
        if isinstance(found, dict):
            found = Result(found, {})
        if not isinstance(found, Result):
            raise ConfigError(f"task {name!r} returned {type(found).__name__}; expected a dict of numbers, or a Result")
        return found._replace(metrics={key: _number(name, key, value) for key, value in found.metrics.items()})

    return ask


def _number(task: str, key: str, value: Any) -> float:
    """A number of Python's, NumPy's or JAX's."""
    try:
        if isinstance(value, (str, bytes)) or np.ndim(value):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task {task!r} gives {type(value).__name__} as {key!r}; expected a number") from error


def named(results: Mapping[str, Result], taken: Iterable[str]) -> dict[str, float]:
    """The metrics of tasks, named "eval/" and what each task calls its own: TASK/METRIC, where it is one of ours.

    Args:
      results: by the names of the tasks.
      taken: names of other metrics.

    Raises:
      ConfigError: two of the same name.
    """
    owners = dict.fromkeys(taken, "jaxlm itself")
    out = {}
    for task, result in results.items():
        for name, value in result.metrics.items():
            full = f"eval/{name}"
            if full in owners:
                raise ConfigError(
                    f"task {task!r} gives {name!r}, and {full!r} is of {owners[full]} already; "
                    f"give it another name, such as {task.rpartition(':')[2] + '/' + name!r}"
                )
            owners[full], out[full] = f"task {task!r}", value
    return out


def asker(cfg: FrozenConfigDict, tokenizer: Tokenizer, split: TokenFile | None) -> Callable[[PyTree], dict[str, float]]:
    """What gives the metrics of `eval.tasks` for parameters, as `named`.

    Raises:
      ConfigError: an unknown task, or there is nothing to ask.
    """
    functions = {name: find(name) for name in cfg.eval.tasks}
    if split is None or not cfg.eval.every:
        raise ConfigError(f"eval.tasks={tuple(cfg.eval.tasks)} needs data.validation and eval.every")
    subject = functools.partial(
        Subject,
        model=gpt2.build(cfg.model),
        tokenizer=tokenizer,
        split=split,
        context_length=cfg.model.context_length,
        batch_size=cfg.data.batch_size,
        too_long=cfg.data.too_long,
    )

    def ask(params: PyTree) -> dict[str, float]:
        return named({name: function(subject(params=params)) for name, function in functions.items()}, ALWAYS)

    return ask


def report(facts: Mapping[str, Any], results: Mapping[str, Result], as_json: bool) -> str:
    """What was found, as a line for each figure, or as one JSON object in a line.

    Args:
      facts: numbers by name.
      results: of tasks, whose metrics get their names from `named`.

    Raises:
      ConfigError: as `named`.
    """
    figures = {**facts, **named(results, (*facts, *ALWAYS))}
    intervals = {f"eval/{name}": pair for result in results.values() for name, pair in result.intervals.items()}
    if as_json:
        details = {name: result.details for name, result in results.items()}
        return json_line(figures | ({"intervals": intervals, "details": details} if results else {}))
    width = max(20, *map(len, figures))
    lines = []
    for name, value in figures.items():
        interval = "  [{:,.4f}, {:,.4f}]".format(*intervals[name]) if name in intervals else ""
        lines.append(f"{name:<{width}} " + (f"{value:,}" if isinstance(value, int) else f"{value:,.4f}") + interval)
    return "\n".join(lines) + "\n" + "".join(result.text for result in results.values())
