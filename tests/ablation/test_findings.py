"""What run directories that were written by hand say, and what a study's values say together."""

import json
import math

import numpy as np
import pytest

from jaxlm import optim
from jaxlm.ablation import findings, plan, stats, study, tables, verdicts
from jaxlm.ablation.findings import Curve, Outcome
from jaxlm.ablation.variants import grid
from jaxlm.errors import ConfigError, DataError
from tests.ablation.small import PEAK, small

NAN = math.nan
TOKENS = 4 * 16  # of a step


@pytest.fixture(scope="module")
def trial():
    return study.trial(study.arm(small(), "clip"), "clip", 1, {PEAK: 1e-3})


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
    assert findings.over(run(status=status)) == over


def test_a_run_that_has_not_begun_is_not_over(tmp_path):
    assert not findings.over(tmp_path / "nowhere")


@pytest.mark.parametrize("status", ["done", "stopped early"])
@pytest.mark.parametrize(("metric", "every", "step"), [("eval/loss", 2, 7), ("train/loss", 1, 7), ("train/loss", 3, 9)])
def test_a_run_that_lacks_its_last_rows_is_no_result(run, metric, every, step, status):
    """As after a full disk. An earlier value would pass for that at the end."""
    one = study.trial(study.arm(small(log__every=every), "clip"), "clip", 1)
    rows = [*rows_of([3.0, 2.0, 2.5]), *rows_of([4.0, 3.0], "train/loss", 3)]
    with pytest.raises(DataError, match=f"is {status} at step {step}, .* has {metric} up to step 6 only.* remove this"):
        findings.read(one, run(rows, status, step=step), metric)
    assert findings.read(one, run(rows, status, step=6), metric).value
    assert math.isnan(findings.read(one, run(rows, "diverged", step=step), metric).value)


def test_a_row_that_is_not_due_is_not_missed(run):
    one = study.trial(study.arm(small(log__every=3), "clip"), "clip", 1)
    assert findings.read(one, run(rows_of([4.0, 3.0], "train/loss", 3), step=8), "train/loss").value == 3.0
    whole = study.trial(study.arm(small(log__every=5), "clip"), "clip", 1)  # of 12 steps, the last of which has a row
    with pytest.raises(DataError, match="has train/loss up to step 10 only"):
        findings.read(whole, run(rows_of([4.0, 3.0], "train/loss", 5), step=12), "train/loss")


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
def test_the_value_of_a_run_is_its_last_or_that_where_the_watched_metric_was_best(
    trial, run, status, values, value, best
):
    """However the run ended: runs that are the same must not differ by what might have stopped them."""
    found = findings.read(trial, run(rows_of(values), status), "eval/loss")
    assert found.value == pytest.approx(value, nan_ok=True, abs=0)
    assert found.status == status
    np.testing.assert_array_equal(found.curve.values, np.array(values, np.float64))
    found = findings.read(trial, run(rows_of(values), status), "eval/loss", "eval/loss")
    assert found.value == pytest.approx(best, nan_ok=True, abs=0)


@pytest.mark.parametrize(("watched", "value"), [("eval/loss", 0.2), ("-eval/accuracy", 0.4), ("eval/none", 0.1)])
def test_the_value_is_that_where_the_watched_metric_was_best(trial, run, watched, value):
    """A metric's own best would be chosen by chance."""
    rows = [*rows_of([3.0, 2.0, 2.0, 2.5]), *rows_of([0.3, 0.2, 0.4, 0.1], "eval/accuracy")]
    assert findings.read(trial, run(rows, "stopped early"), "eval/accuracy", watched).value == value


@pytest.mark.parametrize(("every", "value"), [(1, 4.0), (3, 1.0), (5, 1.0)])
def test_a_metric_of_other_rows_is_the_latest_at_the_best_step_or_its_first(trial, run, every, value):
    """The evaluations' best is at step 4."""
    rows = [*rows_of([3.0, 2.0, 2.5]), *rows_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "train/loss", every)]
    assert findings.read(trial, run(rows, "stopped early"), "train/loss", "eval/loss").value == value


