"""Where a run stands beside its state, and the calls that are left to its end: functions of the config and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import FrozenConfigDict

from jaxlm.errors import ConfigError, nearest
from jaxlm.evals import perplexity
from jaxlm.optim import chain


class Best(NamedTuple):
    """The lowest value of a metric so far, for how many evaluations it has stood, and when it was seen."""

    value: float | None = None
    stale: int = 0
    step: int = 0
    metric: str = ""  # whose; "" in checkpoints from before it was noted

    def of(self, metric: str) -> Best:
        """This, or a new one where it is another metric's."""
        return self._replace(metric=metric) if self.metric in ("", metric) else Best(metric=metric)

    @property
    def worth(self) -> float | None:
        """The value as the metric has it, also of one that is to be high."""
        return -self.value if self.value is not None and self.metric.startswith("-") else self.value

    def seen(self, value: float, step: int, min_delta: float = 0.0) -> Best:
        better = math.isfinite(value) and (self.value is None or value < self.value - min_delta)
        return self._replace(value=value, stale=0, step=step) if better else self._replace(stale=self.stale + 1)


class Position(NamedTuple):
    """What a checkpoint holds beside the state, as JSON."""

    sequences: int  # training sequences seen
    tokens: str  # sha256 of the training tokens
    best: Best = Best()  # of checkpoint.best
    patience: Best = Best()  # of early_stopping.metric
    losses: tuple[float, int] = (0.0, 0)  # sum and number of the training losses that the next eval/gap is about
    skipped: tuple[int, int] = (0, 0)  # steps without an update: in all, and the last ones in a row
    recent: tuple[float, ...] = ()  # the latest training losses, where spikes are looked for
    rollbacks: int = 0
    joules: float = 0.0  # used so far; what a killed process used after its last checkpoint is in no sum
    validation: str = ""  # sha256 of the held-out tokens; "" without any, or from before it was noted
    code: Mapping[str, str] = {}  # of the functions in the config, see `functions.digests`


def of_json(raw: dict[str, Any]) -> Position:
    """The position of which a checkpoint holds `_asdict()`."""
    tuples = {name: tuple(raw[name]) for name in ("losses", "skipped", "recent")}
    return Position(**raw | tuples | {name: Best(*raw[name]) for name in ("best", "patience")})


def judged(now: Position, cfg: FrozenConfigDict, metrics: Mapping[str, float], step: int) -> tuple[Position, str]:
    """The position after an evaluation; and why the run is to stop early, in words, "" where it is not.

    Raises:
      ConfigError: the evaluation gives no such metric as the config judges by.
    """
    best, patience, stopping = now.best, now.patience, cfg.early_stopping
    if cfg.checkpoint.best:
        best = best.of(cfg.checkpoint.best).seen(lowest(metrics, cfg.checkpoint.best, "checkpoint.best"), step)
    if stopping.patience or stopping.metric.removeprefix("-") in metrics:
        value = lowest(metrics, stopping.metric, "early_stopping.metric")
        patience = patience.of(stopping.metric).seen(value, step, stopping.min_delta)
    now = now._replace(best=best, patience=patience)
    return now, stale(now, cfg)


def check(cfg: FrozenConfigDict, metrics: Mapping[str, float]) -> None:
    """That evaluations which give such metrics can judge the run.

    Raises:
      ConfigError: as `judged`.
    """
    judged(Position(0, ""), cfg, metrics, 0)


def judging(cfg: FrozenConfigDict, averages: Iterable[str]) -> list[str]:
    """Which of these averages of the parameters the run is judged by."""
    stopping = cfg.early_stopping
    judges = [
        metric.removeprefix("-") for metric in (cfg.checkpoint.best, stopping.metric if stopping.patience else "")
    ]
    begins = {name: perplexity.named("eval/", name) for name in averages if name}
    return [name for name, begin in begins.items() if any(metric.startswith(begin) for metric in judges)]


def stale(now: Position, cfg: FrozenConfigDict) -> str:
    """Why a run that stands here is not to go on, in words; "" where it is."""
    stopping, patience = cfg.early_stopping, now.patience.of(cfg.early_stopping.metric)
    if not 0 < stopping.patience <= patience.stale:
        return ""
    name = stopping.metric.removeprefix("-")
    if patience.worth is None:
        return f"{name} was never finite"
    return f"{name} has not improved on {patience.worth:.4f}"


def result(now: Position, cfg: FrozenConfigDict, step: int) -> int | None:
    """The step whose parameters are the result of a run that stands at `step`, where these are not its own: the best
    one's, once a run that may stop early, and saves, did so or came to its end."""
    best = now.best.of(cfg.checkpoint.best)
    over = step == cfg.steps or stale(now, cfg)
    return best.step or None if may_be_best(cfg) and cfg.checkpoint.every and over else None


def may_be_best(cfg: FrozenConfigDict) -> bool:
    """Whether the result of a run, once it is over, is its best step, and not its last."""
    return bool(cfg.checkpoint.best and cfg.early_stopping.patience)


def before_evaluation(cfg: FrozenConfigDict) -> Callable[[int], bool]:
    """Whether eval/gap is about a step's training loss: one of the last tenth of the steps from one evaluation to the
    next, and of one at least. Earlier ones are higher for no other reason than that they are earlier."""
    steps, every = cfg.steps, min(cfg.eval.every, cfg.steps)
    tail = max(1, every // 10)
    return lambda step: every > 0 and min(-(-step // every) * every, steps) - step < tail


def calls(start: int, cfg: FrozenConfigDict) -> Iterator[tuple[int, int]]:
    """(first step, number of steps) of each dispatch from `start` to the end of the run, which may be far.

    Calls end at multiples of steps_per_call, at evaluations and at checkpoints. So they depend on where a run is,
    not on where it was resumed, and neither do its bits.
    """
    steps = cfg.steps  # a config's fields take longer to read than all else here
    marks = [every for every in (cfg.steps_per_call, cfg.eval.every, cfg.checkpoint.every) if every]
    while start < steps:
        stop = min([steps, *((start // every + 1) * every for every in marks)])
        yield start, stop - start
        start = stop


def together(plan: Iterable[tuple[int, int]], steps: int) -> Iterator[list[tuple[int, int]]]:
    """The calls in their order, in parts of at most so many steps, or of one call."""
    part: list[tuple[int, int]] = []
    for start, count in plan:
        if part and start + count - part[0][0] > steps:
            yield part
            part = []
        part.append((start, count))
    if part:
        yield part


def moved_rates(cfg: FrozenConfigDict, length: int, count: jax.Array, step: int) -> list[str]:
    """How learning rates move where a run was to have `length` steps, as lines to say: a schedule is stretched.

    Args:
      count: int32[], at which the schedules stand.
      step: completed steps.
    """
    spec = cfg.optimizer.to_dict()
    before, now = (chain.learning_rates(spec, None, steps, count) for steps in (length, cfg.steps))
    return [
        f"the schedule of optimizer.{stage} ends at step {cfg.steps} now, not {length}: the learning rate of step "
        f"{step + 1} is {rate:.3g}, not {before[stage]:.3g}"
        for stage, rate in now.items()
        if rate != before[stage]
    ]


def lowest(metrics: Mapping[str, float], name: str, field: str) -> float:
    """The metric that is to be low: that of this name, or minus the one that "-name" wants high.

    Raises:
      ConfigError: there is none, named by a field of the config.
    """
    plain = name.removeprefix("-")
    if plain not in metrics:
        raise ConfigError(f"{field} is {name!r}, and no evaluation gives that: {nearest(plain, metrics)}")
    return -metrics[plain] if name.startswith("-") else metrics[plain]
