"""What a report draws, and the HTML page that shows it: one file that needs no network.

The page's text is `page.html` (Jinja2), its looks `page.css`, its behaviour `page.js`; the charts are Plotly's.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.ablation.findings import Findings, Outcome
from jaxlm.ablation.stats import LARGEST, Comparison

GREY, FLOOR = "#666666", "#e8e8e8"
_BASELINE = "#000000"
# Apart for colour-blind eyes too, and dark enough on white (Paul Tol's and Okabe and Ito's).
_COLORS = ("#4477aa", "#e06010", "#228833", "#aa3377", "#1fa2d8", "#8c7a00", "#882255", "#2f9e8a")
_DASHES: tuple[tuple[int, ...], ...] = ((), (8, 4), (2, 3), (8, 3, 2, 3))
_DOTTED = "2px,3px"


class Look(NamedTuple):
    """Of a variant, in all plots."""

    color: str
    dash: tuple[int, ...]  # lengths of strokes and gaps; solid until the colours have run out


class Cell(NamedTuple):
    """What a table says in one place."""

    text: str
    key: float | str  # to sort by; nan comes last


class Table(NamedTuple):
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Band(NamedTuple):
    """The metric of a variant over its runs: arrays of one length, over the steps that all its seeds measured."""

    tokens: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray  # over the seeds, ddof 1; nan for one seed
    finished: bool  # of the seeds that finished; otherwise none did, and this is of the others


class Sensitivity(NamedTuple):
    """The metric of a variant over one tuning axis, at the best of the other axes."""

    values: np.ndarray  # of the axis, ascending, where a seed finished
    metric: np.ndarray  # mean over the seeds
    good: np.ndarray  # bool: within the baseline's noise floor of the best
    edge: float  # the smallest value from which a seed diverged; nan where none did


def looks(findings: Findings) -> dict[str, Look]:
    """Black for the baseline; for the others one colour each, and dashes once these run out."""
    others = [variant for variant in findings.variants if variant != findings.baseline]
    shown = {
        variant: Look(_COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS) % len(_DASHES)])
        for i, variant in enumerate(others)
    }
    return {findings.baseline: Look(_BASELINE, ()), **shown}


def finished(outcome: Outcome) -> bool:
    return abs(outcome.value) <= LARGEST  # False for nan


def diverged(outcome: Outcome) -> bool:
    return not finished(outcome) and (outcome.status == "diverged" or not math.isnan(outcome.value))


def compared(findings: Findings, variant: str) -> list[Outcome]:
    """The variant's trials that are compared, not those that tuned it."""
    return [one for one in findings.outcomes if one.variant == variant and not one.tuning]


def bands(findings: Findings) -> dict[str, Band]:
    """Of each variant that has measured anything, in the study's order."""
    found = {}
    for variant in findings.variants:
        outcomes = [one for one in compared(findings, variant) if len(one.curve.steps)]
        curves = [one.curve for one in outcomes if finished(one)] or [one.curve for one in outcomes]
        if not curves:
            continue
        steps = curves[0].steps
        for curve in curves[1:]:
            steps = np.intersect1d(steps, curve.steps)
        picked = [np.searchsorted(curve.steps, steps) for curve in curves]

        def mean(name: str, curves: Any = curves, picked: Any = picked) -> np.ndarray:
            return np.mean([getattr(curve, name)[i] for curve, i in zip(curves, picked)], axis=0)

        values = np.array([curve.values[i] for curve, i in zip(curves, picked)], float)
        values[~(np.abs(values) <= LARGEST)] = np.nan
        one_seed = np.full(len(steps), np.nan)
        deviation = values.std(axis=0, ddof=1) if len(values) > 1 else one_seed
        whole = any(finished(one) for one in outcomes)
        tokens, flops, seconds = (mean(name) for name in ("tokens", "flops", "seconds"))
        found[variant] = Band(tokens, flops, seconds, values.mean(axis=0), deviation, whole)
    return found


