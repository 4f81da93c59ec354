"""What one trial gave, read from its run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm.ablation import scoring, stats
from jaxlm.ablation.methods import Machine
from jaxlm.ablation.plan import cost
from jaxlm.ablation.study import Trial
from jaxlm.errors import ConfigError, DataError, nearest
from jaxlm.telemetry import writers
from jaxlm.telemetry.energy import JOULES_PER_KWH
from jaxlm.training import rundir

TRIAL = "trial.json"
"""In a trial's run directory: of what study's variant it is, on what tokens, and how many runs shared its calls."""

WHOLE = ("done", "stopped early")
"""The statuses of runs that have a value."""

OVER = (*WHOLE, "diverged")
"""The statuses of runs that no call goes on with."""


class Curve(NamedTuple):
    """The study's metric over a run: arrays of one length, in the order of the steps."""

    steps: np.ndarray  # int64: completed optimizer steps
    tokens: np.ndarray  # int64: training tokens seen
    flops: np.ndarray  # float64: of model forward and backward passes so far
    seconds: np.ndarray  # float64: of training so far, without compilation, as the throughput rows tell; may be nan
    values: np.ndarray  # float64: may be nan
    training: np.ndarray  # float64: of eval/loss, the mean training loss since the value before; else nan


class Outcome(NamedTuple):
    """One trial, as its run directory tells it."""

    trial: str  # its address: the hash of its config
    variant: str
    seed: int
    point: Mapping[str, Any]  # {config field: value} of the tuning axes; empty where nothing is tuned
    tuning: bool  # a trial that chose the point, on a seed of its own, not one that is compared
    status: str  # of its status.json: "done", "stopped early", "diverged", ...; "" where it has not begun
    value: float  # the study's metric, as `scoring` takes it; nan where the run diverged or is not over
    curve: Curve
    tokens: int  # training tokens seen
    flops: float
    seconds: float  # of training; nan where unknown
    joules: float  # nan where unknown
    estimated: bool = False  # the joules are no counter's
    gap: float = math.nan  # evaluation loss less training loss, where the value was taken
    gco2e: float = math.nan  # grams; nan where unknown
    machine: Machine = {}  # that trained it, as its trial.json says
    config: FrozenConfigDict | None = None  # the trial's

    @property
    def finished(self) -> bool:
        """It has a value that counts."""
        return stats.finite(self.value)

    @property
    def diverged(self) -> bool:
        """It is over, and has none."""
        return self.status in OVER and not self.finished


def over(folder: Path) -> bool:
    """Whether no call goes on with the run of a directory."""
    found = rundir.read_status(folder)
    return found is not None and found.status in OVER


def read(trial: Trial, folder: Path, metric: str, score: str = "final") -> Outcome:
    """What a trial gave.

    Args:
      score: which value counts, see `scoring.judge`.

    Raises:
      ConfigError: it is over, and its rows have no such metric.
      DataError: its metrics.jsonl is damaged, or lacks its last rows.
    """
    ended, end = rundir.read_status(folder) or ("", 0)
    path = folder / writers.METRICS
    rows = writers.read_jsonl(path) if path.exists() else []
    own = cost(trial.config)

    def latest(name: str) -> float:
        return next((row[name] for row in reversed(rows) if name in row), math.nan)

    found = [row for row in rows if metric in row]
    if ended in WHOLE and not found:
        known = {name for row in rows for name in row if name not in ("step", "time")}
        raise ConfigError(f"no trial writes metric {metric!r}: {nearest(metric, known)}")
    if ended in WHOLE and (had := _last_row(rows, metric)) < _due(trial, metric, end):
        raise DataError(
            f"{folder} is {ended} at step {end}, and its {path.name} has {metric} up to step {had} only, as after a "
            "full disk; remove this folder, and the same command trains it again"
        )
    steps = np.array([row["step"] for row in found], np.int64)
    values = np.array([row[metric] for row in found], np.float64)
    timed = [(row["step"], row["throughput/step_ms"] / 1e3) for row in rows if "throughput/step_ms" in row]
    seconds = _seconds(timed, [*steps, rows[-1]["step"] if rows else 0], _beside(folder))
    tokens = steps * own.tokens_per_step
    gaps = np.array([row.get("eval/gap", math.nan) for row in found], np.float64)
    value = gap = math.nan
    if ended in WHOLE:
        at = scoring.place(rows, steps, scoring.judge(trial.config, score))
        fresh = not trial.config.init_from
        value = scoring.damped(metric, float(values[at]), int(steps[at]), rows, own.model.vocab_size, fresh)
        gap = float(gaps[at])
    return Outcome(
        trial=trial.address,
        variant=trial.variant,
        seed=trial.seed,
        point=trial.point,
        tuning=trial.tuning,
        status=ended,
        value=value if math.isfinite(value) else math.nan,
        curve=Curve(
            steps,
            tokens,
            tokens * float(own.flops_per_token),
            seconds[:-1],
            values,
            values - gaps if metric == "eval/loss" else np.full(len(values), math.nan),
        ),
        tokens=(last := rows[-1]["step"] if rows else 0) * own.tokens_per_step,
        flops=float(last * own.tokens_per_step * own.flops_per_token),
        seconds=float(seconds[-1]),
        joules=latest("energy/kwh") * JOULES_PER_KWH,
        estimated=any("energy/estimated" in row for row in rows),
        gap=gap,
        gco2e=latest("energy/gco2e"),
        machine=_machine(folder),
        config=trial.config,
    )


def _last_row(rows: Sequence[Mapping[str, Any]], metric: str) -> int:
    """The step of the last row of those that hold a metric: the evaluations', or those of training."""
    return max((row["step"] for row in rows if _evaluated(row) == _evaluated([metric])), default=0)


def _due(trial: Trial, metric: str, end: int) -> int:
    """The step that such a row is due at, in a run that ended with step `end`. Each ends with an evaluation."""
    every = trial.config.log.every
    if _evaluated([metric]) or (every and end == trial.config.steps):
        return end
    return end - end % every if every else 0


def _evaluated(names: Iterable[str]) -> bool:
    return any(name.startswith("eval/") for name in names)


def note(folder: Path) -> dict[str, Any]:
    """What trial.json says of a run; empty where there is none."""
    try:
        return dict(json.loads((folder / TRIAL).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _machine(folder: Path) -> Machine:
    found = note(folder).get("machine")
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, Mapping) else {}


def _beside(folder: Path) -> int:
    """How many runs shared the calls whose time a run's rows tell."""
    try:
        return int(note(folder)["beside"])
    except (ValueError, KeyError, TypeError):
        return 1


def _seconds(timed: Sequence[tuple[int, float]], steps: Sequence[int], beside: int) -> np.ndarray:
    """A run's share of the time of training up to each of some steps.

    Args:
      timed: (step, seconds per step since the row before). Steps after the last row take as long as those before it.
    """
    if not timed:
        return np.full(len(steps), np.nan)
    marks, pace = np.array(timed).T
    total = np.concatenate([[0.0], np.cumsum(np.diff(marks, prepend=0) * pace)])
    beyond = np.maximum(np.array(steps) - marks[-1], 0) * pace[-1]
    return (np.interp(steps, [0, *marks], total) + beyond) / beside
