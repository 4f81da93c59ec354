"""Paired statistics of an ablation: is a variant's difference from the baseline more than the seeds' doing?

All arms run on the same seeds, so the unit is the difference on one seed, variant minus baseline: what the seed does
to both arms cancels. Verdicts come from two tests of each variant: the paired t-test ("Student", 1908) where both arms
finished, and the exact sign test of the seeds on which one alone did (McNemar, 1947); Holm's method corrects them all
together. Bootstrap, sign test of the differences and power are beside them for judging. A p-value or bound that doesn't
exist is nan. Differences are taken as roughly normal and the seeds as independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from jaxlm.ablation.power import quantile, seeds_needed, smallest_effect
from jaxlm.errors import ConfigError, nearest

RESAMPLES = 9_999
CONFIDENCE, POWER = 0.95, 0.8  # of a study
LARGEST = 1e300  # a larger value counts as diverged: differences and sums of such values overflow
NOWHERE = (math.nan, math.nan)

Verdict = Literal["better", "worse", "no difference shown", "nothing can be concluded", "changes nothing"]


class Noise(NamedTuple):
    """What the seed alone does to one arm."""

    seeds: int  # with a finite value
    mean: float
    deviation: float  # standard deviation over the seeds, ddof 1
    # Two arms of this same config, each with as many seeds but different ones, have means that differ by less in 95
    # of 100 studies: t(0.975; n - 1) · deviation · √(2/n). n - 1 degrees of freedom, as one arm gave the deviation.
    floor: float


class Comparison(NamedTuple):
    """One variant against the baseline. A difference is the variant's value minus the baseline's, on one seed."""

    variant: str
    seeds: tuple[int, ...]  # on which both are finite: n of them, the pairs
    lost: tuple[int, ...]  # on which the variant diverged (nan, inf or beyond LARGEST)
    baseline_lost: tuple[int, ...]
    mean: float  # of the differences; nan without pairs
    deviation: float  # of the differences, ddof 1; nan below two pairs
    interval: tuple[float, float]  # `t_interval` at the variant's level of Holm's method: excludes 0 where that rejects
    bootstrap: tuple[float, float]  # `bootstrap_interval` at the plain confidence, not corrected
    p: float  # `t_test`
    p_corrected: float  # `holm`, over all tests of the study
    p_sign: float  # `sign_test`, not corrected
    p_lost: float  # `lost_test` of the seeds that one arm alone lost, corrected as p is
    correlation: float  # of the two arms over the seeds: what pairing gains
    smallest: float  # true difference that n seeds show with the wished power, at level alpha / tests (Bonferroni)
    needed: int | None  # seeds for that power if the true difference were `mean`; for planning, it is no evidence
    verdict: Verdict


def compare(
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    *,
    confidence: float = CONFIDENCE,
    power: float = POWER,
    lower_is_better: bool = True,
) -> list[Comparison]:
    """Each variant against the baseline, in the order of `values` {variant: {seed: metric}}.

    A seed that one arm lacks is not paired; a value that isn't finite is a run that diverged, so leave out runs that
    are not over. The verdict, by the first rule that holds:

    - "changes nothing" where all pairs are equal to the bit, one at least, and both arms diverged on the same seeds;
    - "better" or "worse" by which arm lost more of the seeds that one alone lost, where the corrected `lost_test`
      rejects, and the interval doesn't say the opposite;
    - "better" or "worse" by the sign, where the corrected interval leaves out 0; but "nothing can be concluded" where
      the arm that looks better diverged on a seed on which the other didn't: the pairs that are left flatter it;
    - "nothing can be concluded" where there is no interval: fewer than two pairs, or see `t_interval`;
    - "no difference shown".

    Over all variants together, at most 1 - confidence of studies call "better" or "worse" where nothing differs. The
    intervals are each test's own, turned around: they don't all cover together as Bonferroni's would.
    Raises ConfigError for an unknown baseline, and a confidence or power outside (0, 1).
    """
    if baseline not in values:
        raise ConfigError(f"no baseline {baseline!r} among the variants; {nearest(baseline, values)}")
    for name, share in (("confidence", confidence), ("power", power)):
        if not 0 < share < 1:
            raise ConfigError(f"{name} is {share}; it must lie between 0 and 1, such as 0.95")
    alpha = 1 - confidence
    of_baseline, baseline_lost = _finished(values[baseline])
    variants = [variant for variant in values if variant != baseline]
    finished = [_finished(values[variant]) for variant in variants]
    seeds = [tuple(seed for seed in arm if seed in of_baseline) for arm, _ in finished]
    pairs = [
        (np.array([arm[seed] for seed in common]), np.array([of_baseline[seed] for seed in common]))
        for (arm, _), common in zip(finished, seeds)
    ]
    differences = [_differences(*pair) for pair in pairs]
    alone = [  # the seeds that the variant lost and the baseline finished, and the other way round
        (set(lost) & of_baseline.keys(), set(baseline_lost) & of_variant.keys()) for of_variant, lost in finished
    ]
    p = [t_test(difference) for difference in differences]
    p_lost = [lost_test(len(ours), len(theirs), alpha) for ours, theirs in alone]
    corrected, levels = holm([*p, *p_lost]), holm_levels([*p, *p_lost], alpha)
    bonferroni = alpha / max(1, len(_order([*p, *p_lost])))

    found = []
    for i, (variant, (_, lost)) in enumerate(zip(variants, finished)):
        d, (mean, deviation) = differences[i], _moments(differences[i])
        noise_known = deviation or math.nan  # a deviation of 0 says nothing about other seeds
        interval = t_interval(d, 1 - levels[i])
        ours, theirs = alone[i]
        by_loss: Verdict | None = None
        by_value: Verdict | None = None
        if p_lost[i] < levels[len(p) + i]:
            by_loss = "worse" if len(ours) > len(theirs) else "better"
        if interval[0] > 0 or interval[1] < 0:
            by_value = "better" if (mean < 0) == lower_is_better else "worse"
        flattered = ours if by_value == "better" else theirs
        verdict: Verdict
        if len(d) and np.array_equal(*pairs[i]) and not (ours or theirs):
            verdict = "changes nothing"
        elif by_loss and by_value in (by_loss, None):
            verdict = by_loss
        elif by_value and not flattered:
            verdict = by_value
        elif by_value or math.isnan(interval[0]):
            verdict = "nothing can be concluded"
        else:
            verdict = "no difference shown"
        found.append(
            Comparison(
                variant=variant,
                seeds=seeds[i],
                lost=lost,
                baseline_lost=baseline_lost,
                mean=mean,
                deviation=deviation,
                interval=interval,
                bootstrap=bootstrap_interval(d, confidence),
                p=p[i],
                p_corrected=corrected[i],
                p_sign=sign_test(d),
                p_lost=corrected[len(p) + i],
                correlation=correlation(*pairs[i]),
                smallest=smallest_effect(noise_known, len(d), bonferroni, power),
                needed=seeds_needed(mean, noise_known, bonferroni, power),
                verdict=verdict,
            )
        )
    return found


def noise(values: Mapping[int, float]) -> Noise | None:
    """What the seed does to one arm, {seed: metric}; None below two finite values."""
    finished, _ = _finished(values)
    n = len(finished)
    if n < 2:
        return None
    mean, deviation = _moments(np.array(list(finished.values())))
    return Noise(n, mean, deviation, quantile(0.05, n - 1) * deviation * math.sqrt(2 / n))


def t_interval(differences: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The t interval of the mean: mean ± t((1 + confidence) / 2; n - 1) · deviation / √n. (nan, nan) below two.

    Where all differences are equal they don't tell the noise, and t = ∞ would make a discovery of two accuracies that
    both rose by one question. The exact sign test decides instead: (mean, mean) where it rejects, as it can from six
    seeds on at 95%, or where the mean is 0; otherwise (nan, nan).
    """
    d, alpha = np.asarray(differences, float), 1 - confidence
    mean, deviation = _moments(d)
    if math.isnan(deviation):
        return NOWHERE
    if deviation == 0:
        return (mean, mean) if mean == 0 or sign_test(d) < alpha else NOWHERE
    half = quantile(alpha, len(d) - 1) * deviation / math.sqrt(len(d))
    return mean - half, mean + half