def test_an_outcome_is_its_trials(trial, run):
    found = findings.read(trial._replace(tuning=True), run(rows_of([3.0])), "eval/loss")
    assert (found.trial, found.variant, found.seed, found.point) == (trial.address, "clip", 1, {PEAK: 1e-3})
    assert found.tuning and math.isnan(found.joules)
    assert not findings.read(trial, run(rows_of([3.0])), "eval/loss").tuning


def test_a_curve_counts_steps_tokens_and_flops(trial, run):
    rows = [*rows_of([3.0, 2.0], every=3), *rows_of([4.0, 3.5, 3.1], "train/loss"), {"step": 8, "data/tokens": 1}]
    found = findings.read(trial, run(rows, step=6), "eval/loss")
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
    found = findings.read(trial, tmp_path / "nowhere", "eval/loss")
    assert (found.status, found.tokens, found.flops) == ("", 0, 0.0)
    assert math.isnan(found.value) and math.isnan(found.seconds)
    assert all(len(column) == 0 for column in found.curve)


# Seconds


def test_the_time_of_a_run_is_that_of_its_steps(trial, run):
    """Steps 1 to 4 take half a second each, 5 to 8 a quarter, and so does all that comes after."""
    rows = [*rows_of([5, 4, 3, 2, 1]), *paces(at4=500, at8=250)]
    found = findings.read(trial, run(rows), "eval/loss")
    np.testing.assert_allclose(found.curve.seconds, [1.0, 2.0, 2.5, 3.0, 3.5])
    assert found.seconds == pytest.approx(3.5)


@pytest.mark.parametrize(("beside", "share"), [(1, 1), (4, 4), ("many", 1), ([], 1)])
def test_runs_beside_each_other_share_the_time(trial, run, beside, share):
    found = findings.read(trial, run([*rows_of([5, 4]), *paces(at4=500)], beside=beside), "eval/loss")
    np.testing.assert_allclose(found.curve.seconds, np.array([1.0, 2.0]) / share)
    assert found.seconds == pytest.approx(2.0 / share)


def test_a_row_of_pace_and_metric_counts_once(trial, run):
    rows = [{"step": 4, "throughput/step_ms": 500, "train/loss": 2.0}]
    found = findings.read(trial, run(rows), "train/loss")
    np.testing.assert_allclose(found.curve.seconds, [2.0])


def test_time_that_no_row_tells_is_unknown(trial, run):
    found = findings.read(trial, run(rows_of([5, 4]), beside=2), "eval/loss")
    assert np.isnan(found.curve.seconds).all() and len(found.curve.seconds) == 2
    assert math.isnan(found.seconds)


# Energy


def test_the_energy_of_a_run_is_what_its_last_row_tells(trial, run):
    rows = [{"step": 2, "energy/kwh": 1e-6}, {"step": 4, "energy/kwh": 3e-6}, *rows_of([5, 4])]
    found = findings.read(trial, run(rows), "eval/loss")
    assert found.joules == pytest.approx(10.8) and not found.estimated and math.isnan(found.gco2e)
    carbon = [row | {"energy/gco2e": 400 * row["energy/kwh"]} for row in rows[:2]]
    assert findings.read(trial, run([*carbon, *rows[2:]]), "eval/loss").gco2e == pytest.approx(1.2e-3)
    found = findings.read(trial, run([*rows, {"step": 4, "energy/estimated": 1.0}]), "eval/loss")
    assert found.estimated
    found = findings.read(trial, run(rows_of([5, 4])), "eval/loss")
    assert math.isnan(found.joules)


# The gap


@pytest.mark.parametrize(("status", "gap"), [("done", 2.5), ("stopped early", 0.5), ("diverged", NAN)])
def test_the_gap_is_that_where_the_value_was_taken(trial, run, status, gap):
    rows = [row | {"eval/gap": gap} for row, gap in zip(rows_of([5.0, NAN, 3.0, 4.0]), (0.1, 0.2, 0.5, 2.5))]
    watched = "eval/loss" if status == "stopped early" else ""
    assert findings.read(trial, run(rows, status), "eval/loss", watched).gap == pytest.approx(gap, nan_ok=True)
    assert math.isnan(findings.read(trial, run(rows_of([1.0])), "eval/loss").gap)


