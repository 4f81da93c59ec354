import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import config, optim
from jaxlm.ablation import rates
from jaxlm.ablation.findings import Curve, Outcome
from jaxlm.ablation.study import log_spaced
from jaxlm.errors import ConfigError
from tests.tiny import tiny

VALUES = log_spaced(1e-4, 1.0, 9)
NONE = np.array([])


def outcomes(losses):
    """Of losses [values, seeds]."""
    curve = Curve(*[NONE] * 6)
    return [
        Outcome("", "range", seed, {}, False, "done", float(loss), curve, 0, 0.0, 0.0, 0.0)
        for row in losses
        for seed, loss in enumerate(row)
    ]


def parabola(best, values=VALUES):
    return np.log(np.array(values) / best) ** 2


@given(st.floats(2e-4, 0.5))
def test_the_optimum_of_a_parabola_is_found_between_the_values(best):
    assert rates.optimum(VALUES, parabola(best)) == pytest.approx(best, rel=1e-3)


@given(
    st.lists(st.one_of(st.floats(0, 20), st.just(math.nan)), min_size=9, max_size=9).filter(
        lambda x: not all(map(math.isnan, x))
    )
)
def test_the_optimum_is_beside_the_lowest_loss(losses):
    i = int(np.nanargmin(losses))
    found = rates.optimum(VALUES, np.array(losses))
    assert VALUES[max(i - 1, 0)] * 0.999 <= found <= VALUES[min(i + 1, 8)] * 1.001


def test_the_interval_is_that_of_the_seeds_optima():
    best = np.array([0.01, 0.02, 0.015])
    losses = np.stack([parabola(one) for one in best], axis=1)
    found = rates.conclude("peak", VALUES, outcomes(losses))
    assert found.best == pytest.approx(np.exp(np.log(best).mean()), rel=1e-3)
    half = 4.302653 * np.log(best).std(ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom
    assert np.log(found.interval) == pytest.approx([np.log(found.best) - half, np.log(found.best) + half], rel=1e-2)
    assert found.edge == math.inf and not found.warnings


def test_where_runs_diverge_there_is_an_edge():
    losses = np.stack([parabola(0.01)] * 2, axis=1)
    losses[7, 1] = losses[8] = math.nan
    found = rates.conclude("peak", VALUES, outcomes(losses))
    assert found.edge == VALUES[7]
    assert "1 of 2 diverged" in rates.describe(found, 100)


def test_doubtful_ends_are_told():
    assert "widen it" in rates.conclude("peak", VALUES, outcomes(parabola(1e-6)[:, None])).warnings[0]
    with pytest.raises(ConfigError, match="lower --low"):
        rates.conclude("peak", VALUES, outcomes(np.full((9, 2), math.nan)))


def test_the_field_of_the_peak():
    assert rates.peak_field(tiny()) == "optimizer.scale_by_learning_rate.peak"
    c = tiny()
    c.optimizer = {"chain": ("adamw",), "adamw": {"peak": 1e-3, "schedule": "cosine"}}
    assert rates.peak_field(c) == "optimizer.adamw.peak"
    c.optimizer = optim.drop(config.default().optimizer.to_dict(), "scale_by_learning_rate")
    with pytest.raises(ConfigError, match="--field"):
        rates.peak_field(c)


def test_the_picture(tmp_path):
    losses = np.stack([parabola(0.01), parabola(0.02)], axis=1)
    losses[8] = math.nan
    path = rates.draw(rates.conclude("peak", VALUES, outcomes(losses)), "eval/loss", tmp_path / "lr.png")
    assert path.read_bytes().startswith(b"\x89PNG")
