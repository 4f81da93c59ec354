"""The statistics of an ablation: against SciPy, numbers by hand, properties, and simulated studies with a known truth.

A simulation with k studies may miss its promised share q by three standard errors, 3 √(q (1 - q) / k).
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from jaxlm.ablation import power, stats
from jaxlm.errors import ConfigError

NAN, INF = math.nan, math.inf
FLIPPED = {"better": "worse", "worse": "better"}


def arms(array, names=None):
    """{variant: {seed: value}} of values [variant, seed]; the first is "base"."""
    names = names or ["base", *(f"v{i}" for i in range(1, len(array)))]
    return {name: dict(enumerate(map(float, row))) for name, row in zip(names, array)}


def one(base, variant, **options):
    """The comparison of one variant, from two rows of values."""
    (found,) = stats.compare(arms([base, variant]), "base", **options)
    return found


def error(share, studies):
    return 3 * math.sqrt(share * (1 - share) / studies)


@pytest.fixture
def verdicts_only(monkeypatch):
    """Leaves out what no verdict rests on, so that thousands of studies take seconds."""
    monkeypatch.setattr(stats, "bootstrap_interval", lambda *_: (NAN, NAN))
    monkeypatch.setattr(stats, "smallest_effect", lambda *_: NAN)
    monkeypatch.setattr(stats, "seeds_needed", lambda *_: None)


def holm_by_definition(p):
    """Step down as statsmodels words it: sort, multiply by what is left, running maximum, at most 1, sort back."""
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)))
    corrected = np.empty(len(p))
    corrected[order] = steps
    return corrected


# Against SciPy and by hand


def test_one_variant_agrees_with_scipy():
    rng = np.random.default_rng(0)
    base, variant = rng.normal(3, 0.1, 6), rng.normal(2.9, 0.1, 6)
    found = one(base, variant)
    expected = scipy_stats.ttest_rel(variant, base)
    assert found.variant == "v1" and found.seeds == (0, 1, 2, 3, 4, 5) and found.lost == found.baseline_lost == ()
    assert found.mean == pytest.approx((variant - base).mean(), rel=1e-12)
    assert found.deviation == pytest.approx((variant - base).std(ddof=1), rel=1e-12)
    assert found.p == found.p_corrected == pytest.approx(expected.pvalue, rel=1e-10)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-10)
    assert found.correlation == pytest.approx(scipy_stats.pearsonr(variant, base).statistic, rel=1e-10)
    assert power.power_of(found.smallest, found.deviation, 6) == pytest.approx(0.8, abs=1e-9)


def test_the_bootstrap_agrees_with_scipy_and_repeats():
    """Sums of these are exact: SciPy sees the ties too, which rounding hides from it otherwise."""
    differences = np.array([1, 2, 5, -3, 12, 7]) / 4
    expected = scipy_stats.bootstrap((differences,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    assert stats.bootstrap_interval(differences) == pytest.approx(tuple(expected), rel=1e-9)
    assert stats.bootstrap_interval(differences) == stats.bootstrap_interval(differences)
    low, high = stats.bootstrap_interval(differences, 0.5)
    assert expected[0] < low < differences.mean() < high < expected[1]
    assert all(map(math.isnan, stats.bootstrap_interval(differences[:2])))


def test_numbers_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2√3 with 2 degrees of freedom, whose p is 1 - t / √(t² + 2)."""
    found = one([0, 0, 0], [1, 2, 3])
    assert (found.mean, found.deviation) == pytest.approx((2, 1))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert found.interval == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert found.p_sign == pytest.approx(0.25)  # 2 · (1/2)³
    assert math.isnan(found.correlation)  # a constant arm
    assert found.verdict == "no difference shown"


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, NAN, 0.01]) == pytest.approx([0.6, NAN, 0.02], nan_ok=True)
    assert stats.holm([]) == []
    # 0.005 < 0.05/4 and 0.01 < 0.05/3 are rejected, 0.03 > 0.05/2 is not, and 0.04 < 0.05 isn't asked any more
    assert stats.holm_levels([0.01, 0.04, 0.03, 0.005], 0.05) == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])


def test_sign_test_drops_zeros():
    assert stats.sign_test([1, 2, 3, 4, 5, 0.1]) == pytest.approx(2 / 64)
    assert stats.sign_test([-1, 2, 3, 4, 5, 0.1, 0, 0]) == pytest.approx(2 * 7 / 64)
    assert stats.sign_test([0, 0]) == 1
    assert math.isnan(stats.sign_test([]))


