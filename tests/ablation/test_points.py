"""Points of axes."""

import collections
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.ablation import Range, halton, log_spaced, points, random
from jaxlm.errors import ConfigError
from tests.ablation.small import PEAK


def test_log_spaced_values_are_a_factor_apart():
    assert log_spaced(1e-4, 1e-2, 5) == (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2)
    assert log_spaced(0.1, 1.0, 1) == (0.1,)


def test_a_range_goes_from_its_low_to_its_high():
    assert [Range(1e-4, 1e-2).at(share) for share in (0, 0.5, 1)] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert [Range(0.0, 0.4, log=False).at(share) for share in (0, 0.5, 1)] == pytest.approx([0.0, 0.2, 0.4])


@pytest.mark.parametrize(
    "bad",
    [
        *(Range(0.0, 1.0), Range(-1.0, 1.0), Range(1.0, 1.0), Range(1.0, 0.1, log=False)),
        *(Range(1e-3, math.inf), Range(1e-300, 1e300), Range(-math.inf, 0.0, log=False), Range(1.0, math.nan)),
    ],
)
def test_a_range_of_no_values_is_refused(bad):
    with pytest.raises(ConfigError, match="expected low < high"):
        halton({PEAK: bad}, 3)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 16), st.sampled_from(["random", "halton"]))
def test_no_point_is_drawn_twice_and_more_than_there_are_is_refused(steps, seeds, count, search):
    axes = {"steps": range(steps), "x": ["a", "b", "c", "d"][:seeds]}
    if count > steps * seeds:
        with pytest.raises(
            ConfigError, match=f"{count} points of 'steps', 'x', which have {steps * seeds} combinations"
        ):
            points.sampled(axes, count, search)
    else:
        found = points.sampled(axes, count, search)
        assert len(found) == count == len({tuple(point.items()) for point in found})


def test_values_that_are_given_twice_are_one():
    assert points.combinations({PEAK: (1e-2, 1e-2, 1e-3), "steps": [5, 5]}) == [
        {PEAK: 1e-2, "steps": 5},
        {PEAK: 1e-3, "steps": 5},
    ]
    with pytest.raises(ConfigError, match="3 points of 'steps', which have 2 combinations"):
        random({"steps": (5, 5, 6)}, 3)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 130))
def test_a_part_of_a_grid_has_values_of_every_axis(sizes, count):
    """Evenly spaced points of the product left a whole axis at one value: 4 of 4 peaks x 4 b2 all had one b2."""
    axes = {f"axis{k}": [k + 10 * i for i in range(size)] for k, size in enumerate(sizes)}
    found = points.spread(axes, count)
    assert len(found) == min(count, math.prod(sizes))
    assert [point for point in points.combinations(axes) if point in found] == found
    for path, values in axes.items():
        assert len({point[path] for point in found}) == min(count, len(values))


@pytest.mark.parametrize(("sizes", "count"), [((4, 4), 4), ((4, 4), 8), ((4, 4), 15), ((2, 3, 4), 12)])
def test_a_part_of_a_grid_takes_values_evenly(sizes, count):
    found = points.spread({f"axis{k}": range(size) for k, size in enumerate(sizes)}, count)
    for values in zip(*(point.values() for point in found)):
        uses = collections.Counter(values).values()
        assert max(uses) - min(uses) <= 2
