"""Main effects and two-way interactions of a study whose variants are a full grid, as paired contrasts over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.ablation import stats
from jaxlm.ablation.points import Overrides
from jaxlm.ablation.variants import labels, shown


class Effect(NamedTuple):
    """A contrast: per seed a number, made of all cells of the grid."""

    name: str  # "peak 0.003 against 0.01", or "peak 0.003 × b2 0.9"
    seeds: int  # on which all cells finished
    mean: float
    deviation: float
    interval: tuple[float, float]  # at the row's level of Holm's method over all rows
    p: float
    p_corrected: float


def effects(
    variants: Mapping[str, Overrides], baseline: str, values: Mapping[str, Mapping[int, float]], confidence: float
) -> list[Effect]:
    """Of each field and value but the baseline's; none where the variants are no full grid of two fields or more.

    A main effect is the difference to the baseline's value of the field, the mean over all values of the others. An
    interaction is how much the effect of one field's value differs between another field's value and the baseline's,
    the mean over the rest: 0 where effects add up. Source: Montgomery, "Design and analysis of experiments".

    Args:
      values: variant -> seed -> metric; not finite where the run diverged.
    """
    fields = list(variants[baseline])
    levels = _levels(variants, fields)
    if not levels:
        return []
    cells = {tuple(repr(point[field]) for field in fields): name for name, point in variants.items()}
    seeds = [
        seed for seed in values[baseline] if all(stats.finite(values[name].get(seed, math.nan)) for name in variants)
    ]
    grid = np.empty((*(len(levels[field]) for field in fields), len(seeds)))
    for places in itertools.product(*(range(len(levels[field])) for field in fields)):
        name = cells[tuple(repr(levels[field][i]) for field, i in zip(fields, places))]
        grid[places] = [values[name][seed] for seed in seeds]
    first = [[repr(value) for value in levels[field]].index(repr(variants[baseline][field])) for field in fields]
    label, found = labels(fields), {}
    others = [[i for i in range(len(levels[field])) if i != base] for field, base in zip(fields, first)]
    for one, field in enumerate(fields):
        for i in others[one]:
            name = f"{label[field]} {shown(levels[field][i])} against {shown(levels[field][first[one]])}"
            found[name] = _mean(_step(grid, one, i, first[one]))
    for one, two in itertools.combinations(range(len(fields)), 2):
        for i, j in itertools.product(others[one], others[two]):
            ends = ((fields[one], i), (fields[two], j))
            name = " × ".join(f"{label[field]} {shown(levels[field][at])}" for field, at in ends)
            found[name] = _mean(_step(_step(grid, one, i, first[one]), two, j, first[two]))
    found = {name: _rounded(contrast, grid) for name, contrast in found.items()}
    p = [stats.t_test(contrast) for contrast in found.values()]
    corrected, alphas = stats.holm(p), stats.holm_levels(p, 1 - confidence)
    return [
        Effect(
            name,
            len(seeds),
            float(contrast.mean()) if len(seeds) else math.nan,
            float(contrast.std(ddof=1)) if len(seeds) > 1 else math.nan,
            stats.t_interval(contrast, 1 - alpha),
            *both,
        )
        for (name, contrast), alpha, both in zip(found.items(), alphas, zip(p, corrected))
    ]


def _levels(variants: Mapping[str, Overrides], fields: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each field, in the order of the variants; empty where these are no full grid."""
    if len(fields) < 2 or any(set(point) != set(fields) for point in variants.values()):
        return {}
    found = {
        field: list({repr(point[field]): point[field] for point in variants.values()}.values()) for field in fields
    }
    cells = {tuple(repr(point[field]) for field in fields) for point in variants.values()}
    full = len(cells) == len(variants) == math.prod(map(len, found.values()))
    return found if full and all(len(values) > 1 for values in found.values()) else {}


def _step(grid: np.ndarray, axis: int, to: int, base: int) -> np.ndarray:
    """The difference between two values of a field, with the field's axis kept at length 1."""
    return np.take(grid, [to], axis) - np.take(grid, [base], axis)


def _mean(grid: np.ndarray) -> np.ndarray:
    """Over all cells, for each seed."""
    return np.asarray(grid.mean(axis=tuple(range(grid.ndim - 1))))


def _rounded(contrasts: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """With 0 for what rounding alone can leave: its spread would say that the seeds agree."""
    return np.where(np.abs(contrasts) > 1e-14 * np.abs(grid).max(initial=0.0), contrasts, 0.0)