def test_the_family_sets_level_and_power():
    """Three variants: `smallest` and `needed` at alpha / 3, the intervals at Holm's levels."""
    rng = np.random.default_rng(3)
    values = rng.normal(0, 1, (4, 8)) + np.array([0, 9, 0.1, 0])[:, None]
    found = stats.compare(arms(values), "base")
    assert [c.p_corrected for c in found] == pytest.approx(holm_by_definition([c.p for c in found]))
    assert found[0].verdict == "worse"  # lower is better
    levels = [0.05 / 3, 0.05 / 2, 0.05 / 2]
    for c, row, level in zip(found, values[1:], levels):
        assert c.interval == pytest.approx(stats.t_interval(row - values[0], 1 - level), rel=1e-9)
        assert c.smallest == pytest.approx(power.smallest_effect(c.deviation, 8, 0.05 / 3, 0.8), rel=1e-9)
        assert c.needed == power.seeds_needed(c.mean, c.deviation, 0.05 / 3, 0.8)


# Properties

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=9)
metrics = st.integers(-1000, 1000).map(lambda i: i / 64)  # sums, differences and products with powers of 2 are exact
studies = st.tuples(st.integers(1, 4), st.integers(2, 6)).flatmap(
    lambda size: st.lists(
        st.lists(metrics, min_size=size[1], max_size=size[1]), min_size=size[0] + 1, max_size=size[0] + 1
    )
)


@given(p_values)
def test_holm_is_its_definition(p):
    corrected = stats.holm(p)
    assert corrected == pytest.approx(holm_by_definition(p))
    assert all(raw <= c <= 1 for raw, c in zip(p, corrected))
    assert all(corrected[i] <= corrected[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])


@given(p_values, st.sampled_from([0.01, 0.05, 0.3]))
def test_holms_levels_reject_what_holm_rejects(p, alpha):
    corrected = stats.holm(p)
    assume(all(abs(c - alpha) > 1e-12 for c in corrected))
    assert [raw < level for raw, level in zip(p, stats.holm_levels(p, alpha))] == [c < alpha for c in corrected]


@settings(max_examples=100)
@given(studies, st.sampled_from([0.5, 0.95]))
def test_an_interval_without_0_is_a_rejection(values, confidence):
    for c in stats.compare(arms(values), "base", confidence=confidence):
        assume(abs(c.p_corrected - (1 - confidence)) > 1e-9)
        without_0 = c.interval[0] > 0 or c.interval[1] < 0
        assert without_0 == (c.p_corrected < 1 - confidence)
        assert without_0 == (c.verdict in FLIPPED)


@settings(max_examples=50)
@given(studies)
def test_swapped_arms_mirror(values):
    names = ["base", *(f"v{i}" for i in range(1, len(values)))]
    for name in names[1:]:
        pair = {key: dict(enumerate(values[names.index(key)])) for key in ("base", name)}
        (there,), (back,) = stats.compare(pair, "base"), stats.compare(pair, name)
        assert back.verdict == FLIPPED.get(there.verdict, there.verdict)
        assert back.mean == -there.mean
        for a, b in zip((there.interval, there.bootstrap), (back.interval, back.bootstrap)):
            assert (-a[1], -a[0]) == pytest.approx(b, nan_ok=True, rel=1e-6, abs=1e-9)
        kept = ("deviation", "p", "p_sign", "correlation", "smallest")
        assert [getattr(there, k) for k in kept] == pytest.approx([getattr(back, k) for k in kept], nan_ok=True)
        assert there.needed == back.needed


@settings(max_examples=50)
@given(studies, st.sampled_from([2.0**-900, 2.0**-20, 4.0, 2.0**900]))
def test_the_unit_of_the_metric_does_not_matter(values, scale):
    scaled = stats.compare(arms(np.array(values) * scale), "base")
    for a, b in zip(stats.compare(arms(values), "base"), scaled):
        assert a.verdict == b.verdict and a.needed == b.needed
        for field in ("p", "p_corrected", "p_sign", "correlation"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), nan_ok=True)
        rescaled = [b.mean, b.deviation, *b.interval, *b.bootstrap, b.smallest]
        expected = [a.mean, a.deviation, *a.interval, *a.bootstrap, a.smallest]
        assert np.array(rescaled) / scale == pytest.approx(expected, nan_ok=True, rel=1e-6, abs=1e-9)


