"""Pictures of a run: loss over steps with the learning rate beneath, and schedules before anything has run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxlm import files
from jaxlm.telemetry.writers import METRICS, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"train": "#4477aa", "eval": "#cc3311"}  # apart for colour-blind eyes too (Paul Tol)
_GREY = "#666666"


def draw(workdir: Path) -> Path | None:
    """Draws train and eval loss of `workdir`/metrics.jsonl to `workdir`/loss.png, atomically.

    Returns:
      The path of the picture; None if matplotlib isn't installed or no loss was written yet.

    Raises:
      DataError: metrics.jsonl is damaged.
      OSError: the picture can't be written.
    """
    figure = new_figure(5)
    if figure is None:
        return None
    source = workdir / METRICS
    rows = read_jsonl(source) if source.exists() else []
    losses = {name: _series(rows, f"{name}/loss") for name in _COLORS}
    losses = {name: series for name, series in losses.items() if np.isfinite(series[1]).any()}
    if not losses:
        return None
    steps, rates = _series(rows, "optim/learning_rate")

    if len(steps):
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(6, 1))
        _learning_rate(below, steps, rates)
    else:
        axes = below = figure.subplots()
    _steps(below)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(workdir.resolve().name, loc="left", fontweight="bold", parse_math=False)
    for name, series in losses.items():
        _curve(axes, name, *series)
    axes.set_ylim(*_limits(list(losses.values())))
    _label_ends(axes, losses)
    frame(axes)

    return save(figure, workdir / "loss.png")


def draw_schedule(values: Mapping[str, ArrayLike], path: Path, steps: ArrayLike | None = None) -> Path | None:
    """Draws numbers that follow a schedule, one panel each, to `path` (PNG), atomically.

    Args:
      values: name -> its value at each of `steps`.
      steps: by default each step of the run, from step 0 on.

    Returns:
      The path; None if matplotlib isn't installed or there is nothing to draw.

    Raises:
      OSError: the picture can't be written.
    """
    figure = new_figure(0.6 + 1.5 * len(values))
    if figure is None or not values:
        return None
    panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, value) in zip(panels, values.items(), strict=True):
        series = np.asarray(value, float)
        at = np.arange(len(series)) if steps is None else steps
        dot = "o" if len(series) == 1 else ""
        axes.plot(at, series, color=_COLORS["train"], linewidth=1.8, marker=dot, markersize=3)
        peak = max(series[np.isfinite(series)], default=0.0) or 1.0
        axes.set_ylim(0, 1.1 * peak)
        axes.set_yticks([0, peak / 2, peak], ["0", f"{peak / 2:.3g}", f"{peak:.3g}"])
        axes.set_title(name, loc="left", fontsize="small", color=_GREY, parse_math=False)
        frame(axes)
    _steps(panels[-1])
    return save(figure, path)


def sparkline(values: ArrayLike, width: int = 60) -> str:
    """Values from 0 up as ▁▃▆██▇▆▅▄▃▂▁: at most `width` blocks, each the mean of its share; a space for no number."""
    series = np.asarray(values, float)
    if not len(series):
        return ""
    means = np.array([part.mean() for part in np.array_split(series, min(width, len(series)))])
    finite = np.isfinite(means)
    peak = max(means[finite], default=0.0)
    levels = np.clip(np.round(7 * np.where(finite, means, 0) / (peak if peak > 0 else 1)), 0, 7).astype(int)
    return "".join("▁▂▃▄▅▆▇█"[level] if shown else " " for level, shown in zip(levels, finite, strict=True))


def new_figure(height: float) -> Figure | None:
    """An empty figure of so many inches; None if matplotlib isn't installed."""
    try:
        # The object API with its own canvas: pyplot would keep global state and may look for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, target: Path) -> Path:
    with files.atomic(target) as file:
        figure.savefig(file, format="png")
    return target


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; non-finite values as nan, which leave a gap."""
    steps = np.array([row["step"] for row in rows if name in row])
    values = np.array([row[name] for row in rows if name in row], float)
    return steps, np.where(np.isfinite(values), values, np.nan)


def _curve(axes: Axes, name: str, steps: np.ndarray, values: np.ndarray) -> None:
    color = _COLORS[name]
    if name == "train" and len(steps) >= 100:
        # single batches are noisy: what was measured pale, its mean over a twenty-fifth of the run on top
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        values = _smooth(values, len(values) // 50)
    few = len(steps) == 1 or (name == "eval" and len(steps) < 50)  # single measurements deserve a mark
    axes.plot(steps, values, color=color, linewidth=1.8, marker="o" if few else "", markersize=3)


def _learning_rate(axes: Axes, steps: np.ndarray, rates: np.ndarray) -> None:
    peak = max(rates[np.isfinite(rates)], default=0.0) or 1.0
    axes.plot(steps, rates, color=_GREY, linewidth=1.2)
    axes.set_ylim(0, 1.1 * peak)
    axes.set_yticks([0, peak], ["0", f"{peak:.2g}"])
    axes.set_title("learning rate", loc="left", fontsize="small", color=_GREY)
    frame(axes)


def _limits(losses: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Room for all but the first twentieth of the run: the fall from log V would flatten what follows."""
    steps, values = (np.concatenate(parts) for parts in zip(*losses, strict=True))
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    low, high = values.min(), values[steps >= steps.max() / 20].max()
    room = 0.05 * (high - low) or 0.1
    return low - room, high + room


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over up to 2 width + 1 finite neighbours, always as many on either side."""
    filled, known = np.nan_to_num(values), np.isfinite(values)
    total, count = (np.concatenate([[0.0], np.cumsum(x)]) for x in (filled, known))
    index = np.arange(len(values))
    reach = np.minimum(width, np.minimum(index, index[::-1]))  # symmetric at the ends too: no lag, no bias
    low, high = index - reach, index + reach + 1
    return np.where(known, (total[high] - total[low]) / np.maximum(count[high] - count[low], 1), np.nan)


def _label_ends(axes: Axes, losses: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Names each curve and states its last value, right of the axes at the height where the curve ends."""
    low, high = axes.get_ylim()
    gap = 0.11 * (high - low)  # two lines of text
    ends = {name: values[np.isfinite(values)][-1] for name, (_, values) in losses.items()}
    heights = dict(ends)
    if len(ends) == 2 and abs(ends["train"] - ends["eval"]) < gap:
        upper, lower = sorted(ends, key=lambda name: ends[name], reverse=True)
        middle = max((ends[upper] + ends[lower]) / 2, low + gap)
        heights = {upper: middle + gap / 2, lower: middle - gap / 2}
    for name, (steps, values) in losses.items():
        text = f"{name} {values[-1]:.4f}"
        if name == "eval":
            best = int(np.nanargmin(values))
            if best < len(values) - 1:
                text += f"\nbest {values[best]:.4f} at {steps[best]:,}"
        axes.annotate(
            text,
            (1.01, heights[name]),
            xycoords=("axes fraction", "data"),
            color=_COLORS[name],
            va="center",
            annotation_clip=False,
        )


def _steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def frame(axes: Axes) -> None:
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(color="#aaaaaa")
    axes.margins(x=0.01)
