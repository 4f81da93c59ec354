"""Which value of a trial counts."""

import math

import numpy as np
import pytest

from jaxlm.ablation import runner, scoring
from jaxlm.errors import ConfigError
from jaxlm.evals import perplexity
from jaxlm.training import load
from tests.ablation.small import PEAK, arms, small

PATIENCE, METRIC, BEST = "early_stopping.patience", "early_stopping.metric", "checkpoint.best"


def judges(made):
    return {name: scoring.judge(cfg, made.score) for name, cfg in arms(made).items()}


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, ""),
        ({PATIENCE: 3}, "eval/loss"),
        ({PATIENCE: 3, METRIC: "-eval/accuracy"}, "eval/loss"),  # which stops it; the step it returns to is the best's
        ({PATIENCE: 3, BEST: "-eval/accuracy"}, "-eval/accuracy"),
        ({PATIENCE: 3, BEST: ""}, ""),  # it ends with its last parameters
    ],
)
def test_a_trial_counts_as_the_model_that_it_ends_with(own, found):
    assert judges(small(variants={"clip": {}, "other": own})) == {"clip": "", "other": found}


def test_or_all_trials_count_at_their_best():
    made = small(variants={"clip": {}, "other": {PATIENCE: 3, BEST: "-eval/accuracy"}}, score="best")
    assert judges(made) == {"clip": "eval/loss", "other": "-eval/accuracy"}
    with pytest.raises(ConfigError, match="variant 'none': score='best' .* that is '': name a metric"):
        judges(small(variants={"clip": {}, "none": {BEST: ""}}, score="best"))


@pytest.mark.parametrize(
    ("judges", "said"),
    [
        ({"a": "", "b": ""}, "the last value of each trial"),
        ({"a": "eval/loss", "b": "eval/loss"}, "the value of each trial where eval/loss was lowest"),
        (
            {"a": "", "b": "eval/loss", "c": "-eval/accuracy", "d": "eval/loss"},
            "the value of the model that a trial ends with: of b, d, where eval/loss was lowest; c, where "
            "eval/accuracy was highest; of the others the last value",
        ),
    ],
)
def test_the_rule_in_words(judges, said):
    assert scoring.words(judges) == said


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


def evaluated(checkpoint):
    """The loss of the model that load gives, on all held-out text."""
    model, params, tokenizer, cfg = load.load(checkpoint)
    split = load.held_out(load.locate(checkpoint), cfg, tokenizer)
    sizes = {"batch_size": cfg.data.batch_size, "context_length": cfg.model.context_length}
    return perplexity.evaluate_split(model, params, tokenizer, split, cfg.data, **sizes)["eval/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("score", ["final", "best"])
def test_the_value_of_a_trial_is_that_of_the_model_that_load_gives(tmp_path, score):
    """All are worse at the end than at their best; one of them may stop early, and has no cause to."""
    variants = {"base": {}, "patient": {PATIENCE: 5}}
    rising = {f"optimizer.scale_by_learning_rate.{name}": value for name, value in (("warmup", 0.75), ("final", 1.0))}
    overrides = {"eval.every": 2, "eval.batches": 0, "checkpoint.every": 4, PEAK: 0.1, **rising}
    found = runner.run(small(variants=variants, baseline="base", overrides=overrides, score=score), tmp_path)
    for one in found.outcomes:
        assert one.curve.values.min() < one.curve.values[-1]
        best = score == "best" or one.variant == "patient"
        assert one.value == (one.curve.values.min() if best else one.curve.values[-1])
        if score == "final":
            assert evaluated(tmp_path / "trials" / one.trial) == pytest.approx(one.value, rel=1e-5)
    assert "eval/loss was lowest" in (tmp_path / "report.md").read_text()