any_value = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 1.0 + 2**-52, 0.1, NAN, INF, 1e300, -1e300, 5e-324]))


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from("abcd"), st.dictionaries(st.integers(0, 6), any_value)))
def test_no_value_makes_it_warn_or_raise(values):
    """Warnings are errors here; NumPy and SciPy warn of overflow, of lost digits and of degenerate samples."""
    values["base"] = values.get("a", {})
    for c in stats.compare(values, "base"):
        both = [s for s in values[c.variant] if s in values["base"]]
        assert set(c.seeds) <= set(both) and not set(c.seeds) & (set(c.lost) | set(c.baseline_lost))
        assert c.verdict in ("better", "worse", "no difference shown", "nothing can be concluded", "changes nothing")
    stats.noise(values["base"])


# Simulated studies


@pytest.mark.parametrize("variants", [1, 3, 8])
def test_of_studies_without_a_difference_1_in_20_calls_one(variants, verdicts_only):
    """All arms share the seed's effect, at correlation 0.8, and all variants the baseline."""
    count, seeds = 1500, 5
    rng = np.random.default_rng(variants)
    shared, own = rng.normal(0, 2, (count, 1, seeds)), rng.normal(0, 1, (count, variants + 1, seeds))
    called = sum(any(c.verdict in FLIPPED for c in stats.compare(arms(v), "base")) for v in 3 + shared + own)
    assert called / count <= 0.05 + error(0.05, count)
    if variants == 1:  # not shyer than it says, either
        assert called / count >= 0.05 - error(0.05, count)


@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_the_interval_holds_the_truth(seeds):
    rng = np.random.default_rng(seeds)
    differences = rng.normal(0.3, 1.7, (3000, seeds))
    intervals = np.array([stats.t_interval(d) for d in differences])
    assert 0.93 <= ((intervals[:, 0] < 0.3) & (intervals[:, 1] > 0.3)).mean() <= 0.97


@pytest.mark.parametrize(("seeds", "variants"), [(3, 1), (5, 1), (5, 4), (20, 4)])
def test_the_smallest_effect_is_found_as_often_as_promised(seeds, variants):
    """At Bonferroni's level, with the true deviation; SciPy's test judges."""
    count, alpha = 4000, 0.05 / variants
    effect = power.smallest_effect(0.7, seeds, alpha, 0.8)
    differences = np.random.default_rng(seeds).normal(effect, 0.7, (count, seeds))
    found = (scipy_stats.ttest_1samp(differences, 0, axis=1).pvalue < alpha).mean()
    assert found == pytest.approx(0.8, abs=error(0.8, count))


def test_pairing_finds_what_unpaired_arms_hide(verdicts_only):
    """At correlation 0.9 the deviation of a difference is √0.2 of an arm's, not √2. The planted effect is found with
    power 0.8 by `compare` and seldom by SciPy's two-sample test of the same values."""
    count, seeds = 1500, 5
    effect = 1.6819969659555534 * math.sqrt(0.2)  # smallest_effect(√0.2, 5); the number as `verdicts_only` took it
    rng = np.random.default_rng(9)
    shared = rng.normal(0, math.sqrt(0.9), (count, 1, seeds))
    values = shared + rng.normal(0, math.sqrt(0.1), (count, 2, seeds)) - effect * np.array([0, 1])[:, None]
    (found,) = zip(*(stats.compare(arms(v), "base") for v in values))
    paired = np.mean([c.verdict == "better" for c in found])
    unpaired = (scipy_stats.ttest_ind(values[:, 0], values[:, 1], axis=1).pvalue < 0.05).mean()
    assert paired == pytest.approx(0.8, abs=error(0.8, count))
    assert unpaired < 0.3
    assert np.median([c.correlation for c in found]) == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_arms_on_other_seeds_stay_within_the_floor(seeds):
    count = 4000
    first, second = np.random.default_rng(seeds).normal(3, 0.2, (2, count, seeds))
    floors = np.array([stats.noise(dict(enumerate(row))).floor for row in first])
    within = np.abs(first.mean(1) - second.mean(1)) < floors
    assert within.mean() == pytest.approx(0.95, abs=error(0.95, count))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_coarse_metric_makes_no_discoveries(seeds, verdicts_only):
    """Accuracies on 10 questions: all differences are often equal, where t is infinite."""
    count = 1500
    values = np.random.default_rng(seeds).binomial(10, 0.7, (count, 2, seeds)) / 10
    called = sum(stats.compare(arms(v), "base")[0].verdict in FLIPPED for v in values)
    assert called / count <= 0.05 + error(0.05, count)