def band_limits(found: Mapping[str, Band]) -> tuple[float, float]:
    """Of the metric: room for what finished, but not for the first third, whose fall would flatten what follows."""
    shown = [band for band in found.values() if band.finished] or list(found.values())
    later = [band.mean[band.tokens >= band.tokens.max(initial=0) / 3] for band in shown]
    values = np.concatenate([*later, np.empty(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    room = 0.05 * float(np.ptp(values)) or 0.1
    return float(values.min()) - room, float(values.max()) + room


def difference_limits(findings: Findings) -> tuple[float, float]:
    """Of the forest plot: room for the noise floor and all intervals, but not for those far longer than most."""
    floor = findings.noise.floor if findings.noise else 0.0
    ends = [end for one in findings.comparisons for end in (one.mean, *one.interval) if math.isfinite(end)]
    ends += [-floor, floor]
    most = 6 * float(np.median(np.abs(ends))) or max(map(abs, ends)) or 1.0
    near = [end for end in ends if abs(end) <= most]
    low, high = min(near), max(near)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def remark(findings: Findings, one: Comparison, places: int) -> str:
    """Beside a point of the forest plot: the verdict, or the difference where the plot has no room for it."""
    low, high = difference_limits(findings)
    return f"outside, at {one.mean:+.{places}f}" if one.mean < low or one.mean > high else one.verdict


def sensitivities(findings: Findings) -> dict[str, dict[str, Sensitivity]]:
    """Axis -> variant -> what it does, for the tuning axes of numbers on which a variant tried two values or more."""
    found: dict[str, dict[str, Sensitivity]] = {}
    floor = findings.noise.floor if findings.noise else 0.0
    sign = 1 if findings.lower_is_better else -1
    for axis in dict.fromkeys(axis for one in findings.outcomes for axis in one.point):
        for variant in findings.variants:
            trials = [one for one in findings.outcomes if one.variant == variant and _is_number(one.point.get(axis))]
            trials = [one for one in trials if one.tuning] or trials
            points: dict[float, dict[str, list[float]]] = {}  # value -> the other axes -> over the seeds
            for one in filter(finished, trials):
                rest = repr(sorted((name, value) for name, value in one.point.items() if name != axis))
                points.setdefault(float(one.point[axis]), {}).setdefault(rest, []).append(sign * one.value)
            values = sorted(points)
            best = np.array([min(np.mean(seeds) for seeds in points[value].values()) for value in values])
            edge = min((float(one.point[axis]) for one in trials if diverged(one)), default=math.nan)
            if len({*values, *([] if math.isnan(edge) else [edge])}) > 1:
                good = best <= best.min(initial=math.inf) + floor
                found.setdefault(axis, {})[variant] = Sensitivity(np.array(values), sign * best, good, edge)
    return found


def sensitivity_limits(found: Mapping[str, Sensitivity], lower_is_better: bool) -> tuple[float, float]:
    """Of the metric: room for the best half and what is near to it; far too small or large values would flatten it."""
    sign = 1 if lower_is_better else -1
    values = sign * np.concatenate([*(one.metric for one in found.values()), np.empty(0)])
    if not len(values):
        return 0.0, 1.0
    low = float(values.min())
    high = min(float(values.max()), low + 4 * (float(np.median(values)) - low)) if len(values) > 2 else values.max()
    room = 0.1 * (high - low) or 0.1
    ends = sign * (low - room), sign * (high + room)
    return min(ends), max(ends) + 2 * room  # on top there are the divergence marks


def edge_heights(findings: Findings, found: Mapping[str, Sensitivity]) -> dict[str, float]:
    """Where a variant's divergence is marked: below the upper end, beside nobody else's."""
    low, high = sensitivity_limits(found, findings.lower_is_better)
    step = min(0.045, 0.25 / len(found)) * (high - low)
    return {variant: high - (row + 0.8) * step for row, variant in enumerate(found)}


def scale(found: Mapping[str, Sensitivity]) -> str:
    """Logarithmic where it can be: the values of a tuning axis are mostly apart by factors."""
    return "log" if min(_all_values(found)) > 0 else "linear"


def tried(found: Mapping[str, Sensitivity]) -> list[float]:
    """The values to label on the axis: all, where these are few."""
    values = sorted(_all_values(found))
    return values if len(values) <= 8 else []


def time_unit(found: Mapping[str, Band]) -> tuple[str, float]:
    """What the time axis counts in, and the seconds of it; ("", 1) where no time was measured."""
    longest = max((float(x) for band in found.values() for x in band.seconds if math.isfinite(x)), default=math.nan)
    if math.isnan(longest):
        return "", 1
    return ("seconds", 1) if longest < 300 else ("minutes", 60) if longest < 3 * 3600 else ("hours", 3600)


def cut(name: str, length: int = 36) -> str:
    """A name that plots have room for."""
    return name if len(name) <= length else name[: length - 1] + "…"


def render(findings: Findings, tables: Mapping[str, Table], words: Mapping[str, Any], places: int) -> str | None:
    """The page; None if Jinja2 or Plotly isn't installed.

    Args:
      tables: what `report` also writes as Markdown, by the names that page.html uses.
      words: the other text of page.html.
      places: decimals of the metric.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    here = Path(__file__)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    figures = {"forest": _forest(findings, places), "curves": _curves(findings, places)}
    tuned = sensitivities(findings)
    for i, axis in enumerate(tuned):
        figures[f"sensitivity-{i}"] = _sensitivity(findings, axis, tuned[axis], places)
    return environment.get_template("page.html").render(
        findings=findings,
        tables=tables,
        words=words,
        looks=looks(findings),
        figures=_json(figures),
        axes=[(name, axis["title"]) for name, axis in figures["curves"]["axes"].items()],
        drawn=list(bands(findings)),
        tuned={axis: list(found) for axis, found in tuned.items()},
        css=here.with_suffix(".css").read_text(encoding="utf-8"),
        js=here.with_suffix(".js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def _forest(findings: Findings, places: int) -> dict[str, Any]:
    shown, data, labels = looks(findings), [], []
    low, high = difference_limits(findings)
    for row, one in enumerate(findings.comparisons):
        color, (left, right) = shown[one.variant].color, one.interval
        mean = f"{one.mean:+.{places}f}"
        bar = {"type": "data", "symmetric": False, "array": [right - one.mean], "arrayminus": [one.mean - left]}
        interval = "" if math.isnan(left) else f" [{left:+.{places}f}, {right:+.{places}f}]"
        data.append(
            {"type": "scatter", "mode": "markers", "x": [one.mean], "y": [row], "showlegend": False}
            | {"name": _text(cut(one.variant)), "marker": {"color": color, "size": 10}}
            | {"error_x": bar | {"visible": bool(interval), "thickness": 2, "width": 5}}
            | {"hovertemplate": f"{mean}{interval}<br>{one.verdict}"}
        )
        label = f"{cut(one.variant, 24)} · {remark(findings, one, places)}"
        place = {"xref": "paper", "x": 0, "xanchor": "left", "y": row - 0.36, "showarrow": False}
        labels.append(place | {"text": _text(label)})
    floor = findings.noise.floor if findings.noise else 0.0
    behind = {"y0": 0, "y1": 1, "yref": "paper", "layer": "between"}
    grey = {"type": "rect", "x0": -floor, "x1": floor, "fillcolor": FLOOR, "line": {"width": 0}}
    zero = {"type": "line", "x0": 0, "x1": 0, "line": {"color": GREY, "width": 2}}
    layout = _layout(f"{_text(findings.metric)}: variant minus baseline", "")
    layout["xaxis"] |= {"range": [low, high]}
    layout["yaxis"] |= {"range": [len(data) - 0.4, -0.75], "visible": False, "fixedrange": True}
    layout |= {"annotations": labels, "shapes": [grey | behind, zero | behind], "hovermode": "closest"}
    layout |= {"height": 110 + 54 * len(data), "margin": {"l": 8, "r": 8, "t": 32, "b": 52}}
    return {"data": data, "layout": layout}


def _curves(findings: Findings, places: int) -> dict[str, Any]:
    """With `axes`: of each x axis its title and the x of every trace, which page.js puts in."""
    found, shown, data = bands(findings), looks(findings), []
    unit, seconds = time_unit(found)
    axes: dict[str, dict[str, Any]] = {
        "tokens": {"title": "training tokens", "tick": "~s", "hover": ",.0f", "x": []},
        "flops": {"title": "training FLOPs", "tick": ".1~e", "hover": ".3~e", "x": []},
    }
    if unit:
        axes["time"] = {"title": f"training time ({unit})", "tick": "~f", "hover": ".1f", "x": []}
    for variant, band in found.items():
        color, dash = shown[variant]
        several = np.isfinite(band.deviation).any()
        edge = np.flatnonzero(np.isfinite(band.mean) & np.isfinite(band.deviation))
        around = np.concatenate([edge, edge[::-1]])
        outline = band.mean[around] + band.deviation[around] * np.repeat([1, -1], len(edge))
        group = {"type": "scatter", "legendgroup": variant, "showlegend": False}
        data.append(
            group
            | {"y": outline, "mode": "lines", "fill": "toself", "fillcolor": _pale(color), "line": {"width": 0}}
            | {"hoverinfo": "skip"}
        )
        data.append(
            group
            | {
                "y": band.mean,
                "mode": "lines",
                "name": _text(cut(variant)),
                "customdata": band.deviation,
            }
            | {"line": {"color": color, "dash": _dash(dash) if band.finished else _DOTTED, "width": 2}}
            | {"hovertemplate": f"%{{y:.{places}f}}" + (f" ± %{{customdata:.{places}f}}" if several else "")}
        )
        for name, x in (("tokens", band.tokens), ("flops", band.flops), ("time", band.seconds / seconds)):
            if name in axes:
                axes[name]["x"] += [x[around], x]
    layout = _layout("", findings.metric)
    layout["yaxis"]["range"] = band_limits(found)
    return {"data": data, "layout": layout | {"hovermode": "x unified", "hoverdistance": -1}, "axes": axes}


def _sensitivity(findings: Findings, axis: str, found: Mapping[str, Sensitivity], places: int) -> dict[str, Any]:
    shown, data = looks(findings), []
    heights = edge_heights(findings, found)
    for variant, one in found.items():
        color, dash = shown[variant]
        group = {"type": "scatter", "legendgroup": variant, "showlegend": False}
        group |= {"name": _text(cut(variant))}
        fills = [color if good else "#ffffff" for good in one.good]
        mark = {"size": 9, "color": fills, "line": {"color": color, "width": 2}}
        data.append(
            group
            | {"x": one.values, "y": one.metric, "mode": "lines+markers", "marker": mark}
            | {"line": {"color": color, "dash": _dash(dash)}, "hovertemplate": f"%{{x:.6~g}}: %{{y:.{places}f}}"}
        )
        if not math.isnan(one.edge):
            cross = {"symbol": "x-thin", "size": 9, "line": {"color": color, "width": 2.5}}
            data.append(
                group
                | {"x": [one.edge], "y": [heights[variant]], "mode": "markers", "marker": cross}
                | {"hovertemplate": "diverged from %{x:.6~g}"}
            )
    layout = _layout(_text(axis), findings.metric)
    layout["xaxis"] |= {"type": scale(found)}
    if ticks := tried(found):
        layout["xaxis"] |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    layout["yaxis"] |= {"range": sensitivity_limits(found, findings.lower_is_better)}
    return {"data": data, "layout": layout | {"hovermode": "closest"}}


def _layout(x: str, y: str) -> dict[str, Any]:
    axis = {"automargin": True, "gridcolor": "#e5e5e5", "linecolor": "#aaaaaa", "zeroline": False, "ticks": "outside"}
    return {
        "xaxis": axis | {"title": {"text": x}},
        "yaxis": axis | {"title": {"text": _text(y)}},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "margin": {"l": 56, "r": 12, "t": 32, "b": 52},
        "height": 420,
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hoverlabel": {"namelength": -1, "bgcolor": "#ffffff", "font": {"color": "#222222"}},
    }


def _text(text: str) -> str:
    """As Plotly, which knows some tags and entities, shows it unchanged."""
    return html.escape(text, quote=False)


def _dash(lengths: tuple[int, ...]) -> str:
    return ",".join(f"{length}px" for length in lengths) or "solid"


def _pale(color: str) -> str:
    return "rgba({}, {}, {}, 0.18)".format(*bytes.fromhex(color[1:]))


def _all_values(found: Mapping[str, Sensitivity]) -> set[float]:
    return {float(value) for one in found.values() for value in (*one.values, one.edge) if not math.isnan(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: no nan, and nothing that would end it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, (list, tuple, np.ndarray)):
            return [plain(one) for one in value]
        if isinstance(value, (float, np.floating)):
            return float(f"{value:.8g}") if math.isfinite(value) else None
        return value.item() if isinstance(value, np.generic) else value

    return json.dumps(plain(value), allow_nan=False).replace("<", "\\u003c")
