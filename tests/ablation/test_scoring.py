"""One rule scores all trials of a study."""

import math

import numpy as np
import pytest

from jaxlm.ablation import runner, scoring, study
from tests.ablation.small import PEAK, small

PATIENCE, METRIC = "early_stopping.patience", "early_stopping.metric"


@pytest.mark.parametrize(
    ("own", "watched"),
    [
        ({"clip": {}, "b2": {}}, ""),
        ({"clip": {METRIC: "-eval/accuracy"}, "b2": {PATIENCE: 3}}, "eval/loss"),
        ({"clip": {PATIENCE: 2}, "b2": {PATIENCE: 3, METRIC: "-eval/accuracy"}}, "eval/loss"),
        ({"b2": {PATIENCE: 3}, "clip": {PATIENCE: 2, METRIC: "-eval/accuracy"}}, "-eval/accuracy"),
    ],
)
def test_where_an_arm_may_stop_early_all_are_scored_where_its_metric_was_best(own, watched):
    made = small(variants=own)
    trials = [study.trial(study.arm(made, name), name, 0) for name in own]
    assert scoring.watched(trials, "clip") == watched
    said = {"": "the last value", "eval/loss": "eval/loss was lowest", "-eval/accuracy": "eval/accuracy was highest"}
    assert said[watched] in scoring.words(watched)


def test_the_measurement_that_counts_is_the_last_up_to_the_best_step():
    rows = [{"step": 4, "eval/loss": 3.0}, {"step": 8, "eval/loss": 2.0}, {"step": 12, "eval/loss": 2.5}]
    for steps, found in (([4, 8, 12], 1), ([1, 2, 3], 2), ([6, 7, 9], 1), ([10, 11], 0)):
        assert scoring.place(rows, np.array(steps), "eval/loss") == found
        assert scoring.place(rows, np.array(steps), "") == len(steps) - 1


def test_a_run_that_began_with_other_weights_may_have_begun_higher():
    rows = [{"step": 1, "train/loss": 9.0}, {"step": 2, "train/loss": 9.5}, {"step": 3, "train/loss": 20.0}]
    border = math.log(256) + 1
    assert scoring.damped("eval/loss", 9.5, 2, rows, 256, fresh=True) == border + math.log(1 + 9.5 - border)
    assert scoring.damped("eval/loss", 9.5, 2, rows, 256, fresh=False) == 9.5
    assert scoring.damped("eval/ema_loss", 21.0, 3, rows, 256, fresh=False) == pytest.approx(10 + math.log(12))
    assert scoring.damped("eval/loss", 9.5, 2, [], 256, fresh=False) < 9.5  # of one that logs no training loss


def test_arms_whose_runs_are_the_same_get_the_same_value(tmp_path):
    """Both are worse at the end than at their best; one of them may stop early, and has no cause to."""
    variants = {"base": {}, "patient": {PATIENCE: 5}}
    rising = {f"optimizer.scale_by_learning_rate.{name}": value for name, value in (("warmup", 0.75), ("final", 1.0))}
    made = small(variants=variants, baseline="base", overrides={"eval.every": 2, PEAK: 0.1, **rising})
    found = runner.run(made, tmp_path)
    for seed in made.seeds:
        base, patient = (one for one in found.outcomes if one.seed == seed)
        np.testing.assert_array_equal(base.curve.values, patient.curve.values)
        assert base.value == patient.value == base.curve.values.min() < base.curve.values[-1]
    assert "eval/loss was lowest" in (tmp_path / "report.md").read_text()
