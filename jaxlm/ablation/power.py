"""What a paired t-test can see: its power, the smallest effect that it finds, the seeds that it needs."""

from __future__ import annotations

import bisect
import math

import numpy as np
from scipy import optimize, special

MOST_SEEDS = 10_000  # `seeds_needed` looks no further
NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)  # of `_exceeds`


def power_of(difference: float, deviation: float, seeds: int, alpha: float = 0.05) -> float:
    """The chance that the two-sided paired t-test at level alpha shows a true mean difference, given the standard
    deviation of the differences: P(|T| > t(1 - alpha/2; n - 1)), T noncentral t with noncentrality √n · difference /
    deviation. nan below two seeds or where an argument is. Source: Cohen, "Statistical power analysis", 1988."""
    if seeds < 2 or math.isnan(difference) or math.isnan(deviation):
        return math.nan
    if difference == 0:
        return alpha
    critical = quantile(alpha, seeds - 1)
    shift = abs(difference) / deviation * math.sqrt(seeds) if deviation else math.inf
    if shift > 10 * critical + 10:  # certain, to 16 digits
        return 1.0
    return _exceeds(critical, shift, seeds - 1) + _exceeds(critical, -shift, seeds - 1)


def smallest_effect(deviation: float, seeds: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference, in size, that `power_of` gives this power; nan below two seeds, 0 where power <= alpha."""
    if seeds < 2 or math.isnan(deviation):
        return math.nan
    if power <= alpha:
        return 0.0
    most = 10 * quantile(alpha, seeds - 1) + 11  # in units of deviation: there `power_of` is 1
    return deviation * float(optimize.brentq(lambda size: power_of(size, 1.0, seeds, alpha) - power, 0, most))


def seeds_needed(difference: float, deviation: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """The fewest seeds, 2 or more, that give this power; None where the difference is 0 or an argument is nan, and
    where MOST_SEEDS are too few."""
    if difference == 0 or math.isnan(difference) or math.isnan(deviation):
        return None
    seeds = range(2, MOST_SEEDS + 1)
    place = bisect.bisect_left(seeds, power, key=lambda n: power_of(difference, deviation, n, alpha))
    return seeds[place] if place < len(seeds) else None


def quantile(alpha: float, freedom: int) -> float:
    """What |t| exceeds with chance alpha."""
    return -float(special.stdtrit(freedom, alpha / 2))


def _exceeds(critical: float, shift: float, freedom: int) -> float:
    """P(T > critical > 0), T = (Z + shift) / (χ / √freedom) noncentral t: ∫ φ(z) P(χ < (z + shift) · √freedom /
    critical) dz, by Gauss and Legendre in panels about the step of P. SciPy 1.17's `nct` gives nan at two seeds or
    small levels, warns, and takes minutes there."""
    step, width = critical - shift, 6 * critical / math.sqrt(freedom)
    edges = np.clip([-9, step - width, step, step + width, 9], min(9, max(-9, -shift)), 9)
    half = np.diff(edges)[:, None] / 2
    z = edges[:-1, None] + half * (1 + NODES)
    below = special.gammainc(freedom / 2, freedom / 2 * (np.maximum(z + shift, 0) / critical) ** 2)
    return float((half * WEIGHTS * np.exp(-(z**2) / 2) * below).sum() / math.sqrt(2 * math.pi))