def t_test(differences: ArrayLike) -> float:
    """Two-sided p of the paired t-test, t = mean / (deviation / √n) with n - 1 degrees of freedom; nan below two.

    Where all differences are equal: that of `sign_test`, for the reason given at `t_interval`.
    """
    d = np.asarray(differences, float)
    mean, deviation = _moments(d)
    if deviation == 0:
        return sign_test(d)
    if math.isnan(deviation):
        return math.nan
    return 2 * float(special.stdtr(len(d) - 1, -abs(mean) / deviation * math.sqrt(len(d))))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number m: the i-th smallest, from 0, becomes max over j <= i of min(1, (m - j) p_j).

    Bounds the chance of any false rejection, whatever the dependence. nan stays nan and doesn't count. Source: Holm,
    "A simple sequentially rejective multiple test procedure", 1979.
    """
    corrected, order = [math.nan] * len(p), _order(p)
    running = 0.0
    for rank, i in enumerate(order):
        running = corrected[i] = max(running, min(1.0, (len(order) - rank) * p[i]))
    return corrected


def holm_levels(p: Sequence[float], alpha: float) -> list[float]:
    """The level at which Holm's method tests each: alpha / (m - i) for the i-th smallest, up to the first that isn't
    rejected, whose level the rest share. p < level exactly where `holm` is below alpha; nan gets nan."""
    levels, order = [math.nan] * len(p), _order(p)
    rejected = 0
    for i in order:
        levels[i] = alpha / (len(order) - rejected)
        rejected += p[i] < levels[i]
    return levels


def sign_test(differences: ArrayLike) -> float:
    """Exact two-sided p of as many positive differences under Binomial(n, 1/2), zeros dropped: 1 where all are 0, nan
    where there are none. Assumes nothing of their sizes; below six seeds it can't get under 0.05. Source: Arbuthnott,
    1710."""
    d = np.asarray(differences, float)
    if not len(d):
        return math.nan
    positive, negative = int((d > 0).sum()), int((d < 0).sum())
    return float(stats.binomtest(positive, positive + negative).pvalue) if positive + negative else 1.0


def lost_test(ours: int, theirs: int, alpha: float) -> float:
    """`sign_test` of the seeds on which one of two arms alone diverged: so many, and so many of the other.

    nan where all of them on one side would not give a p below alpha: at 95% below six. Such a test never rejects, so
    it need not count among those that are corrected, whose power it would take. Sources: McNemar, "Note on the sampling
    error of the difference between correlated proportions", 1947; Tarone, "A modified Bonferroni method for discrete
    data", 1990.
    """
    if sign_test(np.ones(ours + theirs)) < alpha:
        return sign_test(np.repeat([1.0, -1.0], [ours, theirs]))
    return math.nan


def bootstrap_interval(differences: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """BCa bootstrap interval of the mean over 9,999 resamples of a fixed seed; (nan, nan) below three differences.

    Where all are equal BCa is undefined, and this is the percentile interval: (mean, mean). With few seeds it is too
    narrow, so no verdict rests on it. Source: Efron, "Better bootstrap confidence intervals", 1987.
    """
    d = np.asarray(differences, float)
    mean, deviation = _moments(d)
    if len(d) < 3:
        return NOWHERE
    if deviation == 0:
        return mean, mean
    # BCa follows shift and scale. Around 0 with deviation 1 SciPy's jackknife doesn't lose its digits, and rounding
    # makes resamples that are the sample in another order tie with it, as BCa's bias correction counts.
    low, high = stats.bootstrap(
        (_standard(d),),
        lambda x, axis: np.round(np.mean(x, axis=axis), 12),
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return mean + deviation * float(low), mean + deviation * float(high)


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of two arms over their seeds: at r, and equal deviations, pairing makes the variance of the
    difference 1 - r times as large. nan where an arm is constant but for rounding, and below three pairs, as any two
    lie on a line."""
    arms = [np.asarray(arm, float) for arm in (a, b)]
    if len(arms[0]) < 3 or any(_moments(arm)[1] <= _rounding(arm) for arm in arms):
        return math.nan
    return min(1.0, max(-1.0, float(_standard(arms[0]) @ _standard(arms[1])) / (len(arms[0]) - 1)))


