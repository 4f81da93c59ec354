"""A learning-rate range test: short runs over many peaks and some seeds, and the peak at which each seed is best.

The whole schedule passes in the short run, as it will in the long one. A long run wants a peak as high, or lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxlm import config, files
from jaxlm.ablation import runner
from jaxlm.ablation.memory import Memory
from jaxlm.ablation.outcomes import Outcome
from jaxlm.ablation.points import log_spaced
from jaxlm.ablation.stats import NOWHERE, t_interval
from jaxlm.ablation.study import trial
from jaxlm.errors import ConfigError
from jaxlm.optim.stages import stages, walk
from jaxlm.telemetry import curves
from jaxlm.training.signals import Signals


class Found(NamedTuple):
    """What a range test found."""

    field: str  # whose values were tried
    values: tuple[float, ...]  # in rising order
    losses: np.ndarray  # float64[values, seeds]: at the end of each run; nan where it diverged
    best: float  # the geometric mean over the seeds of each one's best value
    seeds: int  # so many: those that finished at some value
    # Over the seeds, by the t distribution at 95%, and at least half a step between values to either side: a parabola
    # through three losses tells no more. nan with one seed, or where all are alike.
    interval: tuple[float, float]
    edge: float  # the smallest value at which some seed diverged; inf where none did
    warnings: list[str]


def range_test(
    cfg: ConfigDict,
    workdir: str | Path,
    *,
    low: float = 1e-5,
    high: float = 1.0,
    count: int = 16,
    seeds: Sequence[int] = (100, 101, 102),
    steps: int = 100,
    field: str = "",
) -> Found:
    """Trains `cfg` for some steps at each of `count` values from low to high, with each seed, as lanes of one program.

    The same call goes on where one was broken off.

    Args:
      workdir: where the runs live, and lr.png.
      seeds: none on which a study then compares arms.
      field: the config field that holds the peak; "": that of the first stage that has one.

    Raises:
      ConfigError, DataError, Stopped: as `runner.run`.
    """
    if not 0 < low < high < math.inf:
        raise ConfigError(f"peaks from {low:g} to {high:g}; expected two numbers above 0, the lower one first")
    if count < 3 or not seeds or steps < 1:
        raise ConfigError(f"{count} peaks, {len(seeds)} seeds, {steps} steps; expected at least 3, 1 and 1")
    workdir, field = files.expanded(workdir), field or peak_field(cfg)
    changes = {"steps": steps, "eval.every": steps, "checkpoint.every": 0, "early_stopping.patience": 0}
    if not cfg.data.validation:
        changes["log.every"] = steps  # for the training loss at the end
    short = config.override(cfg, changes)
    values = log_spaced(low, high, count)
    arms = [config.resolve(config.override(short, {field: value})) for value in values]
    trials = [trial(arm, "range", seed, {field: value}) for value, arm in zip(values, arms) for seed in seeds]
    metric = "eval/loss" if cfg.data.validation else "train/loss"
    with Signals() as signals, runner.held(workdir):
        outcomes = runner.train(trials, workdir, Memory(workdir / "lr.json"), signals, metric)
        found = conclude(field, values, outcomes)
        draw(found, metric, workdir / "lr.png")
    return found


def peak_field(cfg: ConfigDict) -> str:
    """The config field of the chain's learning rate.

    Raises:
      ConfigError: no stage has one.
    """
    for stage in walk(stages(cfg.optimizer.to_dict())):
        table = cfg.optimizer.get(stage.name) or {}
        for name in ("peak", "learning_rate"):
            if name in table and stage.rate is not None:
                nested = ".peak" if isinstance(table[name], ConfigDict) else ""  # {"peak": ..., "schedule": ...}
                return f"optimizer.{stage.name}.{name}{nested}"
    raise ConfigError(f"no stage of {', '.join(cfg.optimizer.chain)} has a peak; name the field that holds it: --field")


def conclude(field: str, values: Sequence[float], outcomes: Sequence[Outcome]) -> Found:
    """What the runs say.

    Args:
      outcomes: of each value with each seed, the seeds of a value together.
    """
    losses = np.array([outcome.value for outcome in outcomes]).reshape(len(values), -1)
    bad = ~np.isfinite(losses)
    if bad.all():
        raise ConfigError(f"every run diverged, also at {field}={values[0]:g}; lower --low")
    best = [optimum(values, losses[:, seed]) for seed in range(losses.shape[1]) if not bad[:, seed].all()]
    center = float(np.mean(np.log(best)))
    alike = len(best) > 1 and np.ptp(best) == 0  # which tells nothing of other seeds
    low, high = NOWHERE if alike else t_interval(np.log(best), 0.95)
    half = float(np.diff(np.log(values)).max()) / 2
    if math.isfinite(low):
        low, high = min(low, center - half), max(high, center + half)
    edge = min((value for value, any_bad in zip(values, bad.any(axis=1)) if any_bad), default=math.inf)
    warnings = []
    ends = {float(values[0]), float(values[-1])}
    if any(one in ends for one in best):
        warnings.append(
            f"some seed is best at an end of the range, {values[0]:g} to {values[-1]:g}: widen it by --low and --high"
        )
    if len(best) < 2:
        which = "one seed" if losses.shape[1] == 1 else f"one seed of {losses.shape[1]} finished anywhere"
        warnings.append(f"{which}: there is no interval; give several")
    if alike:
        warnings.append("all seeds alike: there is no interval; try more values by --peaks")
    interval = (math.exp(low), math.exp(high))
    return Found(field, tuple(values), losses, math.exp(center), len(best), interval, edge, warnings)


def lowest(found: Found) -> tuple[float, float]:
    """The value with the lowest mean loss of those at which no seed diverged that finished anywhere, and that loss; nan
    where there is none."""
    finite = np.isfinite(found.losses)
    counted = finite.any(axis=0)
    whole = np.flatnonzero(finite[:, counted].all(axis=1))
    if not len(whole):
        return math.nan, math.nan
    means = found.losses[whole][:, counted].mean(axis=1)
    return found.values[whole[means.argmin()]], float(means.min())


def optimum(values: Sequence[float], losses: np.ndarray) -> float:
    """Where the loss is lowest: the vertex of the parabola, over the logarithm, through the lowest one and those beside
    it; itself where it is an end, or where one beside it is none."""
    i = int(np.nanargmin(losses))
    around = losses[max(i - 1, 0) : i + 2]
    if len(around) < 3 or not np.isfinite(around).all():
        return float(values[i])
    x = np.log(np.asarray(values[i - 1 : i + 2]))
    curvature, slope, _ = np.polyfit(x - x[1], around - around[1], 2)
    if curvature <= 0:
        return float(values[i])
    return float(np.exp(x[1] + np.clip(-slope / (2 * curvature), x[0] - x[1], x[2] - x[1])))


def draw(found: Found, metric: str, path: Path) -> Path | None:
    """Draws the losses over the values; None where matplotlib is not installed."""
    figure = curves.new_figure(4.5)
    if figure is None:
        return None
    axes = figure.subplots()
    whole = np.isfinite(found.losses).all(axis=1)
    for seed in range(found.losses.shape[1]):
        axes.plot(found.values, found.losses[:, seed], "o", color="#4477aa", markersize=3, alpha=0.4)
    means = np.where(whole, np.mean(np.where(whole[:, None], found.losses, 0), axis=1), np.nan)
    axes.plot(found.values, means, color="#4477aa", linewidth=1.8)
    if math.isfinite(found.interval[0]):
        axes.axvspan(*found.interval, color="#228833", alpha=0.15, linewidth=0)
    axes.axvline(found.best, color="#228833", linewidth=1.2)
    if math.isfinite(found.edge):
        axes.axvline(found.edge, color="#cc3311", linewidth=1.2, linestyle=":")
        axes.annotate("diverges", (found.edge, 0.97), xycoords=("data", "axes fraction"), color="#cc3311", ha="right")
    axes.set_xscale("log")
    axes.set_ylim(limits(found.losses))
    axes.set_xlabel(found.field)
    axes.set_ylabel(f"{metric} (nats per token)")
    axes.set_title(f"best at {found.best:.3g}", loc="left", color="#228833", fontsize="small")
    curves.frame(axes)
    return curves.save(figure, path)


def limits(losses: np.ndarray) -> tuple[float, float]:
    """Of the picture: room for the losses at the lowest value and for most of all; what is higher, just before it
    diverges, flattens the rest."""
    finite = losses[np.isfinite(losses)]
    low, high = finite.min(), max(*losses[0][np.isfinite(losses[0])], np.quantile(finite, 0.75), finite.min())
    return low - 0.05 * (high - low or 1), high + 0.1 * (high - low or 1)


def describe(found: Found, steps: int) -> str:
    """The figures as text: a line a value, and what to set."""
    rows = [f"  {'peak':>10}  {'loss':>9}  over seeds"]
    for value, losses in zip(found.values, found.losses):
        bad = int(np.sum(~np.isfinite(losses)))
        spread = f"{losses.min():.4f} to {losses.max():.4f}" if not bad else f"{bad} of {len(losses)} diverged"
        rows.append(f"  {value:>10.3g}  {'' if bad else f'{losses.mean():.4f}':>9}  {spread}")
    (low, high), all_seeds = found.interval, found.losses.shape[1]
    interval = f" [{low:.3g}, {high:.3g}]" if math.isfinite(low) else ""
    value, loss = lowest(found)
    if math.isfinite(value):
        rows.append(f"lowest loss: {loss:.4f} at {value:.3g}")
    of = f" of {all_seeds}" if found.seeds < all_seeds else ""
    seeds = f"{found.seeds}{of} {'seed' if all_seeds == 1 else 'seeds'}"
    rows.append(f"best after {steps} steps: {found.field}={found.best:.3g}{interval}, over {seeds}")
    if interval:
        rows.append("  [...]: where the optima of seeds lie, and half a step between the peaks to either side at least")
    if math.isfinite(found.edge):
        whole = np.isfinite(found.losses[found.values.index(found.edge) :]).all(axis=1)
        rows.append(f"diverges {'at' if whole.any() else 'from'} {found.edge:.3g}{'' if whole.any() else ' on'}")
    return "\n".join([*rows, *(f"warning: {line}" for line in found.warnings)])
