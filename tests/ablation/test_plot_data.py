"""What plots show, of studies made up by hand."""

import math

import numpy as np
import pytest

from jaxlm.ablation import plot_data, tables, tuning
from jaxlm.ablation.findings import ranked
from jaxlm.ablation.outcomes import Curve
from jaxlm.ablation.plot_data import Sensitivity
from jaxlm.ablation.stats import Noise
from tests.ablation.small import small
from tests.ablation.test_report import AXIS, EFFECTS, PEAKS, study


def test_bands_hold_the_seeds_that_finished_where_all_measured():
    findings = study(peaks=())
    short = findings.outcomes[0]
    cut = short._replace(curve=Curve(*(array[:15] for array in short.curve)))
    found = plot_data.bands(findings._replace(outcomes=[cut, *findings.outcomes[1:]]))
    assert len(found["baseline"].mean) == 15 and len(found["longer warmup"].mean) == 21
    values = [one.curve.values[3] for one in findings.outcomes[:5]]
    np.testing.assert_allclose(found["baseline"].mean[3], np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(found["baseline"].deviation[3], np.std(values, ddof=1), rtol=1e-9)
    fragile = found["peak without limit"]
    assert fragile.finished and np.isfinite(fragile.mean).all() and np.isnan(fragile.deviation).all()


def test_sensitivity_knows_the_good_region_and_the_edge():
    findings = study()
    findings = findings._replace(noise=findings.noise._replace(floor=0.004))
    found = plot_data.sensitivities(findings)
    assert list(found) == [AXIS] and list(found[AXIS]) == list(EFFECTS)
    of_baseline, fragile = found[AXIS]["baseline"], found[AXIS]["peak without limit"]
    assert of_baseline.edge == 0.03 and fragile.edge == 0.01
    np.testing.assert_array_equal(of_baseline.values, PEAKS[:4])
    np.testing.assert_array_equal(of_baseline.good, of_baseline.metric <= of_baseline.metric.min() + of_baseline.floor)
    assert of_baseline.floor == pytest.approx(findings.noise.floor * 5**0.5)  # of one tuning seed, not of five
    assert of_baseline.good.any() and not of_baseline.good.all()


def test_sensitivity_takes_the_best_of_the_other_axes():
    findings = study({"baseline": 0.0})
    tuned = [one for one in findings.outcomes if one.tuning][:4]
    values = [3.0, 2.0, 4.0, 5.0]
    points = [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 2, "b": 2}]
    outcomes = [one._replace(value=-value, point=point) for one, value, point in zip(tuned, values, points)]
    found = plot_data.sensitivities(findings._replace(outcomes=outcomes, lower_is_better=False))
    np.testing.assert_array_equal(found["a"]["baseline"].metric, [-2.0, -4.0])
    np.testing.assert_array_equal(found["b"]["baseline"].metric, [-3.0, -2.0])


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_a_point_where_a_seed_diverged_is_neither_best_nor_good(lower_is_better):
    """As in the choice: the seed that is left may be a lucky one."""
    findings = study({"baseline": 0.0})
    sign = 1 if lower_is_better else -1
    tuned = next(one for one in findings.outcomes if one.tuning)
    values = {1e-3: (3.0, 3.0), 3e-3: (2.9, 2.9), 1e-2: (1.0, math.nan), 3e-2: (1.5, math.nan)}
    outcomes = [
        tuned._replace(point={AXIS: peak}, value=sign * value, status="diverged" if math.isnan(value) else "done")
        for peak, pair in values.items()
        for value in pair
    ]
    made = findings._replace(outcomes=outcomes, lower_is_better=lower_is_better, noise=Noise(5, 3.5, 0.01, 0.02))
    found = plot_data.sensitivities(made)[AXIS]["baseline"]
    np.testing.assert_array_equal(found.metric, sign * np.array([3.0, 2.9, 1.0, 1.5]))
    assert found.good.tolist() == [False, True, False, False] and found.edge == 1e-2
    row = [cell.text for cell in tables.tables(made)["tuning"].rows[0]]
    assert row[2:6] == ["0.003", f"{2.9 * sign:.{made.places}f}", "0.003", "0.01"]
    chosen = tuning.scores(small(lower_is_better=lower_is_better), outcomes)
    assert min(chosen, key=lambda pair: pair[1])[0] == {AXIS: 3e-3}
    nowhere = made._replace(outcomes=outcomes[4:])
    row = [cell.text for cell in tables.tables(nowhere)["tuning"].rows[0]]
    assert row[2:6] == ["–", "–", "none finished on every seed", "0.01"]


def test_ranges_leave_out_what_would_flatten_the_rest():
    findings = study()
    low, high = plot_data.band_limits(plot_data.bands(findings))
    assert 3.3 < low < 3.5 and high < 5  # the curves begin at 11
    far = [findings.comparisons[0]._replace(mean=3.0, interval=(-9.0, 9.0)), *findings.comparisons[1:3]]
    low, high = plot_data.difference_limits(findings._replace(comparisons=far))
    ends = [end for one in far[1:] for end in one.interval]
    assert -0.3 < low < min(ends) and max(ends) < high < 0.3
    sides = [plot_data.beyond(findings._replace(comparisons=far), one) for one in far]
    assert sides == [{"left": low, "right": high}, {}, {}]


def test_the_forest_is_in_the_order_of_the_ranking():
    findings = study(peaks=())
    ranking = [row[0].text for row in tables.tables(findings)["ranking"].rows]
    assert [one.variant for one in ranked(findings)] == [name for name in ranking if name != "baseline"]
    assert ranking != list(findings.variants)


def test_labels_of_an_axis_are_its_values_where_these_have_room():
    def found(*values):
        return {"a": Sensitivity(np.array(values), *[np.zeros(len(values))] * 3, math.nan, 0.0)}

    assert plot_data.tried(found(1e-3, 3e-3, 1e-2)) == [1e-3, 3e-3, 1e-2]
    assert plot_data.tried(found(0.00123456, 0.00345678, 0.01)) == []  # sampled
    assert plot_data.tried(found(1e-3, 1.01e-3, 1e-2)) == []
    assert plot_data.tried(found(*np.logspace(-4, 0, 9))) == []
