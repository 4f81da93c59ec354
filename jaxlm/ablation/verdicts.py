"""A study's answer in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.ablation.figures import decimals, number
from jaxlm.ablation.stats import Comparison
from jaxlm.ablation.study import Study


def verdict(
    study: Study, comparisons: Sequence[Comparison], values: Mapping[str, Mapping[int, float]], places: int
) -> str:
    """The answer in words: which variants are better and worse than the baseline, and of which nothing is shown.

    Args:
      values: variant -> seed -> metric, of the trials that are over.
      places: decimals of the metric.
    """
    if not comparisons:
        finite = [value for value in values[study.baseline].values() if math.isfinite(value)]
        if not finite:
            return f"{study.baseline} alone: it finished on no seed."
        return (
            f"{study.baseline} alone: {study.metric} {number(float(np.mean(finite)), places)} over {len(finite)} seeds."
        )

    def lost(one: Comparison) -> str:
        of_all = f"{len(one.lost) or 'none'} of {len(values[one.variant])} seeds"
        others = f", {study.baseline} on {len(one.baseline_lost) or 'none'}"
        return f"diverged on {of_all}{others}"

    def every_seed(one: Comparison) -> bool:
        return one.verdict == "nothing can be concluded" and len(one.lost) == len(values[one.variant]) > 0

    def by_value(one: Comparison) -> bool:
        return one.interval[0] > 0 or one.interval[1] < 0

    def figures(one: Comparison) -> str:
        if not by_value(one):
            return f"it {lost(one)}"
        own = decimals(one.deviation, one.interval, places)
        mean, low, high = (number(value, own, "+") for value in (one.mean, *one.interval))
        return f"{study.metric} {mean} [{low}, {high}]"

    def best_first(one: Comparison) -> float:
        return math.inf if math.isnan(one.mean) else one.mean if study.lower_is_better else -one.mean

    said = []
    for what in ("better", "worse"):
        found = sorted((c for c in comparisons if c.verdict == what), key=best_first)
        counts = sorted({len(one.seeds) for one in found if by_value(one)})
        over = f" over {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds" if counts else ""
        if len(found) == 1:
            said.append(f"{found[0].variant} is {what} than {study.baseline}: {figures(found[0])}{over}.")
        elif found:
            listed = "; ".join(f"{one.variant}, {figures(one)}" for one in found)
            said.append(f"{what[0].upper()}{what[1:]} than {study.baseline}{over}: {listed}.")
    if lost_all := [f"{one.variant} {lost(one)}" for one in comparisons if every_seed(one)]:
        said.append(f"{'; '.join(lost_all)}.")
    for what in ("no difference shown", "nothing can be concluded", "changes nothing"):
        found = [one for one in comparisons if one.verdict == what and not every_seed(one)]
        if names := [f"{one.variant} ({lost(one)})" if one.lost or one.baseline_lost else one.variant for one in found]:
            said.append(f"{what[0].upper()}{what[1:]}: {', '.join(names)}.")
    return " ".join(said)
