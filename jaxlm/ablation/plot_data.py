"""What plots show of a study's findings: means and bands, sensitivities, ranges, colours. Values only; `pictures` and
`page` draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.ablation import figures
from jaxlm.ablation.findings import Findings, compared, judged
from jaxlm.ablation.outcomes import Outcome
from jaxlm.ablation.stats import LARGEST, Comparison

GREY = "#666666"
_BASELINE = "#000000"
# Apart for colour-blind eyes too, and dark enough on white (Paul Tol's and Okabe and Ito's).
_COLORS = ("#4477aa", "#e06010", "#228833", "#aa3377", "#1fa2d8", "#8c7a00", "#882255", "#2f9e8a")
_DASHES: tuple[tuple[int, ...], ...] = ((), (8, 4), (2, 3), (8, 3, 2, 3))


class Look(NamedTuple):
    """Of a variant, in all plots."""

    color: str
    dash: tuple[int, ...]  # lengths of strokes and gaps; solid until the colours have run out


class Band(NamedTuple):
    """The metric of a variant over its runs: arrays of one length, over the steps that all its seeds measured."""

    tokens: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray  # over the seeds, ddof 1; nan for one seed
    training: np.ndarray  # mean over the seeds of `Curve.training`
    finished: bool  # of the seeds that finished; otherwise none did, and this is of the others


class Sensitivity(NamedTuple):
    """The metric of a variant over one tuning axis, at the best of the other axes."""

    values: np.ndarray  # of the axis, ascending, where a seed finished
    metric: np.ndarray  # mean over the seeds that finished
    whole: np.ndarray  # bool: every seed finished; a point where one diverged is not chosen, so it is not the best
    good: np.ndarray  # bool: whole, and within `floor` of the best
    edge: float  # the smallest value from which a seed diverged; nan where none did
    floor: float  # the baseline's noise floor, for means over as many seeds as are behind a point


def looks(findings: Findings) -> dict[str, Look]:
    """Black for the baseline; for the others one colour each, and dashes once these run out."""
    others = [variant for variant in findings.variants if variant != findings.baseline]
    shown = {
        variant: Look(_COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS) % len(_DASHES)])
        for i, variant in enumerate(others)
    }
    return {findings.baseline: Look(_BASELINE, ()), **shown}


def bands(findings: Findings) -> dict[str, Band]:
    """Of each variant that has measured anything, in the study's order."""
    found = {}
    for variant in findings.variants:
        outcomes = [one for one in compared(findings, variant) if len(one.curve.steps)]
        curves = [one.curve for one in outcomes if one.finished] or [one.curve for one in outcomes]
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
        whole = any(one.finished for one in outcomes)
        tokens, flops, seconds, training = map(mean, ("tokens", "flops", "seconds", "training"))
        found[variant] = Band(tokens, flops, seconds, values.mean(axis=0), deviation, training, whole)
    return found


