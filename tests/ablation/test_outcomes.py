"""What run directories that were written by hand say."""

import json
import math

import numpy as np
import pytest

from jaxlm.ablation import outcomes, plan, study
from jaxlm.errors import ConfigError, DataError
from tests.ablation.small import PEAK, small

NAN = math.nan
TOKENS = 4 * 16  # of a step


def judged_by(best, patience=0):
    """A trial whose `checkpoint.best` is this."""
    cfg = study.arm(small(checkpoint__best=best, early_stopping__patience=patience), "clip")
    return study.trial(cfg, "clip", 1, {PEAK: 1e-3})


@pytest.fixture(scope="module")
def trial():
    return judged_by("eval/loss")


def rows_of(values, metric="eval/loss", every=2):
    return [{"step": every * (i + 1), "time": 0.0, metric: value} for i, value in enumerate(values)]


def paces(**milliseconds):
    """Rows that tell the pace since the row before: `at4=500`."""
    return [{"step": int(at[2:]), "throughput/step_ms": value} for at, value in milliseconds.items()]


@pytest.fixture
def run(tmp_path):
    """Writes a run directory."""

    def write(rows=(), status="done", beside=None, step=None):
        text = "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["step"]))
        (tmp_path / "metrics.jsonl").write_text(text)
        last = max((row["step"] for row in rows), default=4) if step is None else step
        (tmp_path / "status.json").write_text(json.dumps({"status": status, "step": last}))
        if beside is not None:
            (tmp_path / "trial.json").write_text(json.dumps({"beside": beside}))
        return tmp_path

    return write


# Status


@pytest.mark.parametrize(
    ("status", "over"),
    [
        *((status, True) for status in ("done", "stopped early", "diverged")),
        *((status, False) for status in ("running", "preempted", "interrupted", "failed")),
    ],
)
def test_some_statuses_are_of_runs_that_are_over(run, status, over):
    assert outcomes.over(run(status=status)) == over


def test_a_run_that_has_not_begun_is_not_over(tmp_path):
    assert not outcomes.over(tmp_path / "nowhere")


@pytest.mark.parametrize("status", ["done", "stopped early"])
@pytest.mark.parametrize(("metric", "every", "step"), [("eval/loss", 2, 7), ("train/loss", 1, 7), ("train/loss", 3, 9)])
def test_a_run_that_lacks_its_last_rows_is_no_result(run, metric, every, step, status):
    """As after a full disk. An earlier value would pass for that at the end."""
    one = study.trial(study.arm(small(log__every=every), "clip"), "clip", 1)
    rows = [*rows_of([3.0, 2.0, 2.5]), *rows_of([4.0, 3.0], "train/loss", 3)]
    with pytest.raises(DataError, match=f"is {status} at step {step}, .* has {metric} up to step 6 only.* remove this"):
        outcomes.read(one, run(rows, status, step=step), metric)
    assert outcomes.read(one, run(rows, status, step=6), metric).value
    assert math.isnan(outcomes.read(one, run(rows, "diverged", step=step), metric).value)


def test_a_row_that_is_not_due_is_not_missed(run):
    one = study.trial(study.arm(small(log__every=3), "clip"), "clip", 1)
    assert outcomes.read(one, run(rows_of([4.0, 3.0], "train/loss", 3), step=8), "train/loss").value == 3.0
    whole = study.trial(study.arm(small(log__every=5), "clip"), "clip", 1)  # of 12 steps, the last of which has a row
    with pytest.raises(DataError, match="has train/loss up to step 10 only"):
        outcomes.read(whole, run(rows_of([4.0, 3.0], "train/loss", 5), step=12), "train/loss")


# Values


@pytest.mark.parametrize(
    ("status", "values", "value", "best"),
    [
        ("done", [3.0, 2.0, 2.5], 2.5, 2.0),
        ("stopped early", [3.0, 2.0, 2.5], 2.5, 2.0),
        ("done", [3.0, 2.0, "nan"], NAN, 2.0),
        ("done", [3.0, 2.0, "inf"], NAN, 2.0),
        ("stopped early", [3.0, 2.0, 1.999], 1.999, 1.999),  # below min_delta
        ("stopped early", ["nan", 2.0, "inf"], NAN, 2.0),
        ("stopped early", ["-inf", 2.0, "inf", "nan"], NAN, 2.0),
        ("stopped early", ["nan", "nan"], NAN, NAN),
        *((status, [3.0, 2.0], NAN, NAN) for status in ("diverged", "running", "preempted", "failed", "")),
    ],
)
def test_the_value_of_a_run_is_its_last_or_that_at_its_best(trial, run, status, values, value, best):
    """By the rule alone, however the run ended."""
    found = outcomes.read(trial, run(rows_of(values), status), "eval/loss")
    assert found.value == pytest.approx(value, nan_ok=True, abs=0)
    assert found.status == status
    np.testing.assert_array_equal(found.curve.values, np.array(values, np.float64))
    for one, score in ((trial, "best"), (judged_by("eval/loss", patience=2), "final")):
        found = outcomes.read(one, run(rows_of(values), status), "eval/loss", score)
        assert found.value == pytest.approx(best, nan_ok=True, abs=0)


