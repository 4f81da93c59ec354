"""Power of the paired t-test: against an integral, SciPy and the tables."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate
from scipy import stats as scipy_stats

from jaxlm.ablation import power

NAN = math.nan


def power_by_integral(difference, deviation, n, alpha):
    """Power as an average over the estimated deviation: P(|Z + shift| > critical · χ / √(n - 1))."""
    critical, shift = scipy_stats.t.isf(alpha / 2, n - 1), difference / deviation * math.sqrt(n)

    def integrand(v):
        bound = critical * v / math.sqrt(n - 1)
        tails = scipy_stats.norm.sf(bound - shift) + scipy_stats.norm.cdf(-bound - shift)
        return scipy_stats.chi.pdf(v, n - 1) * tails

    low, high = max(0, math.sqrt(n - 1) - 9), math.sqrt(n - 1) + 9
    edges = np.union1d(np.linspace(low, high, 19), low + np.geomspace(1e-9, high - low, 40))
    return sum(integrate.quad(integrand, *edge)[0] for edge in itertools.pairwise(edges))


@pytest.mark.parametrize("n", [2, 3, 5, 30, 10_000])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 8, 1e-5])
def test_power_agrees_with_the_integral(n, alpha):
    for shift in (0.01, 1, 3, 5, 10, 300):
        difference = shift / math.sqrt(n)
        expected = power_by_integral(difference, 1, n, alpha)
        assert power.power_of(2 * difference, 2, n, alpha) == pytest.approx(expected, abs=1e-9)
    if n in (5, 30) and alpha > 0.001:  # where SciPy's noncentral t is well
        critical, shift = scipy_stats.t.isf(alpha / 2, n - 1), 2.5
        expected = scipy_stats.nct.sf(critical, n - 1, shift) + scipy_stats.nct.cdf(-critical, n - 1, shift)
        assert power.power_of(-shift / math.sqrt(n), 1, n, alpha) == pytest.approx(expected, abs=1e-9)


def test_power_in_the_tables():
    """A difference of half a deviation at 5% and power 0.8 takes 34 pairs: G*Power's and Cohen's number."""
    assert power.seeds_needed(0.5, 1) == 34
    assert power.seeds_needed(-1, 2) == 34
    assert power.power_of(0.5, 1, 34) == pytest.approx(0.808, abs=5e-4)
    assert power.power_of(0, 1, 5, 0.01) == 0.01
    assert power.power_of(1, 0, 2) == 1
    assert math.isnan(power.power_of(1, 1, 1)) and math.isnan(power.power_of(NAN, 1, 5))
    assert power.smallest_effect(1, 5, alpha=0.5, power=0.4) == 0
    assert math.isnan(power.smallest_effect(1, 1)) and math.isnan(power.smallest_effect(NAN, 5))


@pytest.mark.parametrize("difference", [0.03, 0.1, 0.7, 3, 1e9])
@pytest.mark.parametrize("alpha", [0.05, 0.00625])
def test_the_seeds_needed_are_the_fewest(difference, alpha):
    n = power.seeds_needed(difference, 1, alpha)
    if n is None:
        assert power.power_of(difference, 1, power.MOST_SEEDS, alpha) < 0.8
    else:
        assert power.power_of(difference, 1, n, alpha) >= 0.8
        assert n == 2 or power.power_of(difference, 1, n - 1, alpha) < 0.8


def test_seeds_needed_may_be_unknown():
    assert power.seeds_needed(0.001, 1) is None
    assert power.seeds_needed(0, 1) is None
    assert power.seeds_needed(NAN, 1) is None
    assert power.seeds_needed(1, NAN) is None
