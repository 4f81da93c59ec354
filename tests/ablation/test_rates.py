import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import config, optim
from jaxlm.ablation import rates
from jaxlm.ablation.outcomes import Curve, Outcome
from jaxlm.ablation.points import log_spaced
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
    best = np.array([0.003, 0.1, 0.02])
    losses = np.stack([parabola(one) for one in best], axis=1)
    found = rates.conclude("peak", VALUES, outcomes(losses))
    assert found.best == pytest.approx(np.exp(np.log(best).mean()), rel=1e-3)
    half = 4.302653 * np.log(best).std(ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom
    assert np.log(found.interval) == pytest.approx([np.log(found.best) - half, np.log(found.best) + half], rel=1e-2)
    assert found.edge == math.inf and not found.warnings


@given(st.lists(st.floats(2e-4, 0.5), min_size=2, max_size=5))
def test_no_interval_is_finer_than_the_values_that_were_tried(best):
    found = rates.conclude("peak", VALUES, outcomes(np.stack([parabola(one) for one in best], axis=1)))
    low, high = found.interval
    if math.isfinite(low):
        half = math.log(VALUES[1] / VALUES[0]) / 2
        assert math.log(found.best / low) >= half * 0.99 and math.log(high / found.best) >= half * 0.99


def test_the_lowest_loss_lies_in_the_interval_and_is_told():
    """Three seeds that hardly differ once gave [0.0305, 0.0822], without the best value of all that were tried."""
    losses = np.array([[3.757], [3.098], [5.79]]) + np.array([[0.0, 0.01, -0.02], [0.0, 0.02, 0.01], [0.0, -0.3, 0.3]])
    found = rates.conclude("peak", (0.01, 0.1, 1.0), outcomes(losses))
    assert found.best == pytest.approx(0.05, rel=0.1)
    assert found.interval[0] < 0.1 < found.interval[1]
    assert rates.lowest(found) == (0.1, pytest.approx(3.108))
    said = rates.describe(found, 100)
    assert "lowest loss: 3.1080 at 0.1" in said and "95%" not in said


def test_a_value_at_which_a_seed_diverged_is_not_the_lowest():
    losses = np.stack([parabola(0.01), parabola(0.01), np.full(9, math.nan)], axis=1)
    losses[4, 0] = math.nan  # 0.01; the third seed finished nowhere
    found = rates.conclude("peak", VALUES, outcomes(losses))
    assert rates.lowest(found)[0] in (VALUES[3], VALUES[5])


@pytest.mark.parametrize("seeds", [2, 8])
def test_seeds_that_are_all_best_at_one_value_tell_no_interval(seeds):
    """Eight alike would pass a sign test against a logarithm of 0, a learning rate of 1."""
    found = rates.conclude("peak", VALUES, outcomes(np.stack([parabola(1e-6)] * seeds, axis=1)))
    assert found.best == pytest.approx(VALUES[0]) and all(map(math.isnan, found.interval))
    assert found.warnings[1:] == ["all seeds alike: there is no interval; try more values by --peaks"]
    assert f"peak=0.0001, over {seeds} seeds" in rates.describe(found, 100)


@pytest.mark.parametrize(
    ("lost", "said", "warned"),
    [
        (0, "over 3 seeds", []),
        (1, "over 2 of 3 seeds", []),
        (2, "over 1 of 3 seeds", ["one seed of 3 finished anywhere: there is no interval; give several"]),
    ],
)
def test_seeds_that_diverged_everywhere_are_not_counted(lost, said, warned):
    losses = np.stack([parabola(one) for one in (0.01, 0.02, 0.015)], axis=1)
    losses[:, :lost] = math.nan
    found = rates.conclude("peak", VALUES, outcomes(losses))
    assert found.seeds == 3 - lost and found.warnings == warned
    assert said in rates.describe(found, 100)


def test_one_seed_is_told_so():
    found = rates.conclude("peak", VALUES, outcomes(parabola(0.01)[:, None]))
    assert found.warnings == ["one seed: there is no interval; give several"]
    assert rates.describe(found, 100).splitlines()[-2].endswith("over 1 seed")


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
    c.optimizer = {"chain": ("adamw",), "adamw": {"learning_rate": {"peak": 1e-3, "schedule": "cosine", "warmup": 0.1}}}
    assert rates.peak_field(c) == "optimizer.adamw.learning_rate.peak"  # which keeps the schedule
    c.optimizer = optim.drop(config.default().optimizer.to_dict(), "scale_by_learning_rate")
    with pytest.raises(ConfigError, match="--field"):
        rates.peak_field(c)


@pytest.mark.parametrize("losses", [[2, 3, 4, 5, 6], [5, 3, 2, 2.5, math.nan], [2] * 5, [math.nan, 3, 2, 2.5, 9]])
def test_the_picture_has_room_for_most_losses(losses):
    found = rates.conclude("peak", VALUES[:5], outcomes(np.array(losses)[:, None]))
    low, high = rates.limits(found.losses)
    finite = found.losses[np.isfinite(found.losses)]
    assert low < finite.min() and np.mean(finite < high) > 0.5
    assert low < np.median(finite) < high


def test_the_picture(tmp_path):
    losses = np.stack([parabola(0.01), parabola(0.02)], axis=1)
    losses[8] = math.nan
    path = rates.draw(rates.conclude("peak", VALUES, outcomes(losses)), "eval/loss", tmp_path / "lr.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("losses", "said"),
    [([2.0, math.nan, math.nan], "diverges from 0.01 on"), ([2.0, math.nan, 3.0], "diverges at 0.01")],
)
def test_where_it_diverges_in_words(losses, said):
    found = rates.Found("peak", (1e-3, 1e-2, 1e-1), np.array(losses)[:, None], 1e-3, 1, (math.nan, math.nan), 1e-2, [])
    assert rates.describe(found, 10).splitlines()[-1] == said


def test_the_directory_of_a_run_is_no_place_for_trials(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a run's directory, .* another --workdir"):
        rates.range_test(tiny(), tmp_path, seeds=(0,), steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