@pytest.mark.parametrize(("best", "value"), [("eval/loss", 0.2), ("-eval/accuracy", 0.4), ("eval/none", 0.1)])
def test_the_value_is_that_where_another_metric_was_best(run, best, value):
    """A metric's own best would be chosen by chance."""
    rows = [*rows_of([3.0, 2.0, 2.0, 2.5]), *rows_of([0.3, 0.2, 0.4, 0.1], "eval/accuracy")]
    assert outcomes.read(judged_by(best), run(rows, "stopped early"), "eval/accuracy", "best").value == value


@pytest.mark.parametrize(("every", "value"), [(1, 4.0), (3, 1.0), (5, 1.0)])
def test_a_metric_of_other_rows_is_the_latest_at_the_best_step_or_its_first(trial, run, every, value):
    """The evaluations' best is at step 4."""
    rows = [*rows_of([3.0, 2.0, 2.5]), *rows_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "train/loss", every)]
    assert outcomes.read(trial, run(rows, "stopped early"), "train/loss", "best").value == value


def test_an_outcome_is_its_trials(trial, run):
    found = outcomes.read(trial._replace(tuning=True), run(rows_of([3.0])), "eval/loss")
    assert (found.trial, found.variant, found.seed, found.point) == (trial.address, "clip", 1, {PEAK: 1e-3})
    assert found.tuning and math.isnan(found.joules)
    assert not outcomes.read(trial, run(rows_of([3.0])), "eval/loss").tuning


def test_a_curve_counts_steps_tokens_and_flops(trial, run):
    rows = [*rows_of([3.0, 2.0], every=3), *rows_of([4.0, 3.5, 3.1], "train/loss"), {"step": 8, "data/tokens": 1}]
    found = outcomes.read(trial, run(rows, step=6), "eval/loss")
    flops = TOKENS * plan.cost(trial.config).flops_per_token
    assert flops > 0
    for name, expected in {
        "steps": [3, 6],
        "tokens": [3 * TOKENS, 6 * TOKENS],
        "flops": [3 * flops, 6 * flops],
        "seconds": [NAN, NAN],
        "values": [3.0, 2.0],
    }.items():
        np.testing.assert_array_equal(getattr(found.curve, name), expected, err_msg=name)
    assert (found.tokens, found.flops) == (8 * TOKENS, 8 * flops)  # of all rows: the last is step 8
    assert found.curve.steps.dtype == found.curve.tokens.dtype == np.int64


def test_a_run_that_has_not_begun_has_an_empty_outcome(trial, tmp_path):
    found = outcomes.read(trial, tmp_path / "nowhere", "eval/loss")
    assert (found.status, found.tokens, found.flops) == ("", 0, 0.0)
    assert math.isnan(found.value) and math.isnan(found.seconds)
    assert all(len(column) == 0 for column in found.curve)


# Seconds


def test_the_time_of_a_run_is_that_of_its_steps(trial, run):
    """Steps 1 to 4 take half a second each, 5 to 8 a quarter, and so does all that comes after."""
    rows = [*rows_of([5, 4, 3, 2, 1]), *paces(at4=500, at8=250)]
    found = outcomes.read(trial, run(rows), "eval/loss")
    np.testing.assert_allclose(found.curve.seconds, [1.0, 2.0, 2.5, 3.0, 3.5])
    assert found.seconds == pytest.approx(3.5)


@pytest.mark.parametrize(("beside", "share"), [(1, 1), (4, 4), ("many", 1), ([], 1)])
def test_runs_beside_each_other_share_the_time(trial, run, beside, share):
    found = outcomes.read(trial, run([*rows_of([5, 4]), *paces(at4=500)], beside=beside), "eval/loss")
    np.testing.assert_allclose(found.curve.seconds, np.array([1.0, 2.0]) / share)
    assert found.seconds == pytest.approx(2.0 / share)


def test_a_row_of_pace_and_metric_counts_once(trial, run):
    rows = [{"step": 4, "throughput/step_ms": 500, "train/loss": 2.0}]
    found = outcomes.read(trial, run(rows), "train/loss")
    np.testing.assert_allclose(found.curve.seconds, [2.0])


def test_time_that_no_row_tells_is_unknown(trial, run):
    found = outcomes.read(trial, run(rows_of([5, 4]), beside=2), "eval/loss")
    assert np.isnan(found.curve.seconds).all() and len(found.curve.seconds) == 2
    assert math.isnan(found.seconds)


