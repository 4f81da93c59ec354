"""How numbers of any size are written."""

import math

import pytest

from jaxlm.ablation.figures import number, places


@pytest.mark.parametrize(
    ("sizes", "expected"), [((0.012, 0.034, 0.9), 3), ((12.0,), 0), ((0.0, math.nan), 4), ((1e-9,), 10)]
)
def test_the_decimals_show_two_digits_of_the_median(sizes, expected):
    assert places(sizes) == expected


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
