"""Which value of a run counts: one rule for all trials of a study, so that runs that are the same count the same."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.ablation.study import Trial
from jaxlm.training import position

MARGIN = 1.0
"""Nats per token above a uniform guess, beyond which a loss counts by its logarithm."""

_LOSS = re.compile(r"train/loss|eval/(\w+_)?loss")


def watched(trials: Sequence[Trial], baseline: str) -> str:
    """The metric where whose best every trial of a study is scored: `early_stopping.metric` of an arm that may stop
    early, the baseline first. "": none may, and the last values count.

    A stopped run's value is that of its best state. Beside it the last value of a run that went on would be that of
    another rule: the same run, with patience and without, would differ.
    """
    stopping = [one for one in trials if one.config.early_stopping.patience]
    first = min(stopping, key=lambda one: one.variant != baseline, default=None)
    return str(first.config.early_stopping.metric) if first else ""


def place(rows: Sequence[Mapping[str, Any]], steps: np.ndarray, watched: str) -> int:
    """Which of some measurements counts: the last one, or the last that was made where `watched` was best.

    The metric's own best would flatter it. `min_delta`, which decides when a run stops, has no part in it.

    Args:
      rows: of metrics.jsonl.
      steps: of the measurements, ascending, one at least.
      watched: as `watched` gives it; where a run has no finite value of it the last measurement counts.
    """
    if watched:
        seen = [row for row in rows if watched.removeprefix("-") in row]
        lowest = [(position.lowest(row, watched, "early_stopping.metric"), row["step"]) for row in seen]
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


def words(watched: str) -> str:
    """The rule, for a report."""
    if not watched:
        return "the last value of each trial"
    best = "highest" if watched.startswith("-") else "lowest"
    return (
        f"in every trial the value where {watched.removeprefix('-')} was {best}, as an arm may stop early, and a "
        "stopped run counts as it was at its best"
    )