def band_limits(found: Mapping[str, Band]) -> tuple[float, float]:
    """Of the metric: room for what finished, but not for the first third, whose fall would flatten what follows."""
    shown = [band for band in found.values() if band.finished] or list(found.values())
    later = [
        line[band.tokens >= band.tokens.max(initial=0) / 3] for band in shown for line in (band.mean, band.training)
    ]
    values = np.concatenate([*later, np.empty(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    room = 0.05 * float(np.ptp(values)) or 0.1
    return float(values.min()) - room, float(values.max()) + room


def difference_limits(findings: Findings) -> tuple[float, float]:
    """Of the forest plot: room for 0 and all intervals, but not for those far longer than most."""
    ends = [end for one in findings.comparisons for end in (one.mean, *one.interval) if math.isfinite(end)]
    most = 6 * float(np.median(np.abs(ends or [0.0]))) or max(map(abs, ends), default=1.0)
    near = [0.0, *(end for end in ends if abs(end) <= most)]
    low, high = min(near), max(near)
    room = 0.08 * (high - low) or 1.0
    return low - room, high + room


def beyond(findings: Findings, one: Comparison) -> dict[str, float]:
    """Where the forest plot marks that an interval, or its point, goes on outside: {"left": its edge, "right": ...}."""
    low, high = difference_limits(findings)
    left, right = min(one.mean, one.interval[0]) < low, max(one.mean, one.interval[1]) > high
    return ({"left": low} if left else {}) | ({"right": high} if right else {})


def remark(findings: Findings, one: Comparison) -> str:
    """Beside a point of the forest plot: what is `judged`, or the difference where the plot has no room for it."""
    low, high = difference_limits(findings)
    if low <= one.mean <= high or math.isnan(one.mean):
        return judged(findings, one)
    places = figures.decimals(one.deviation, one.interval, findings.places)
    return f"outside, at {figures.number(one.mean, places, '+')}"


def sensitivities(findings: Findings) -> dict[str, dict[str, Sensitivity]]:
    """Axis -> variant -> what it does, for the tuning axes of numbers on which a variant tried two values or more."""
    found: dict[str, dict[str, Sensitivity]] = {}
    noise, sign = findings.noise, 1 if findings.lower_is_better else -1
    for axis in dict.fromkeys(axis for one in findings.outcomes for axis in one.point):
        for variant in findings.variants:
            trials = [one for one in findings.outcomes if one.variant == variant and _is_number(one.point.get(axis))]
            trials = [one for one in trials if one.tuning] or trials
            points: dict[float, dict[str, list[Outcome]]] = {}  # value -> the other axes -> over the seeds
            for one in trials:
                rest = repr(sorted((name, value) for name, value in one.point.items() if name != axis))
                points.setdefault(float(one.point[axis]), {}).setdefault(rest, []).append(one)
            best = {value: min(_lost_and_mean(seeds, sign) for seeds in points[value].values()) for value in points}
            values = sorted(value for value, (_, mean) in best.items() if mean < math.inf)
            edge = min((float(one.point[axis]) for one in trials if one.diverged), default=math.nan)
            if len({*values, *([] if math.isnan(edge) else [edge])}) > 1:
                means = np.array([best[value][1] for value in values])
                whole = np.array([not best[value][0] for value in values], bool)
                seeds = len({one.seed for one in trials})
                floor = noise.floor * math.sqrt(noise.seeds / seeds) if noise else 0.0
                good = whole & (means <= means[whole].min(initial=math.inf) + floor)
                found.setdefault(axis, {})[variant] = Sensitivity(
                    np.array(values), sign * means, whole, good, edge, floor
                )
    return found


def _lost_and_mean(seeds: Sequence[Outcome], sign: int) -> tuple[bool, float]:
    """Of a point, whether a seed is missing and the mean over the others, lower for better: the least is the best."""
    values = [sign * one.value for one in seeds if one.finished]
    return len(values) < len(seeds), float(np.mean(values)) if values else math.inf


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
    """The values to label on the axis: all, where these are few and their labels, that are short, have room."""
    values = sorted(_all_values(found))
    places = np.log(values) if scale(found) == "log" else np.array(values)
    room = all(np.diff(places) > 0.06 * np.ptp(places))
    return values if len(values) <= 8 and room and all(len(f"{value:g}") <= 6 for value in values) else []


def time_unit(found: Mapping[str, Band]) -> tuple[str, float]:
    """What the time axis counts in, and the seconds of it; ("", 1) where no time was measured."""
    longest = max((float(x) for band in found.values() for x in band.seconds if math.isfinite(x)), default=math.nan)
    if math.isnan(longest):
        return "", 1
    return ("seconds", 1) if longest < 300 else ("minutes", 60) if longest < 3 * 3600 else ("hours", 3600)


def cut(name: str, length: int = 36) -> str:
    """A name that plots have room for: its two ends, of which one tells it from others."""
    end = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - end]}…{name[-end:]}"


def _all_values(found: Mapping[str, Sensitivity]) -> set[float]:
    return {float(value) for one in found.values() for value in (*one.values, one.edge) if not math.isnan(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