@pytest.mark.parametrize(("variants", "seeds"), [(1, 3), (3, 3), (1, 12), (3, 12)])
def test_of_studies_whose_arms_diverge_alike_1_in_20_calls_one(variants, seeds, verdicts_only):
    """Every arm loses half of its runs: by itself, or by the seed's doing."""
    count = 1000
    rng = np.random.default_rng(seeds)
    values = rng.normal(3, 1, (count, variants + 1, seeds))
    by_seed = rng.random((count, 1, seeds)) < 0.5
    lost = np.where(rng.random(values.shape) < 0.5, by_seed, rng.random(values.shape) < 0.5)
    values[lost] = NAN
    called = sum(any(c.verdict in FLIPPED for c in stats.compare(arms(v), "base")) for v in values)
    assert called / count <= 0.05 + error(0.05, count)


@pytest.mark.parametrize("fragile", [0, 1])
def test_an_arm_that_diverges_far_more_often_is_worse(fragile, verdicts_only):
    """Whichever of the two it is, on 9 of 12 seeds where the other loses 1 of 12; their values are alike."""
    rng = np.random.default_rng(1)
    values = rng.normal(3, 1, (500, 2, 12))
    values[rng.random(values.shape) < np.where(np.arange(2) == fragile, 0.75, 1 / 12)[:, None]] = NAN
    found = [stats.compare(arms(v), "base")[0].verdict for v in values]
    right = ("better", "worse")[fragile]
    assert found.count(right) / len(found) > 0.6 and found.count(FLIPPED[right]) / len(found) < 0.02


# Noise


def test_noise():
    found = stats.noise({0: 1.0, 3: 3.0, 4: NAN, 5: 2.0})
    assert found == pytest.approx((3, 2, 1, 4.302653 * math.sqrt(2 / 3)), rel=1e-6)
    assert stats.noise({0: 1.0, 1: INF}) is None
    assert stats.noise({}) is None
    assert stats.noise({0: 2.0, 1: 2.0}) == (2, 2.0, 0.0, 0.0)


# Verdicts, and where there is little to go by

CLEAR = [3.0, 3.1, 2.9, 3.05, 2.95]


@pytest.mark.parametrize(("shift", "lower", "verdict"), [(-1, True, "better"), (-1, False, "worse")])
def test_the_verdict_knows_which_way_is_better(shift, lower, verdict):
    variant = np.add(CLEAR, shift) + [0.01, -0.01, 0.02, 0, 0]
    assert one(CLEAR, variant, lower_is_better=lower).verdict == verdict
    assert one(variant, CLEAR, lower_is_better=lower).verdict == FLIPPED[verdict]


def test_the_order_of_the_variants_is_kept_and_the_baseline_left_out():
    values = arms(np.random.default_rng(0).normal(0, 1, (4, 3)), ["z", "base", "a", "m"])
    assert [c.variant for c in stats.compare(values, "base")] == ["z", "a", "m"]


def test_no_variants():
    assert stats.compare({"base": {0: 1.0}}, "base") == []
    assert stats.compare({"base": {}}, "base") == []


@pytest.mark.parametrize("variant", [{0: 2.0}, {}, {7: 1.0, 8: 1.0}, {0: 1.5, 1: NAN}])
def test_fewer_than_two_pairs_conclude_nothing(variant):
    (found,) = stats.compare({"base": {0: 1.0, 1: 1.2}, "v": variant}, "base")
    assert found.verdict == "nothing can be concluded" and found.needed is None
    assert len(found.seeds) <= 1 and math.isnan(found.mean) == (not found.seeds)
    for value in (*found.interval, *found.bootstrap, found.deviation, found.p, found.p_corrected, found.smallest):
        assert math.isnan(value)


def test_a_variant_without_a_p_does_not_count_in_the_family():
    rng = np.random.default_rng(1)
    values = arms(rng.normal(0, 1, (3, 5)))
    alone = stats.compare(values, "base")
    values["too short"] = {0: 1.0}
    assert stats.compare(values, "base")[:2] == alone


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_equal_to_the_bit_changes_nothing(seeds):
    found = one(CLEAR[:seeds], CLEAR[:seeds])
    assert found.verdict == "changes nothing" and found.mean == 0 and found.needed is None
    if seeds > 1:
        assert found.interval == (0, 0) and found.p == found.p_corrected == 1
    if seeds > 2:
        assert found.bootstrap == (0, 0) and found.correlation == pytest.approx(1)


def test_equal_but_for_a_run_that_diverged():
    assert one([1, 2, 3, NAN], [1, 2, 3, NAN]).verdict == "changes nothing"
    assert one([1, 2, 3, 4], [1, 2, 3, NAN]).verdict == "no difference shown"
    assert one([1, 2, 3, NAN], [1, 2, 3, 4]).verdict == "no difference shown"


