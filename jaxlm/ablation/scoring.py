"""Which value of a run counts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm.errors import ConfigError
from jaxlm.training import position

SCORES = ("final", "best")

MARGIN = 1.0
"""Nats per token above a uniform guess, beyond which a loss counts by its logarithm."""

_LOSS = re.compile(r"train/loss|eval/(\w+_)?loss")


def judge(cfg: FrozenConfigDict, score: str) -> str:
    """The metric where whose best a run's value counts; "": its last value counts.

    Args:
      score: "final", of the model that the run ends with: its last one, or where it may stop early that of
        `checkpoint.best`, to which it returns. "best": where `checkpoint.best` was best, in all trials alike.

    Raises:
      ConfigError: there is no `checkpoint.best` to go by.
    """
    if score == "best" and not cfg.checkpoint.best:
        raise ConfigError("score='best' takes each trial where its checkpoint.best was best; that is '': name a metric")
    return str(cfg.checkpoint.best) if score == "best" or position.may_be_best(cfg) else ""


def place(rows: Sequence[Mapping[str, Any]], steps: np.ndarray, by: str) -> int:
    """Which of some measurements counts: the last one, or the last that was made where another metric was best.

    The metric's own best would flatter it.

    Args:
      rows: of metrics.jsonl.
      steps: of the measurements, ascending, one at least.
      by: that metric, as `judge` gives it; where a run has no finite value of it the last measurement counts.
    """
    if by:
        seen = [row for row in rows if by.removeprefix("-") in row]
        lowest = [(position.lowest(row, by, "checkpoint.best"), row["step"]) for row in seen]
        if finite := [(value, step) for value, step in lowest if math.isfinite(value)]:
            return max(0, int(np.searchsorted(steps, min(finite)[1], side="right")) - 1)
    return len(steps) - 1


def damped(
    metric: str, value: float, step: int, rows: Sequence[Mapping[str, Any]], vocabulary: int, fresh: bool
) -> float:
    """A value as it counts: what of a loss is beyond a border, `MARGIN` above ln V, that of a uniform guess, as its
    logarithm, log(1 + x).

    Losses of runs that exploded, 2,000 on one seed and 6,000,000 on another, say little more than that they did; their
    spread would hide it from a test. An overfitted model's is left as it is: the training loss has to be beyond, too. A
    run that began with other weights may have begun higher: there its first training loss counts in place of ln V, if
    it is more.

    Args:
      value, step: that counts, and where.
      rows: of metrics.jsonl.
      fresh: it began with weights of no other model.
    """
    if not _LOSS.fullmatch(metric):
        return value
    training = [row["train/loss"] for row in rows if "train/loss" in row]
    by_then = [row["train/loss"] for row in rows if "train/loss" in row and row["step"] <= step]
    start = math.log(vocabulary) if fresh else max([math.log(vocabulary), *training[:1]])
    border = start + MARGIN
    return border + math.log1p(value - border) if min(value, *by_then[-1:], math.inf) > border else value


def words(judges: Mapping[str, str]) -> str:
    """The rule, for a report.

    Args:
      judges: variant -> its `judge`.
    """

    def best(judge: str) -> str:
        return f"where {judge.removeprefix('-')} was {'highest' if judge.startswith('-') else 'lowest'}"

    found = dict.fromkeys(judges.values())
    if not any(found):
        return "the last value of each trial"
    if len(found) == 1:
        return f"the value of each trial {best(*found)}"
    choosing = "; ".join(
        f"{', '.join(name for name in judges if judges[name] == judge)}, {best(judge)}" for judge in found if judge
    )
    last = "; of the others the last value" if "" in found else ""
    return f"the value of the model that a trial ends with: of {choosing}{last}"