def finite(value: float) -> bool:
    """Whether it counts as a run's value: not nan, and not beyond `LARGEST`."""
    return abs(value) <= LARGEST


def _finished(values: Mapping[int, float]) -> tuple[dict[int, float], tuple[int, ...]]:
    """The finite values by seed, and the seeds of the others."""
    known = {seed: float(value) for seed, value in values.items() if finite(value)}
    return known, tuple(seed for seed in values if seed not in known)


def _differences(variant: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """variant - baseline. Where they are equal but for the rounding of this subtraction, exactly equal: 0.51 - 0.50 and
    0.53 - 0.52 are one difference, and their deviation of 1e-17 is no measure of noise."""
    differences = variant - baseline
    rounding = _rounding(np.concatenate([variant, baseline]))
    if len(differences) and np.ptp(differences) <= rounding:
        middle = float(np.median(differences))
        return np.full_like(differences, middle if abs(middle) > rounding else 0.0)
    return differences


def _rounding(values: np.ndarray) -> float:
    """What the rounding of a few float64 operations can do to values of this size."""
    return 4 * float(np.finfo(float).eps) * float(np.abs(values).max()) if len(values) else 0.0


def _moments(x: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1), nan where undefined; in units of the largest, so squares stay in range."""
    if not len(x):
        return NOWHERE
    if len(x) == 1 or np.ptp(x) == 0:
        return float(x[0]), math.nan if len(x) == 1 else 0.0
    largest = float(np.abs(x).max())
    return largest * float((x / largest).mean()), largest * float((x / largest).std(ddof=1))


def _standard(x: np.ndarray) -> np.ndarray:
    """x at mean 0 and deviation 1, for x that is not constant."""
    mean, deviation = _moments(x)
    return (x - mean) / deviation


def _order(p: Sequence[float]) -> list[int]:
    """Places of the p-values, smallest first, without nan."""
    return sorted((i for i, one in enumerate(p) if not math.isnan(one)), key=lambda i: p[i])
