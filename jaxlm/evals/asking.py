"""From names of evaluations to what they find."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from jaxlm import lookup
from jaxlm.data import TokenFile, Tokenizer
from jaxlm.errors import ConfigError
from jaxlm.evals import tasks
from jaxlm.evals.tasks import Result, Subject
from jaxlm.model import gpt2
from jaxlm.model.gpt2 import PyTree
from jaxlm.telemetry.writers import json_line


def find(name: str) -> Callable[[Subject], Result]:
    """The evaluation that a name of `eval.tasks` or --task means.

    Raises:
      ConfigError: there is none.
    """
    function = lookup.find("task", name, tasks)

    def ask(subject: Subject) -> Result:
        found = function(subject)
        if isinstance(found, Result):
            return found
        if isinstance(found, dict) and all(isinstance(value, (int, float)) for value in found.values()):
            return Result({key: float(value) for key, value in found.items()}, {})
        raise ConfigError(f"task {name!r} returned {type(found).__name__}; expected a dict of numbers, or a Result")

    return ask


def asker(cfg: FrozenConfigDict, tokenizer: Tokenizer, split: TokenFile | None) -> Callable[[PyTree], dict[str, float]]:
    """What gives the metrics of `eval.tasks` for parameters, named eval/TASK/METRIC.

    Raises:
      ConfigError: an unknown task, or there is nothing to ask.
    """
    functions = [find(name) for name in cfg.eval.tasks]
    if split is None or not cfg.eval.every:
        raise ConfigError(f"eval.tasks={tuple(cfg.eval.tasks)} needs data.validation and eval.every")
    subject = functools.partial(
        Subject,
        model=gpt2.build(cfg.model),
        tokenizer=tokenizer,
        split=split,
        context_length=cfg.model.context_length,
        batch_size=cfg.data.batch_size,
    )

    def ask(params: PyTree) -> dict[str, float]:
        results = [function(subject(params=params)) for function in functions]
        return {f"eval/{name}": value for result in results for name, value in result.metrics.items()}

    return ask


def report(facts: Mapping[str, Any], results: Mapping[str, Result], as_json: bool) -> str:
    """What was found, as a line for each figure, or as one JSON object in a line.

    Args:
      facts: numbers by name.
      results: of tasks, whose metrics get the names eval/TASK/METRIC.
    """
    figures = dict(facts)
    intervals = {f"eval/{name}": pair for result in results.values() for name, pair in result.intervals.items()}
    figures |= {f"eval/{name}": value for result in results.values() for name, value in result.metrics.items()}
    if as_json:
        details = {name: result.details for name, result in results.items()}
        return json_line(figures | ({"intervals": intervals, "details": details} if results else {}))
    width = max(20, *map(len, figures))
    lines = []
    for name, value in figures.items():
        interval = "  [{:,.4f}, {:,.4f}]".format(*intervals[name]) if name in intervals else ""
        lines.append(f"{name:<{width}} " + (f"{value:,}" if isinstance(value, int) else f"{value:,.4f}") + interval)
    return "\n".join(lines) + "\n" + "".join(result.text for result in results.values())