def test_a_difference_of_rounding_is_none():
    found = one([0.3, 0.3, 0.3, 0.3], [0.1 + 0.2] * 4)
    assert found.mean == 0 and found.verdict == "no difference shown" and found.interval == (0, 0)


def test_equal_differences_need_the_sign_test():
    """In binary 0.53 - 0.52 and 0.51 - 0.50 differ in the last digits, which measure no noise."""
    base = np.array([0.50, 0.52, 0.61, 0.33, 0.47, 0.72])
    five, six = one(base[:5], base[:5] + 0.01), one(base, base + 0.01)
    assert five.deviation == six.deviation == 0 and math.isnan(six.smallest) and six.needed is None
    assert five.p == five.p_sign == 2 / 32 and six.p == six.p_sign == 2 / 64
    assert five.verdict == "nothing can be concluded" and all(map(math.isnan, five.interval))
    assert six.verdict == "worse" and six.interval == six.bootstrap == pytest.approx((0.01, 0.01))


def test_a_variant_that_diverged_is_never_better():
    better = np.subtract(CLEAR, [1, 1.01, 0.99, 1.02, 1])
    assert one(CLEAR, better).verdict == "better"
    for loss in (NAN, INF, -INF, 1e305):
        lossy = one(CLEAR, [*better[:4], loss])
        assert lossy.lost == (4,) and lossy.seeds == (0, 1, 2, 3) and lossy.interval[1] < 0
        assert lossy.verdict == "nothing can be concluded"
    assert one([*CLEAR[:4], NAN], [*better[:4], NAN]).verdict == "better"  # both did: only a pair less
    assert one([*CLEAR[:4], NAN], better).verdict == "better"
    assert one([*better[:4], NAN], CLEAR).verdict == "nothing can be concluded"  # the mirror
    assert one(better, [*CLEAR[:4], NAN]).verdict == "worse"


SIX = [*CLEAR, 3.01]


def test_a_variant_that_diverged_where_the_baseline_did_not_is_worse_from_six_seeds_on():
    found = one(SIX, [NAN] * 6)
    assert found.verdict == "worse" and found.lost == (0, 1, 2, 3, 4, 5) and math.isnan(found.p)
    assert found.p_lost == pytest.approx(2 / 64)
    assert one([NAN] * 6, SIX).verdict == "better"
    for base, variant in ((CLEAR, [NAN] * 5), ([*CLEAR, NAN], [NAN] * 6), ([NAN] * 6, [NAN] * 6)):
        assert one(base, variant).verdict == "nothing can be concluded" and math.isnan(one(base, variant).p_lost)
    assert one([NAN] * 5, CLEAR).baseline_lost == (0, 1, 2, 3, 4)


def test_tests_of_diverged_seeds_are_corrected_with_the_others():
    """Two variants that lost all six: 2/64 is tested at 0.05 / 2. A test that can't reject doesn't count."""
    values = arms([SIX, [NAN] * 6, [NAN] * 6])
    assert [(c.verdict, c.p_lost) for c in stats.compare(values, "base")] == [("nothing can be concluded", 4 / 64)] * 2
    worse = list(np.add(SIX, [1, 1.01, 0.99, 1.02, 1, 1]))
    found = stats.compare(arms([SIX, worse, [NAN] * 6]), "base")
    assert [c.verdict for c in found] == ["worse", "worse"] and found[0].p_corrected == pytest.approx(2 * found[0].p)
    assert one([*SIX, NAN], [*worse, 3.0]).p_corrected == one([*SIX, NAN], [*worse, 3.0]).p


def test_values_and_divergence_that_disagree_conclude_nothing():
    better = np.subtract(SIX, [1, 1.01, 0.99, 1.02, 1, 1])
    found = one([*SIX, *[3.0] * 8], [*better, *[NAN] * 8])
    assert found.p_lost < 0.05 and found.interval[1] < 0 and found.verdict == "nothing can be concluded"
    assert one([*SIX, *[NAN] * 8], [*better, *[3.0] * 8]).verdict == "better"


def test_a_correlation_of_two_pairs_says_nothing():
    assert math.isnan(stats.correlation([1, 2], [3, 5]))
    assert stats.correlation([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1)
    assert math.isnan(stats.correlation([1, 2, 3], [0.1 + 0.2, 0.3, 0.3]))


def test_mistakes_are_explained():
    with pytest.raises(ConfigError, match="did you mean 'base'"):
        stats.compare({"base": {}, "v": {}}, "bsae")
    with pytest.raises(ConfigError, match="confidence is 95"):
        stats.compare({"base": {}}, "base", confidence=95)
    with pytest.raises(ConfigError, match="power is 0"):
        stats.compare({"base": {}}, "base", power=0)