def test_training_losses_stand_beside_those_of_evaluation(trial, run):
    rows = [row | {"eval/gap": gap} for row, gap in zip(rows_of([5.0, 4.0]), (0.5, 1.5))]
    curve = findings.read(trial, run([*rows, *rows_of([3.0, 2.0, 1.0])[2:]]), "eval/loss").curve
    np.testing.assert_allclose(curve.training, [4.5, 2.5, NAN])
    rows = [row | {"eval/accuracy": 0.5} for row in rows]
    assert np.isnan(findings.read(trial, run(rows), "eval/accuracy").curve.training).all()


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
    found = findings.read(trial, run(rows, status), metric)
    raw = found.curve.values[-1]
    border = math.log(257) + 1
    assert found.status == status
    assert found.value == pytest.approx(border + math.log(1 + raw - border) if damped else raw)


# What can't be read


@pytest.mark.parametrize("status", ["done", "stopped early"])
def test_a_metric_that_nobody_writes_names_the_nearest(trial, run, status):
    with pytest.raises(ConfigError, match="no trial writes metric 'eval/los': did you mean 'eval/loss'?"):
        findings.read(trial, run(rows_of([1.0]), status), "eval/los")
    with pytest.raises(ConfigError, match="no trial writes metric 'zzz': known: eval/loss, throughput/step_ms$"):
        findings.read(trial, run([*rows_of([1.0]), *paces(at2=1)], status), "zzz")


def test_a_run_that_diverged_before_its_first_evaluation_has_no_metric_and_that_is_no_mistake(trial, run):
    found = findings.read(trial, run(rows_of([9.0], "train/loss"), "diverged"), "eval/loss")
    assert math.isnan(found.value) and len(found.curve.steps) == 0


def test_damaged_metrics_name_their_file(trial, run):
    folder = run(rows_of([3.0, 2.0]))
    path = folder / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(DataError, match=f"{path}, row 1 of 3"):
        findings.read(trial, folder, "eval/loss")


# All together


NOISE = (0.01, -0.02, 0.03, 0.0, -0.01, 0.02)  # of six seeds, in all arms
JITTER = (0.001, -0.002, 0.001, 0.002, -0.001, 0.0)


def outcome(variant, seed, value, status="", **changes):
    status = status or ("done" if math.isfinite(value) else "diverged")
    fields = dict(point={}, tuning=False, status=status, value=value, curve=Curve(*[np.zeros(0)] * 6))
    return Outcome(
        f"{variant}{seed}", variant, seed, tokens=0, flops=0.0, seconds=0.0, joules=NAN, **(fields | changes)
    )


def gathered(outcomes, variants=("clip", "b2"), **fields):
    overrides = {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}, "wide": {"data.batch_size": 8}}
    made = small(variants={name: overrides[name] for name in variants}, **{"seeds": range(6), **fields})
    arms = {name: plan.budgeted(made, name, None, plan.Memory()) for name in made.variants}
    return findings.gather(made, arms, {"b2": {PEAK: 1.0}}, outcomes, ["careful"], name="clipping", command="again")


def values_of(effect, jitter=JITTER, seeds=6):
    """The values of b2 where its effect is this, beside the baseline's."""
    base = [outcome("clip", seed, 2.0 + NOISE[seed]) for seed in range(seeds)]
    return base + [outcome("b2", seed, 2.0 + NOISE[seed] + effect + jitter[seed]) for seed in range(seeds)]


def diverged(variant, count, seeds=6):
    """Of so many seeds, the first so many diverged."""
    return [outcome(variant, seed, NAN if seed < count else 2.0 + NOISE[seed % 6]) for seed in range(seeds)]


