"""The choice of each arm's point, with trials that are not trained: their metric is a function of the point."""

import functools
import math
import statistics
import sys
import tempfile
from pathlib import Path

import pytest

from jaxlm import optim
from jaxlm.ablation import Range, study, tuning
from jaxlm.ablation.outcomes import Curve, Outcome
from jaxlm.errors import ConfigError
from tests.ablation.small import PEAK, small

DROPOUT = "model.dropout"
WIDE = Range(1e-4, 1.0)
NAN = math.nan


def at_best(best):
    """A loss that is lowest at a peak, a parabola in its logarithm."""
    return lambda one: math.log10(one.point[PEAK] / best) ** 2 + 0.001 * (one.seed - 100)


class Trainer:
    """In the place of the runner: gives each trial a value, and breaks off before a trial's number."""

    def __init__(self, value, breaks_at=None):
        self.value, self.trials, self.calls, self._breaks_at = value, [], 0, breaks_at

    def __call__(self, trials):
        self.calls += 1
        for one in trials:
            if len(self.trials) == self._breaks_at:
                raise InterruptedError("killed")
            assert one.tuning
            self.trials.append(one)
        empty = Curve(*[()] * 6)
        return [
            Outcome(one.address, one.variant, one.seed, one.point, True, "done", self.value(one), empty, 0, 0, 0, 0)
            for one in trials
        ]

    def points(self, variant="clip", seed=100):
        return [one.point for one in self.trials if (one.variant, one.seed) == (variant, seed)]


def tuned(tuning=None, seeds=(100, 101), **fields):
    tuning = tuning or {PEAK: (1e-3, 1e-2, 1e-1)}
    return small(tuning=tuning, tuning_seeds=seeds, **{"variants": {"clip": {}}, **fields})


def choose(made, train, workdir=None):
    with tempfile.TemporaryDirectory() as temporary:
        return tuning.choose(made, functools.partial(study.arm, made), train, workdir or Path(temporary))


def best(made, value):
    return choose(made, Trainer(value)).points["clip"]


# The best


def test_nothing_is_tried_where_nothing_is_tuned():
    assert choose(small(), None) == ({}, [], [])


def test_every_point_is_tried_with_every_tuning_seed():
    train = Trainer(at_best(1e-2))
    found = choose(tuned(), train)
    tried = [(one.point[PEAK], one.seed, one.config.seed) for one in train.trials]
    assert tried == [(peak, seed, seed) for peak in (1e-3, 1e-2, 1e-1) for seed in (100, 101)]
    assert all(one.config.optimizer.scale_by_learning_rate.peak == one.point[PEAK] for one in train.trials)
    assert found.points == {"clip": {PEAK: 1e-2}}
    assert [outcome.trial for outcome in found.outcomes] == [one.address for one in train.trials]
    assert (found.warnings, train.calls) == ([], 1)


def test_the_mean_over_the_seeds_decides():
    values = {(1e-3, 100): 0.1, (1e-3, 101): 0.9, (1e-2, 100): 0.4, (1e-2, 101): 0.4, (1e-1, 100): 9, (1e-1, 101): 0.0}
    assert best(tuned(), lambda one: values[one.point[PEAK], one.seed]) == {PEAK: 1e-2}


def test_higher_may_be_better():
    assert best(tuned(), lambda one: -at_best(1e-2)(one)) == {PEAK: 1e-3}
    assert best(tuned(lower_is_better=False), lambda one: -at_best(1e-2)(one)) == {PEAK: 1e-2}


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_a_point_at_which_a_seed_diverged_loses(lower_is_better):
    def value(one):
        good, bad = (0.0, 9.0) if lower_is_better else (9.0, 0.0)
        if one.point[PEAK] != 1e-2:
            return NAN if one.seed == 101 else good
        return bad

    assert best(tuned(lower_is_better=lower_is_better), value) == {PEAK: 1e-2}


