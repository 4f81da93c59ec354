"""Tasks by their names, and what they are asked of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from jaxlm import config, lookup
from jaxlm.data import TokenFile, Tokenizer
from jaxlm.data.section import Section
from jaxlm.errors import ConfigError, DataError
from jaxlm.evals import results, tasks
from jaxlm.evals.tasks import Result, Subject
from jaxlm.model import gpt2
from jaxlm.model.gpt2 import PyTree


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
        return results.plain(name, found)

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


def check_config(cfg: FrozenConfigDict) -> None:
    """Raises ConfigError where the config alone tells that `eval.tasks` can't be asked."""
    check_format(cfg.eval.tasks, cfg.data, "the config")
    if cfg.eval.tasks and not (cfg.data.validation and cfg.eval.every):
        raise ConfigError(f"eval.tasks={tuple(cfg.eval.tasks)} needs data.validation and eval.every")


def subject(cfg: FrozenConfigDict, tokenizer: Tokenizer, split: TokenFile, params: PyTree = None) -> Subject:
    """What `eval.tasks` are given at an evaluation in training."""
    return Subject(
        gpt2.build(cfg.model, strict=False),  # of rows of any length
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
    """What gives the metrics of `eval.tasks` for parameters, beside others of given names, as `results.named`."""
    functions = {name: find(name) for name in cfg.eval.tasks}
    asked = subject(cfg, tokenizer, split)

    def ask(params: PyTree, taken: Iterable[str]) -> dict[str, float]:
        given = asked._replace(params=params)
        found = {name: function(given) for name, function in functions.items()}
        return results.named(found, (*taken, *results.AT_TIMES))

    return ask
