"""How numbers of any size are written."""

import math

import pytest

from jaxlm.ablation.figures import decimals, number, two_digits


@pytest.mark.parametrize(
    ("sizes", "expected"), [((0.012, 0.034, 0.9), 3), ((12.0,), 0), ((0.0, math.nan), 4), ((1e-9,), 10)]
)
def test_the_decimals_show_two_digits_of_the_median(sizes, expected):
    assert two_digits(sizes) == expected


@pytest.mark.parametrize(
    ("value", "decimals", "sign", "expected"),
    [
        (3.14159, 3, "", "3.142"),
        (0.5, 4, "+", "+0.5000"),
        (1.2346e-9, 10, "", "1.235e-09"),
        (0.5, 10, "", "0.50000000"),
        (-6.02e23, 4, "+", "-6.02e+23"),
    ],
)
def test_a_number_has_its_decimals_or_an_exponent(value, decimals, sign, expected):
    assert number(value, decimals, sign) == expected


@pytest.mark.parametrize(
    ("deviation", "interval", "expected"),
    [
        (0.0013, (-0.1, 0.1), 4),
        (80.0, (-1.0, 1.0), 0),
        (0.0, (0.0, 0.0), 3),
        (math.nan, (math.nan, math.nan), 3),
        (0.02, (0.00042, 0.03), 4),  # which 0.000 would be of
        (0.02, (-0.03, -0.00042), 4),
        (0.02, (-0.00042, 0.03), 3),
    ],
)
def test_a_difference_has_two_digits_of_its_spread_and_is_seen_to_leave_out_0(deviation, interval, expected):
    assert decimals(deviation, interval, 3) == expected