def test_an_arm_that_always_diverged_is_warned_of_and_nothing_else():
    found = choose(tuned(), Trainer(lambda one: NAN))
    assert found.warnings == ["variant 'clip' diverged, or gave no eval/loss, at every point that was tried"]
    assert found.points["clip"][PEAK] in (1e-3, 1e-2, 1e-1)


def test_optimizers_may_be_tried():
    """As specs, which have no hash, and as functions that make them."""
    specs = [{"chain": ("sgd",), "sgd": {"learning_rate": rate}} for rate in (0.1, 0.2)]
    values = [*specs, lambda spec: optim.drop(spec, "clip_by_global_norm")]
    assert best(tuned({"optimizer": values}), lambda one: 0.0 if one.point["optimizer"] == specs[1] else 1.0) == {
        "optimizer": specs[1]
    }


# Axes


ENDS = [(1e-3, "smallest"), (1e-1, "largest")]


@pytest.mark.parametrize(("best", "end"), ENDS)
def test_a_best_point_at_an_end_of_what_was_tried_is_warned_of(best, end):
    said = f"the best {PEAK} of 'clip', {best:g}, is the {end} that was tried (0.001 to 0.1): try values beyond it"
    assert choose(tuned(), Trainer(at_best(best))).warnings == [said]
    part = tuned({PEAK: (1e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)}, tuning_trials=3)  # of which the ends are not tried
    assert [point[PEAK] for point in part.points("clip")] == [1e-3, 1e-2, 1.0]
    (line,) = choose(part, Trainer(at_best(1e-3 if end == "smallest" else 1.0))).warnings
    assert f"is the {end} that was tried (0.001 to 1)" in line


@pytest.mark.parametrize("search", ["random", "halton", "optuna"])
@pytest.mark.parametrize(("best", "end"), [(1e-9, "smallest"), (1e9, "largest")])
def test_an_end_of_what_was_drawn_is_warned_of(search, best, end):
    if search == "optuna":
        pytest.importorskip("optuna", reason="needs optuna")
    fields = {"search": search, "seeds": (100,)}
    (line,) = choose(tuned({PEAK: WIDE}, tuning_trials=3, **fields), Trainer(at_best(best))).warnings
    assert f"is the {end} that was tried" in line
    assert choose(tuned({PEAK: WIDE}, tuning_trials=2, **fields), Trainer(at_best(best))).warnings == []


@pytest.mark.parametrize("axis", [(False, True), ("gelu", "relu"), (1e-3,)])
def test_what_has_no_ends_is_not_warned_of(axis):
    path = {bool: "model.tie_embeddings", str: "model.activation"}.get(type(axis[0]), PEAK)
    assert choose(tuned({path: axis}), Trainer(lambda one: 1.0)).warnings == []