# Energy


def test_the_energy_of_a_run_is_what_its_last_row_tells(trial, run):
    rows = [{"step": 2, "energy/kwh": 1e-6}, {"step": 4, "energy/kwh": 3e-6}, *rows_of([5, 4])]
    found = outcomes.read(trial, run(rows), "eval/loss")
    assert found.joules == pytest.approx(10.8) and not found.estimated and math.isnan(found.gco2e)
    carbon = [row | {"energy/gco2e": 400 * row["energy/kwh"]} for row in rows[:2]]
    assert outcomes.read(trial, run([*carbon, *rows[2:]]), "eval/loss").gco2e == pytest.approx(1.2e-3)
    found = outcomes.read(trial, run([*rows, {"step": 4, "energy/estimated": 1.0}]), "eval/loss")
    assert found.estimated
    found = outcomes.read(trial, run(rows_of([5, 4])), "eval/loss")
    assert math.isnan(found.joules)


# The gap


@pytest.mark.parametrize(("status", "gap"), [("done", 2.5), ("stopped early", 0.5), ("diverged", NAN)])
def test_the_gap_is_that_where_the_value_was_taken(trial, run, status, gap):
    rows = [row | {"eval/gap": gap} for row, gap in zip(rows_of([5.0, NAN, 3.0, 4.0]), (0.1, 0.2, 0.5, 2.5))]
    score = "best" if status == "stopped early" else "final"
    assert outcomes.read(trial, run(rows, status), "eval/loss", score).gap == pytest.approx(gap, nan_ok=True)
    assert math.isnan(outcomes.read(trial, run(rows_of([1.0])), "eval/loss").gap)


def test_training_losses_stand_beside_those_of_evaluation(trial, run):
    rows = [row | {"eval/gap": gap} for row, gap in zip(rows_of([5.0, 4.0]), (0.5, 1.5))]
    curve = outcomes.read(trial, run([*rows, *rows_of([3.0, 2.0, 1.0])[2:]]), "eval/loss").curve
    np.testing.assert_allclose(curve.training, [4.5, 2.5, NAN])
    rows = [row | {"eval/accuracy": 0.5} for row in rows]
    assert np.isnan(outcomes.read(trial, run(rows), "eval/accuracy").curve.training).all()


# Finite explosions


@pytest.mark.parametrize(
    ("status", "evaluated", "training", "metric", "damped"),
    [
        ("done", [5.6, 900.0], 700.0, "eval/loss", True),
        ("done", [5.6, 900.0], 700.0, "train/loss", True),
        ("stopped early", [900.0, 950.0], 700.0, "eval/loss", True),
        ("done", [5.6, 6.5], 6.5, "eval/loss", False),  # ln 257 is 5.549: within a nat of it
        ("done", [5.6, 6.6], 6.6, "eval/loss", True),
        ("done", [5.6, 9.0], 0.1, "eval/loss", False),  # overfitted
        ("done", [5.6, 900.0], 700.0, "eval/accuracy", False),
    ],
)
def test_a_loss_far_above_a_uniform_guess_counts_by_its_logarithm(
    trial, run, status, evaluated, training, metric, damped
):
    rows = rows_of([900.0, training], "train/loss")  # at a high rate the first has exploded too
    rows += [row | {"eval/accuracy": 0.1} for row in rows_of(evaluated)]
    found = outcomes.read(trial, run(rows, status), metric)
    raw = found.curve.values[-1]
    border = math.log(257) + 1
    assert found.status == status
    assert found.value == pytest.approx(border + math.log(1 + raw - border) if damped else raw)


# What can't be read


@pytest.mark.parametrize("status", ["done", "stopped early"])
def test_a_metric_that_nobody_writes_names_the_nearest(trial, run, status):
    with pytest.raises(ConfigError, match="no trial writes metric 'eval/los': did you mean 'eval/loss'?"):
        outcomes.read(trial, run(rows_of([1.0]), status), "eval/los")
    with pytest.raises(ConfigError, match="no trial writes metric 'zzz': known: eval/loss, throughput/step_ms$"):
        outcomes.read(trial, run([*rows_of([1.0]), *paces(at2=1)], status), "zzz")


def test_a_run_that_diverged_before_its_first_evaluation_has_no_metric_and_that_is_no_mistake(trial, run):
    found = outcomes.read(trial, run(rows_of([9.0], "train/loss"), "diverged"), "eval/loss")
    assert math.isnan(found.value) and len(found.curve.steps) == 0


def test_damaged_metrics_name_their_file(trial, run):
    folder = run(rows_of([3.0, 2.0]))
    path = folder / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(DataError, match=f"{path}, row 1 of 3"):
        outcomes.read(trial, folder, "eval/loss")
