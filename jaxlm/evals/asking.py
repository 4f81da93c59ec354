"""From names of evaluations to what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import config, lookup
from jaxlm.data import TokenFile, Tokenizer
from jaxlm.data.section import Section
from jaxlm.errors import ConfigError, DataError
from jaxlm.evals import tasks
from jaxlm.evals.tasks import Result, Subject
from jaxlm.model import gpt2
from jaxlm.model.gpt2 import PyTree
from jaxlm.telemetry.writers import json_line

AT_TIMES = ("eval/gap", "eval/word_perplexity")
"""Metrics of our own that some evaluations have and others don't: they are no task's in any."""


def find(name: str) -> Callable[[Subject], Result]:
    """The evaluation that a name of `eval.tasks` or --task means.

    Raises:
      ConfigError: there is none, or it can't be given a subject.
    """
    function = lookup.find("task", name, tasks)
    lookup.takes("task", name, function, "subject")

    def ask(subject: Subject) -> Result:
        with lookup.calling("task", name, function):
            found = function(subject)
        if isinstance(found, dict):
            found = Result(found, {})
        if not isinstance(found, Result):
            raise ConfigError(f"task {name!r} returned {type(found).__name__}; expected a dict of numbers, or a Result")
        return plain(name, found)

    return ask


def on_pairs(name: str) -> Callable[[Subject], Any] | None:
    """What a task makes of pairs before it needs a model; None of one that is not on pairs.

    Raises:
      ConfigError: there is no such task.
    """
    return getattr(lookup.find("task", name, tasks), "of_pairs", None)


def formed(
    cfg: FrozenConfigDict, data: str | None, given: Mapping[str, str | None], names: Iterable[str] = ()
) -> FrozenConfigDict:
    """The config for other data than its run's.

    Args:
      data: where it lies, of --data.
      given: a field of `cfg.data` that says what a row is made of -> its value, or None to leave it as it is. A
        template means pairs.
      names: tasks, of a model without a run: one on pairs reads nothing else.

    Raises:
      ConfigError: something is given, and no data; or a value that can't be.
    """
    changes = {f"data.{name}": value for name, value in given.items() if value is not None}
    if changes and not data:
        raise ConfigError(f"--{next(iter(changes))[5:]} says what other data is made of; give --data=PATH too")
    if any(map(on_pairs, names)) or {"data.prompt", "data.completion"} & {*changes}:
        changes = {"data.format": "pairs"} | changes
    return config.resolve(config.override(cfg, changes)) if changes else cfg


def check_format(names: Iterable[str], section: Section, whose: str) -> None:
    """Raises ConfigError for a task that is none, or one on pairs where `cfg.data` reads text.

    Args:
      whose: the section is, in words.
    """
    for name in names:
        if on_pairs(name) and section.format != "pairs":
            raise ConfigError(
                f"task {name!r} compares completions of prompts, and data.format of {whose} is {section.format!r}; "
                "expected data.format='pairs'"
            )


def check(names: Iterable[str], subject: Subject) -> None:
    """Does what tasks do with pairs before they need a model, so that what can't be asked is known before anything is
    computed.

    Raises:
      ConfigError: a task is none.
      DataError: one can't be asked, as the pairs are.
    """
    for name in names:
        if made := on_pairs(name):
            try:
                made(subject._replace(params=None))
            except DataError as error:
                raise DataError(f"task {name!r}: {error}") from error


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


def check_config(cfg: FrozenConfigDict) -> None:
    """Raises ConfigError where the config alone tells that `eval.tasks` can't be asked."""
    check_format(cfg.eval.tasks, cfg.data, "the config")
    if cfg.eval.tasks and not (cfg.data.validation and cfg.eval.every):
        raise ConfigError(f"eval.tasks={tuple(cfg.eval.tasks)} needs data.validation and eval.every")


def subject(cfg: FrozenConfigDict, tokenizer: Tokenizer, split: TokenFile, params: PyTree = None) -> Subject:
    """What `eval.tasks` are given at an evaluation in training."""
    return Subject(
        gpt2.build(cfg.model),
        params,
        tokenizer,
        split,
        context_length=cfg.model.context_length,
        batch_size=cfg.data.batch_size // cfg.data.micro_batches,
        chunks=cfg.model.loss_chunks,
        too_long=cfg.data.too_long,
    )


def asker(
    cfg: FrozenConfigDict, tokenizer: Tokenizer, split: TokenFile
) -> Callable[[PyTree, Iterable[str]], dict[str, float]]:
    """What gives the metrics of `eval.tasks` for parameters, beside others of given names, as `named`."""
    functions = {name: find(name) for name in cfg.eval.tasks}
    asked = subject(cfg, tokenizer, split)

    def ask(params: PyTree, taken: Iterable[str]) -> dict[str, float]:
        given = asked._replace(params=params)
        return named({name: function(given) for name, function in functions.items()}, (*taken, *AT_TIMES))

    return ask


def report(facts: Mapping[str, Any], results: Mapping[str, Result], as_json: bool) -> str:
    """What was found, as a line for each figure, or as one JSON object in a line.

    Args:
      facts: numbers by name.
      results: of tasks, whose metrics get their names from `named`.

    Raises:
      ConfigError: as `named`.
    """
    figures = {**facts, **named(results, (*facts, *AT_TIMES))}
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
