"""Tokens to the baseline's result."""

import math

import numpy as np
import pytest

from jaxlm.ablation import speedup, tables
from jaxlm.ablation.outcomes import Curve
from tests.ablation.test_report import study


def curve(*values):
    tokens = np.arange(1, len(values) + 1) * 100
    return Curve(tokens, tokens, *[np.zeros(len(values))] * 2, np.array(values, float), np.zeros(len(values)))


@pytest.mark.parametrize(
    ("values", "value", "tokens"),
    [
        ((5, 4, 3, 2), 2.5, 350),
        ((5, 4, 3, 2), 3, 300),
        ((5, 4, 3, 2), 6, 100),  # before its first measurement, or there
        ((5, 4, 3, 2), 1, math.inf),
        ((5, 2, 3, 1), 2.5, 100 + 100 * 2.5 / 3),  # first
        ((5, math.nan, 3), 4, 200),
        ((), 4, math.inf),
    ],
)
def test_a_value_is_reached_on_the_line_between_measurements(values, value, tokens):
    assert speedup.reached(curve(*values), value, True) == pytest.approx(tokens)
    assert speedup.reached(curve(*(-one for one in values)), -value, False) == pytest.approx(tokens)


def test_the_share_is_the_median_over_paired_seeds():
    made = study({"baseline": 0.0, "fast": 0.0, "slow": 0.0}, seeds=(0, 1, 2), peaks=())
    base = curve(5, 4, 3, 2)
    arms = {
        "baseline": [base, base, base],
        "fast": [curve(3, 2, 1, 1), curve(5, 4, 2, 1), curve(5, 5, 5, 5)],
        "slow": [curve(5, 4, 3, 2), curve(5, 5, 5, 5), curve(5, 5, 5, 5)],
    }
    outcomes = [
        one._replace(curve=arms[one.variant][one.seed], value=float(arms[one.variant][one.seed].values[-1]))
        for one in made.outcomes
    ]
    found = made._replace(outcomes=outcomes)
    assert speedup.tokens_to_baseline(found, "fast") == 0.75  # of 0.5, 0.75 and never
    assert speedup.tokens_to_baseline(found, "slow") == math.inf
    assert speedup.tokens_to_baseline(found, "baseline") == 1.0
    table = tables.tables(found)["ranking"]
    at = table.headers.index("Tokens to baseline")
    assert {row[0].text: row[at].text for row in table.rows} == {
        "baseline": "100%",
        "fast": "75%",
        "slow": "not reached",
    }
    lost = [one._replace(value=math.nan, status="diverged") if one.variant == "fast" else one for one in outcomes]
    assert speedup.tokens_to_baseline(made._replace(outcomes=lost), "fast") == math.inf