def test_findings_hold_what_the_report_says():
    outcomes = values_of(0.5)
    found = gathered(outcomes)
    assert (found.name, found.command, found.question) == ("clipping", "again", "Does clipping matter?")
    assert (found.metric, found.lower_is_better, found.baseline) == ("eval/loss", True, "clip")
    assert (found.variants, found.seeds) == (("clip", "b2"), (0, 1, 2, 3, 4, 5))
    assert (found.budget, found.warnings) == ("768 training tokens a trial", ("careful",))
    assert found.outcomes == tuple(outcomes) and found.chosen == {"b2": {PEAK: 1.0}}
    assert found.differences == {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": (0.95, 0.9)}}
    assert found.noise.seeds == 6 and found.noise.mean == pytest.approx(2.0 + np.mean(NOISE))
    assert found.noise.deviation == pytest.approx(np.std(NOISE, ddof=1))
    (comparison,) = found.comparisons
    assert comparison.variant == "b2" and comparison.mean == pytest.approx(0.5 + np.mean(JITTER))


@pytest.mark.parametrize(
    ("outcomes", "fields", "said"),
    [
        (
            values_of(-0.5),
            {},
            "b2 is better than clip: eval/loss -0.4998 [-0.5014, -0.4983] over 6 seeds.",
        ),
        (values_of(0.5), {}, "b2 is worse than clip: eval/loss +0.5002 [+0.4986, +0.5017] over 6 seeds."),
        (
            values_of(0.5),
            {"lower_is_better": False},
            "b2 is better than clip: eval/loss +0.5002 [+0.4986, +0.5017] over 6 seeds.",
        ),
        (
            values_of(-5e-5, [1e-3 * one for one in JITTER]),
            {},
            "b2 is better than clip: eval/loss -0.000050 [-0.000051, -0.000048] over 6 seeds.",
        ),
        (values_of(0.0001), {}, "No difference shown: b2."),
        (values_of(0.0, jitter=[0.0] * 6), {}, "Changes nothing: b2."),
        (values_of(0.5, seeds=1), {"seeds": (0,)}, "Nothing can be concluded: b2."),
        (
            diverged("clip", 0) + diverged("b2", 6),
            {},
            "b2 is worse than clip: it diverged on 6 of 6 seeds, clip on none.",
        ),
        (
            diverged("clip", 0, 9) + diverged("b2", 7, 9),
            {"seeds": range(9)},
            "b2 is worse than clip: it diverged on 7 of 9 seeds, clip on none.",
        ),
        (
            diverged("clip", 0) + diverged("b2", 5),
            {},
            "Nothing can be concluded: b2 (diverged on 5 of 6 seeds, clip on none).",
        ),
        (
            diverged("clip", 6) + diverged("b2", 6),
            {},
            "b2 diverged on 6 of 6 seeds, clip on 6.",
        ),
        (
            diverged("clip", 0, 5) + diverged("b2", 5, 5),  # so few that no test can reject
            {"seeds": range(5)},
            "b2 diverged on 5 of 5 seeds, clip on none.",
        ),
        (
            diverged("clip", 3) + diverged("b2", 0),
            {},
            "No difference shown: b2 (diverged on none of 6 seeds, clip on 3).",
        ),
        (diverged("clip", 0), {"variants": ("clip",)}, f"clip alone: eval/loss {2 + np.mean(NOISE):.4f} over 6 seeds."),
        (
            diverged("clip", 4),
            {"variants": ("clip",)},
            f"clip alone: eval/loss {2 + np.mean(NOISE[4:]):.4f} over 2 seeds.",
        ),
        (diverged("clip", 6), {"variants": ("clip",)}, "clip alone: it finished on no seed."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_verdict_in_words(outcomes, fields, said):
    assert gathered(outcomes, **fields).verdict == said


def test_a_verdict_names_every_variant():
    outcomes = [*values_of(-0.5), *(outcome("wide", seed, 2.0 + NOISE[seed]) for seed in range(6))]
    found = gathered(outcomes, ("clip", "wide", "b2"))
    assert found.verdict.startswith("b2 is better than clip: ") and found.verdict.endswith(". Changes nothing: wide.")


def test_what_chose_a_point_is_not_compared():
    chose = [outcome("b2", seed, -9.0, tuning=True) for seed in range(6)]
    found = gathered([*values_of(0.5), *chose])
    assert found.comparisons == gathered(values_of(0.5)).comparisons
    assert len(found.outcomes) == 18


@pytest.mark.parametrize("status", ["running", "preempted", "interrupted", "failed", None])
def test_a_run_that_is_not_over_did_not_diverge(status):
    """It is left out; as diverged, it would take the verdict away, or give one."""
    outcomes = [one._replace(status=status or "", value=NAN) if one.trial == "b25" else one for one in values_of(-0.5)]
    (comparison,) = gathered(outcomes).comparisons
    assert (comparison.verdict, comparison.lost, len(comparison.seeds)) == ("better", (), 5)
    lost = [one._replace(status="diverged", value=NAN) if one.trial == "b25" else one for one in values_of(-0.5)]
    (comparison,) = gathered(lost).comparisons
    assert (comparison.verdict, comparison.lost) == ("nothing can be concluded", (5,))


def test_a_baseline_with_one_seed_has_no_noise():
    assert gathered(values_of(0.5, seeds=1), seeds=(0,)).noise is None


def test_a_full_grid_has_its_effects():
    axes = {"optimizer.scale_by_adam.b2": (0.9, 0.95), PEAK: (1e-3, 2e-3)}
    made = small(variants=grid(axes), baseline="b2=0.95 peak=0.001", seeds=range(6))
    arms = {name: study.arm(made, name) for name in made.variants}
    outcomes = [
        outcome(name, seed, 2.0 + NOISE[seed] + i + JITTER[(seed + i) % 6])
        for i, name in enumerate(made.variants)
        for seed in range(6)
    ]
    found = findings.gather(made, arms, {}, outcomes, [], name="s", command="")
    assert [one.name for one in found.effects] == [
        "b2 0.9 against 0.95",
        "peak 0.002 against 0.001",
        "b2 0.9 × peak 0.002",
    ]
    rows = [[cell.text for cell in row] for row in tables.tables(found)["effects"].rows]
    assert rows[0][:2] == ["b2 0.9 against 0.95", "6"] and rows[0][2].startswith("-2.0")
    assert gathered(values_of(0.5)).effects == []


def test_changes_are_shown_without_secrets_and_functions_by_their_names(monkeypatch):
    import optax

    def noisy(scale=1.0):
        return optax.scale(scale)

    monkeypatch.setenv("HF_TOKEN", "canary-canary")
    edit = {"optimizer": lambda spec: optim.insert_after(spec, "scale_by_adam", "mine", transform=noisy)}
    variants = {"clip": {}, "mine": edit, "url": {"data.source": "https://user:canary-canary@host/x.txt"}}
    made = small(variants=variants)
    arms = {variant: study.arm(made, variant) for variant in variants}
    found = findings.gather(made, arms, {}, [], ["canary-canary"], name="s", command="")
    (shown,) = [pair for path, pair in found.differences["mine"].items() if path == "optimizer.mine.transform"]
    assert shown[0] is None and "noisy " in shown[1] and "0x" not in shown[1]
    assert "canary" not in str(found)


def test_several_verdicts_of_a_kind_are_listed_best_first():
    effects = {"a": 0.0, "b": -0.2, "c": -0.5, "d": 0.3}
    values = {
        name: {seed: 2.0 + NOISE[seed] + effect * (1 + JITTER[seed]) for seed in range(6)}
        for name, effect in effects.items()
    }
    made = small(variants={name: {} for name in values}, baseline="a", seeds=range(6))
    said = verdicts.verdict(made, stats.compare(values, "a"), values)
    assert said.startswith("Better than a over 6 seeds: c, eval/loss -0.5")
    assert "; b, eval/loss -0.2" in said and "d is worse than a: eval/loss +0.3" in said
    higher = small(variants={name: {} for name in values}, baseline="a", seeds=range(6), lower_is_better=False)
    said = verdicts.verdict(higher, stats.compare(values, "a", lower_is_better=False), values)
    assert "Worse than a over 6 seeds: b, eval/loss -0.2" in said and "; c, eval/loss -0.5" in said
    assert said.startswith("d is better than a: eval/loss +0.3")


def test_a_verdict_shows_small_and_large_metrics_in_a_few_digits():
    made = small(variants={"a": {}, "b": {}}, baseline="a", seeds=range(6))
    for scale, shown in ((1e-9, "-5.000e-10"), (1e200, "-5.000e+199")):
        values = {
            name: {seed: (2.0 + NOISE[seed] + effect * (1 + JITTER[seed])) * scale for seed in range(6)}
            for name, effect in {"a": 0.0, "b": -0.5}.items()
        }
        said = verdicts.verdict(made, stats.compare(values, "a"), values)
        assert f"b is better than a: eval/loss {shown[:5]}" in said and shown[-4:] in said and len(said) < 100
        assert len(verdicts.verdict(small(variants={"clip": {}}), [], {"clip": values["a"]})) < 60