def test_each_arm_gets_the_best_of_its_own_axes():
    made = tuned(
        {PEAK: (1e-3, 1e-2, 1e-1), "b2": {DROPOUT: (0.0, 0.1, 0.2)}},
        variants={"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}, "slow": {"optimizer.scale_by_adam.b1": 0.5}},
    )

    def value(one):
        if one.variant == "b2":
            return abs(one.point[DROPOUT] - 0.1)
        return at_best({"clip": 1e-2, "slow": 1e-1}[one.variant])(one)

    train = Trainer(value)
    found = choose(made, train)
    assert found.points == {"clip": {PEAK: 1e-2}, "b2": {DROPOUT: 0.1}, "slow": {PEAK: 1e-1}}
    assert len(found.warnings) == 1 and "of 'slow'" in found.warnings[0]
    assert {one.config.model.dropout for one in train.trials if one.variant == "b2"} == {0.0, 0.1, 0.2}


def test_an_arm_without_axes_is_not_tuned():
    made = tuned({"b2": {PEAK: (1e-3, 1e-2, 1e-1)}}, variants={"clip": {}, "b2": {"model.dropout": 0.1}})
    train = Trainer(at_best(1e-2))
    assert choose(made, train).points == {"b2": {PEAK: 1e-2}}
    assert {one.variant for one in train.trials} == {"b2"}


# Searches


@pytest.mark.parametrize(
    ("asked", "places"),
    [(0, range(9)), (9, range(9)), (20, range(9)), (1, [4]), (2, [2, 6]), (3, [1, 4, 7])],
)
def test_a_part_of_a_grid_is_evenly_spaced(asked, places):
    values = tuple(1e-3 * (i + 1) for i in range(9))
    train = Trainer(at_best(5e-3))
    choose(tuned({PEAK: values}, tuning_trials=asked), train)
    assert train.points() == [{PEAK: values[i]} for i in places]


@pytest.mark.parametrize("search", ["random", "halton"])
def test_points_are_drawn_alike_for_all_arms(search):
    made = tuned(
        {PEAK: Range(1e-4, 1e-1), DROPOUT: (0.0, 0.1)},
        variants={"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}},
        search=search,
        tuning_trials=8,
    )
    train = Trainer(at_best(1e-2))
    found = choose(made, train)
    points = train.points()
    assert points == train.points(seed=101) == train.points("b2")
    assert len({point[PEAK] for point in points}) == 8 and {point[DROPOUT] for point in points} == {0.0, 0.1}
    nearest = min(points, key=lambda point: abs(math.log(point[PEAK] / 1e-2)))
    assert found.points["clip"][PEAK] == nearest[PEAK]


# Optuna


@pytest.fixture
def with_optuna():
    return pytest.importorskip("optuna", reason="needs optuna")


def asked_of_optuna(axis=WIDE, trials=12, **fields):
    return tuned({PEAK: axis}, seeds=(100,), search="optuna", tuning_trials=trials, **fields)


def test_optuna_learns_where_the_best_is(with_optuna):
    train = Trainer(at_best(3e-3))
    found = choose(asked_of_optuna(trials=24), train).points["clip"][PEAK]
    distances = [abs(math.log10(point[PEAK] / 3e-3)) for point in train.points()]
    assert abs(math.log10(found / 3e-3)) == min(distances) < 0.15
    assert statistics.median(distances[12:]) < statistics.median(distances[:4]) / 2
    assert (train.calls, len(distances)) == (6, 24)


def test_optuna_learns_that_higher_is_better(with_optuna):
    train = Trainer(lambda one: -at_best(3e-3)(one))
    found = choose(asked_of_optuna(trials=24, lower_is_better=False), train).points["clip"][PEAK]
    assert abs(math.log10(found / 3e-3)) < 0.3


def test_optuna_keeps_away_from_where_runs_diverge(with_optuna):
    train = Trainer(lambda one: NAN if one.point[PEAK] > 1e-2 else at_best(1e-2)(one))
    found = choose(asked_of_optuna(trials=24), train)
    diverged = [point[PEAK] > 1e-2 for point in train.points()]
    assert any(diverged[:4]) and sum(diverged[12:]) <= 4
    assert found.points["clip"][PEAK] <= 1e-2


@pytest.mark.parametrize("trials", [1, 4, 6])
def test_optuna_gives_as_many_points_as_asked_for(with_optuna, trials):
    train = Trainer(at_best(1e-2))
    choose(asked_of_optuna(trials=trials), train)
    assert len(train.trials) == trials


def test_optuna_chooses_among_values(with_optuna):
    train = Trainer(lambda one: at_best(1e-2)(one) + one.point[DROPOUT])
    made = tuned({PEAK: (1e-3, 1e-2), DROPOUT: (0.0, 0.1)}, search="optuna", tuning_trials=12)
    assert choose(made, train).points == {"clip": {PEAK: 1e-2, DROPOUT: 0.0}}
    assert all(one.point[PEAK] in (1e-3, 1e-2) and one.point[DROPOUT] in (0.0, 0.1) for one in train.trials)


def test_optuna_tries_no_point_twice(with_optuna):
    """It would propose the best of three again and again, and the report would count each as a try."""
    train = Trainer(at_best(1e-2))
    axes = {PEAK: (1e-3, 1e-2, 1e-2), "b2": {PEAK: WIDE}}
    made = tuned(axes, seeds=(100,), search="optuna", tuning_trials=6, variants=TWO)
    choose(made, train)
    assert sorted(point[PEAK] for point in train.points()) == [1e-3, 1e-2]
    assert len(train.points("b2")) == 6
    assert (made.tries("clip"), made.tries("b2")) == (2, 6)


TWO = {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}}


@pytest.mark.parametrize("breaks_at", [3, 13])
def test_a_study_that_was_killed_asks_optuna_for_the_same_points(with_optuna, breaks_at):
    made = asked_of_optuna(variants=TWO, trials=8)
    undisturbed = Trainer(at_best(3e-3))
    expected = choose(made, undisturbed)
    killed, again = Trainer(at_best(3e-3), breaks_at), Trainer(at_best(3e-3))
    with pytest.raises(InterruptedError):
        choose(made, killed)
    assert choose(made, again) == expected
    assert again.trials == undisturbed.trials
    assert killed.trials == undisturbed.trials[:breaks_at]


def test_a_study_that_was_killed_while_it_asked_optuna_asks_for_the_same_points(with_optuna, monkeypatch):
    made = asked_of_optuna(variants=TWO, trials=8)
    expected = choose(made, Trainer(at_best(3e-3)))
    suggest, count = with_optuna.trial.Trial.suggest_float, 0

    def suggest_float(self, *arguments, **options):
        nonlocal count
        count += 1
        if count == 11:  # in the second round
            raise InterruptedError("killed")
        return suggest(self, *arguments, **options)

    monkeypatch.setattr(with_optuna.trial.Trial, "suggest_float", suggest_float)
    with pytest.raises(InterruptedError):
        choose(made, Trainer(at_best(3e-3)))
    assert choose(made, Trainer(at_best(3e-3))) == expected


def test_other_results_lead_optuna_to_other_points(with_optuna):
    """Of rounds after the first: else it would be a random search."""
    low, high = Trainer(at_best(1e-3)), Trainer(at_best(1e-1))
    choose(asked_of_optuna(trials=20), low)
    choose(asked_of_optuna(trials=20), high)
    assert low.points()[:4] == high.points()[:4]
    below, above = (statistics.mean(math.log10(point[PEAK]) for point in one.points()[8:]) for one in (low, high))
    assert below < above - 0.5


@pytest.mark.parametrize("axis", [Range(1e-3, 1e-2), (1e-3, 1e-2, 1e-1)])
def test_a_study_whose_axes_were_edited_asks_optuna_afresh(with_optuna, axis):
    before, after, fresh = (Trainer(at_best(3e-3)) for _ in range(3))
    choose(asked_of_optuna((1e-3, 3e-3)), before)
    choose(asked_of_optuna(axis), after)
    choose(asked_of_optuna(axis), fresh)
    assert after.trials == fresh.trials


def test_a_missing_optuna_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    train = Trainer(at_best(3e-3))
    with pytest.raises(ConfigError, match=r"pip install jaxlm\[cluster\]"):
        choose(asked_of_optuna(), train)
    assert train.calls == 0


def test_optuna_stores_its_studies_for_its_own_tools(with_optuna, tmp_path):
    for _ in range(2):  # the second time over the first
        found = choose(asked_of_optuna(trials=6), Trainer(at_best(3e-3)), tmp_path)
    (stored,) = with_optuna.get_all_study_summaries(f"sqlite:///{tmp_path / 'optuna.db'}")
    kept = with_optuna.load_study(study_name="clip", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert stored.study_name == "clip" and len(kept.trials) == 6
    assert kept.best_params == found.points["clip"]
