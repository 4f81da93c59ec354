"""Values to try: axes, their points, and the variants made of them."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import qmc

from jaxlm.ablation import Range, grid, halton, leave_one_out, one_at_a_time, points, random, zipped
from jaxlm.errors import ConfigError
from tests.ablation.small import PEAK


def test_a_grid_has_every_combination():
    assert grid({PEAK: (1e-3, 1e-2), "steps": (5, 6)}) == {
        "peak=0.001 steps=5": {PEAK: 1e-3, "steps": 5},
        "peak=0.001 steps=6": {PEAK: 1e-3, "steps": 6},
        "peak=0.01 steps=5": {PEAK: 1e-2, "steps": 5},
        "peak=0.01 steps=6": {PEAK: 1e-2, "steps": 6},
    }


def test_zipped_axes_move_together():
    assert zipped({PEAK: (1e-3, 1e-2), "steps": (5, 6)}) == {
        "peak=0.001 steps=5": {PEAK: 1e-3, "steps": 5},
        "peak=0.01 steps=6": {PEAK: 1e-2, "steps": 6},
    }


def test_zipped_axes_of_different_lengths_are_refused():
    with pytest.raises(ConfigError, match=re.escape(f"different lengths: {{'{PEAK}': 2, 'steps': 1}}")):
        zipped({PEAK: (1e-3, 1e-2), "steps": (5,)})


@pytest.mark.parametrize("make", [grid, zipped, one_at_a_time])
def test_a_range_has_no_single_values(make):
    with pytest.raises(ConfigError, match=f"axis '{PEAK}' is a range"):
        make({PEAK: Range(1e-4, 1e-2)})


def test_one_at_a_time_sets_one_field_in_each():
    found = one_at_a_time({PEAK: (1e-3, 1e-2), "steps": (5,)})
    assert found == {"peak=0.001": {PEAK: 1e-3}, "peak=0.01": {PEAK: 1e-2}, "steps=5": {"steps": 5}}


def test_leave_one_out_has_the_whole_and_it_without_each_part():
    parts = {"decay": {"optimizer.add_decayed_weights.weight_decay": 0.0}, "dropout": {"model.dropout": 0.0}}
    found = leave_one_out(parts, full="all")
    assert found == {"all": {}, "without decay": parts["decay"], "without dropout": parts["dropout"]}


@pytest.mark.parametrize("make", [grid, zipped, one_at_a_time])
def test_fields_with_the_same_last_part_get_as_much_more_as_tells_them_apart(make):
    names = " ".join(make({"eval.every": (2,), "log.every": (3,), "steps": (4,)}))
    assert names == "eval.every=2 log.every=3 steps=4"
    names = " ".join(make({"optimizer.slow.peak": (1,), "optimizer.fast.peak": (2,), "optimizer.fast.b1": (3,)}))
    assert names == "slow.peak=1 fast.peak=2 b1=3"


@pytest.mark.parametrize("values", [(0.12341, 0.123412), (None, "None"), (1, "1")])
def test_values_that_look_alike_make_variants_of_their_own(values):
    assert list(grid({PEAK: values}).values()) == [{PEAK: value} for value in values]


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=5, unique=True), st.integers(1, 3))
def test_no_variant_of_a_grid_is_lost(values, count):
    assert len(grid({PEAK: values, "steps": range(count)})) == len(values) * count


@pytest.mark.parametrize("make", [random, halton])
def test_a_seed_always_makes_the_same_points(make):
    axes = {PEAK: Range(1e-4, 1e-1), "model.dropout": Range(0.0, 0.5, log=False), "steps": (5, 6, 7)}
    found = make(axes, 20, seed=3)
    assert found == make(axes, 20, seed=3) != make(axes, 20, seed=4)
    assert len(found) == 20
    for point in found.values():
        assert 1e-4 <= point[PEAK] <= 1e-1 and 0 <= point["model.dropout"] <= 0.5 and point["steps"] in (5, 6, 7)
    assert {point["steps"] for point in found.values()} == {5, 6, 7}


@pytest.mark.parametrize("make", [random, halton])
def test_points_are_spread_over_the_logarithm(make):
    logs = np.log10([point[PEAK] for point in make({PEAK: Range(1e-4, 1.0)}, 200).values()])
    assert np.mean(logs < -2) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_halton_points_fill_space_better_than_random_ones(seed):
    axes = {name: Range(0.0, 1.0, log=False) for name in ("x", "y")}
    uneven = {
        make: qmc.discrepancy([list(point.values()) for point in points.sampled(axes, 64, make, seed)])
        for make in ("halton", "random")
    }
    assert uneven["halton"] < uneven["random"] / 2


@pytest.mark.parametrize("make", [random, halton])
def test_a_range_of_too_few_values_is_refused(make):
    """Between these two there are so few numbers of float64 that the search for a tenth would have no end."""
    with pytest.raises(ConfigError, match=f"10 points of '{PEAK}', .* gave only [23]"):
        make({PEAK: Range(1.0, 1.0000000000000004)}, 10)


@pytest.mark.parametrize("make", [random, halton])
def test_fewer_points_are_the_first_of_more(make):
    axes = {PEAK: Range(1e-4, 1e-1), "steps": (5, 6)}
    assert list(make(axes, 4).values()) == list(make(axes, 9).values())[:4]


@pytest.mark.parametrize("make", [grid, zipped, one_at_a_time])
def test_text_is_no_sequence_of_values(make):
    with pytest.raises(ConfigError, match="axis 'model.dtype' is 'float32'; expected a sequence of values"):
        make({"model.dtype": "float32"})
