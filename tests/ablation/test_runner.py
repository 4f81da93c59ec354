"""A study ends with the same table, whatever happened on the way."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxlm import optim
from jaxlm.ablation import lanes as side_by_side
from jaxlm.ablation import runner
from jaxlm.ablation.memory import Memory
from jaxlm.errors import ConfigError, DataError
from tests.ablation.small import PEAK, small, without
from tests.runs import ROOT, THOROUGH, rows
from tests.tiny import CORPUS

CLOCK = ("seconds",)


def table(workdir):
    """results.csv without what depends on the clock."""
    with (workdir / "results.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in CLOCK} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    return workdir, runner.run(small(), workdir)


def test_every_trial_has_its_run_directory_and_the_study_its_report(ran):
    workdir, found = ran
    assert {path.name for path in workdir.iterdir()} >= {"report.md", "report.html", "results.csv", "study.json"}
    assert len(found.outcomes) == 6
    for outcome in found.outcomes:
        folder = workdir / "trials" / outcome.trial
        assert json.loads((folder / "status.json").read_text())["status"] == "done"
        assert rows(folder)[-1]["eval/loss"] == outcome.value
        note = json.loads((folder / "trial.json").read_text())
        assert (note["variant"], note["seed"]) == (outcome.variant, outcome.seed)
    assert [one.variant for one in found.comparisons] == ["no clip", "b2"]
    assert found.differences["b2"] == {"optimizer.scale_by_adam.b2": (0.95, 0.9)}
    assert found.budget == "768 training tokens a trial"


def test_every_trial_knows_how_many_shared_its_calls(tmp_path):
    """Of three in two lanes the last is alone, and pays for its time alone."""
    runner.run(small(steps=4, variants={"clip": {}}, seeds=(0, 1, 2)), tmp_path)
    notes = [json.loads(path.read_text()) for path in tmp_path.glob("trials/*/trial.json")]
    assert {note["seed"]: note["beside"] for note in notes} == {0: 2, 1: 2, 2: 1}


def test_pairs_begin_alike_and_see_the_same_batches(ran):
    workdir, found = ran
    first = {
        (outcome.variant, outcome.seed): rows(workdir / "trials" / outcome.trial)[0]["train/loss"]
        for outcome in found.outcomes
    }
    for seed in (0, 1):
        assert first["clip", seed] == pytest.approx(first["no clip", seed], rel=1e-6)
    assert first["clip", 0] != first["clip", 1]


def test_what_is_over_is_not_run_again(ran, monkeypatch):
    workdir, found = ran
    monkeypatch.setattr(runner, "local", lambda *_: pytest.fail("it trains again"))
    again = runner.run(small(), workdir)
    assert again.outcomes[0].value == found.outcomes[0].value
    assert again.comparisons == found.comparisons


@pytest.mark.parametrize(("split", "share"), [("training", ""), ("validation", "5%")])
def test_what_is_over_is_not_reused_once_its_data_changed(tmp_path, split, share):
    """Its config, whose hash finds it again, is the same: the first variant would be compared on other text."""
    text = tmp_path / "text.txt"
    text.write_text(CORPUS.read_text())
    edits = {"data__source": str(text), "data__validation": share, "metric": "train/loss"}
    runner.run(small(steps=4, seeds=(0,), variants={"clip": {}}, **edits), tmp_path / "study")
    text.write_text("# edited\n" + CORPUS.read_text() if split == "training" else CORPUS.read_text() + "# edited\n")
    more = small(steps=4, seeds=(0,), variants={"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}}, **edits)
    said = f"clip seed=0 is over, .*{text}.* changed since: the .*{split} tokens .*another --workdir"
    with pytest.raises(DataError, match=said):
        runner.run(more, tmp_path / "study", execute=lambda *_: pytest.fail("it trains"))
    text.write_text(CORPUS.read_text())
    assert runner.run(more, tmp_path / "study").outcomes[0].status == "done"
    text.unlink()
    assert runner.run(more, tmp_path / "study").outcomes[0].status == "done"  # the report takes no data


def test_a_metric_that_nobody_writes_ends_the_study_after_its_first_trial(tmp_path):
    for _ in range(2):  # and at once, where that trial is over
        with pytest.raises(ConfigError, match="no trial writes metric 'eval/los': did you mean 'eval/loss'"):
            runner.run(small(steps=4, lanes=1, metric="eval/los", eval__tasks=("perplexity",)), tmp_path)
        assert len(list(tmp_path.glob("trials/*/status.json"))) == 1


def test_what_is_wrong_with_an_arm_is_told_before_another_is_trained(tmp_path):
    with pytest.raises(ConfigError, match="variant 'rateless': optimizer.chain has no learning rate"):
        runner.run(small(variants={"clip": {}, "rateless": without("scale_by_learning_rate")}), tmp_path)
    assert not (tmp_path / "trials").exists()


def test_what_is_found_in_training_is_told_of_its_variants(tmp_path, monkeypatch):
    def train(*_):
        raise ConfigError("it was edited meanwhile")

    monkeypatch.setattr(runner.side_by_side, "train", train)
    said = "variants 'clip' and 'b2': it was edited meanwhile"
    with pytest.raises(ConfigError, match=said):
        runner.run(small(seeds=(0,), variants={"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}}), tmp_path)


def test_an_edited_study_keeps_the_trials_that_it_still_has(tmp_path, capsys):
    runner.run(small(steps=4, seeds=(0,)), tmp_path)
    trained = []

    def execute(groups, *rest):
        trained.extend(one.title for group in groups for one in group.trials)
        runner.local(groups, *rest)

    variants = {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}, "b1": {"optimizer.scale_by_adam.b1": 0.8}}
    found = runner.run(small(steps=4, seeds=(0,), variants=variants), tmp_path, execute=execute)
    assert trained == ["b1 seed=0"]
    assert "2 trials stay, 1 are new (b1 seed=0), 1 are no longer looked at" in capsys.readouterr().err
    assert "one seed" in found.warnings[0] and "was edited" not in str(found.warnings)  # which holds of this call alone


def test_what_was_changed_after_results_were_seen_is_in_the_report(tmp_path):
    """Adding seeds until p < 0.05 finds a difference in a fifth of studies where there is none."""
    b2 = {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}, "b1": {"optimizer.scale_by_adam.b1": 0.8}}
    steps = {"steps": 2, "lanes": 1}
    first = runner.run(small(variants=b2, seeds=(0, 1), **steps), tmp_path)
    assert "results were seen" not in str(first.warnings)
    del b2["b1"]
    found = runner.run(small(variants=b2, seeds=(0, 1, 2), **steps), tmp_path)
    assert found.warnings == (
        "seeds were added after results were seen: (0, 1), then (0, 1, 2); the intervals do not account for it",
        "variants were dropped after results were seen: b1; the correction for several does not count them",
    )
    report = (tmp_path / "report.md").read_bytes()
    assert b"(0, 1), then (0, 1, 2)" in report
    runner.run(small(variants=b2, seeds=(0, 1, 2), **steps), tmp_path)
    assert (tmp_path / "report.md").read_bytes() == report


@pytest.mark.parametrize("tuned", [False, True])
def test_an_edit_is_told_before_anything_is_trained(tmp_path, capsys, tuned):
    def execute(*_):
        raise runner.Stopped(75)

    fields = {"tuning": {PEAK: (1e-3, 1e-2)}, "tuning_seeds": (7,)} if tuned else {}
    variants = {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}}
    for made in (small(variants={"clip": {}}, **fields), small(variants=variants, **fields)):
        with pytest.raises(runner.Stopped):
            runner.run(made, tmp_path, execute=execute)
    new = "4 trials stay, 4 are new (b2 peak=0.001 seed=7" if tuned else "2 trials stay, 2 are new (b2 seed=0"
    assert f"the study was edited: {new}" in capsys.readouterr().err


def test_a_trial_that_was_broken_off_goes_on_under_settings_that_change_no_result(tmp_path, monkeypatch):
    go = side_by_side.loop.go

    def stopped(runs, steps, signals):
        signals.caught = signal.SIGTERM
        return go(runs, steps, signals)

    fields = {"variants": {"clip": {}}, "seeds": (0,)}
    with monkeypatch.context() as patch, pytest.raises(runner.Stopped):
        patch.setattr(side_by_side.loop, "go", stopped)
        runner.run(small(**fields), tmp_path)
    assert len(list(tmp_path.glob("trials/*/checkpoints/*"))) > 0
    settings = {"log.progress": True, "log.writers": ("jsonl", "tensorboard"), "checkpoint.every": 3}
    found = runner.run(small(**fields, overrides=settings), tmp_path)
    assert [one.status for one in found.outcomes] == ["done"] and len(list(tmp_path.glob("trials/*"))) == 1


def test_variants_that_are_alike_share_a_run(tmp_path, capsys):
    found = runner.run(small(steps=4, variants={"clip": {}, "same": {}, "again": {PEAK: 1e-3}}), tmp_path)
    assert len(list((tmp_path / "trials").iterdir())) == 2
    assert [one.verdict for one in found.comparisons] == ["changes nothing"] * 2
    assert "changes nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_no_ops_are_called_so_and_bad_changes_are_found(tmp_path):
    def planted(*stage, **arguments):
        return {"optimizer": lambda spec: optim.insert_after(spec, "scale_by_adam", *stage, **arguments)}

    variants = {
        "plain": {},
        "no-op": {"optimizer.clip_by_global_norm.max_norm": 1e6},  # never reached, as the baseline's
        "no-op transform": planted("identity"),
        "bad": {PEAK: 1e-6},
        "bad transform": planted("flip", transform="scale", step_size=-1.0),
    }
    overrides = {"optimizer.clip_by_global_norm.max_norm": 1e5, PEAK: 1e-2}
    found = runner.run(
        small(steps=40, variants=variants, baseline="plain", overrides=overrides, seeds=range(4)), tmp_path
    )
    verdicts = {one.variant: one.verdict for one in found.comparisons}
    assert {name for name in verdicts if verdicts[name] == "changes nothing"} == {"no-op", "no-op transform"}
    assert {name for name in verdicts if verdicts[name] == "worse"} == {"bad", "bad transform"}
    assert found.verdict.startswith("Worse than plain over 4 seeds: bad")


def test_a_variant_that_diverges_is_a_result(tmp_path):
    variants = {"clip": {}, "wild": {PEAK: 1e30}}
    found = runner.run(small(variants=variants, seeds=range(6), checkpoint__every=0), tmp_path)
    assert found.verdict == "wild is worse than clip: it diverged on 6 of 6 seeds, clip on none."
    assert [outcome.status for outcome in found.outcomes] == ["done"] * 6 + ["diverged"] * 6


def test_a_budget_of_seconds_is_checked_after_training(tmp_path, monkeypatch):
    """The machine may have been busy, when steps were timed or after."""
    monkeypatch.setattr(runner.plan.lanes, "median_seconds_per_step", lambda one: 1.0)
    found = runner.run(small(variants={"clip": {}}, budget={"seconds": 8}), tmp_path)
    (line,) = found.warnings
    said = "the budget is 8 seconds a trial, by steps timed before, and the median trial took others: clip "
    assert line.startswith(said) and line.endswith("%)")


def test_a_study_may_lie_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="without 'jsonl'"):
        runner.run(small(log__writers=()), "~/study")
    assert (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_tuned_study(tmp_path):
    found = runner.run(small(steps=8, tuning={PEAK: (1e-6, 1e-2)}, tuning_seeds=(7,), seeds=(0,)), tmp_path)
    assert {variant: point[PEAK] for variant, point in found.chosen.items()} == dict.fromkeys(
        ("clip", "no clip", "b2"), 1e-2
    )
    compared = [outcome for outcome in found.outcomes if not outcome.tuning]
    assert [outcome.seed for outcome in found.outcomes if outcome.tuning] == [7] * 6
    assert {outcome.point[PEAK] for outcome in compared} == {1e-2}
    assert (tmp_path / "sensitivity.png").exists()


@pytest.mark.slow
def test_a_study_tuned_over_optimizers(tmp_path):
    sgd = {"chain": ("scale_by_learning_rate",), "scale_by_learning_rate": {"peak": 1e-6}}
    fields = {"variants": {"clip": {}}, "tuning": {"optimizer": (sgd, without("clip_by_global_norm")["optimizer"])}}
    found = runner.run(small(steps=8, tuning_seeds=(7,), seeds=(0,), **fields), tmp_path)
    assert callable(found.chosen["clip"]["optimizer"]) and len(found.outcomes) == 3
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "report.html", "results.csv"}


def test_two_processes_can_not_run_one_study(tmp_path):
    from jaxlm.training import lock

    with lock.held(tmp_path), pytest.raises(DataError, match="process"):
        runner.run(small(), tmp_path)


def test_the_lanes_of_a_program_are_decided_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runner.side_by_side, "choose", lambda members, say: asked.append(len(members)) or 2)
    runner.run(small(steps=4, lanes=0), tmp_path)
    assert asked == [4]  # of the clipped arms, which share a program; the other has the same shape
    assert set(Memory(tmp_path / "study.json").lanes.values()) == {2}
    runner.run(small(steps=4, lanes=0, seeds=(0, 1, 2)), tmp_path)
    assert asked == [4]


STUDY = """
from tests.ablation.small import PEAK, small
def study():
    variants = {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}}
    tuning = {"tuning": {PEAK: (1e-3, 1e-2)}, "tuning_seeds": (7,)}
    return small(variants=variants, steps=100, eval__every=50, checkpoint__every=25, **tuning)
"""


@pytest.mark.slow
def test_kills_at_random_moments_change_no_number(tmp_path):
    experiment = tmp_path / "study.py"
    experiment.write_text(STUDY)

    def start(workdir):
        command = [sys.executable, "-m", "jaxlm.sweep", f"--experiment={experiment}", f"--workdir={workdir}"]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})

    begin = time.monotonic()
    process = start(tmp_path / "whole")
    assert process.wait() == 0, process.stderr.read().decode()
    whole = time.monotonic() - begin
    process.stderr.close()
    moments = random.Random(6)
    kills, enough, code = 0, 10 if THOROUGH else 4, None
    while code != 0:
        process = start(tmp_path / "killed")
        number = moments.choice([signal.SIGKILL, signal.SIGTERM])
        try:
            code = process.wait(moments.uniform(1, 0.7 * whole) if kills < enough else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            kills += 1
            code = process.wait(60)
            assert code in (-number, 75, 0)
        process.stderr.close()
        if code == 0 and kills < enough:  # over too soon: what is killed from now on reads and writes the report
            code = None
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    trials = list((tmp_path / "killed" / "trials").iterdir())
    assert len(trials) == len(table(tmp_path / "whole"))
    for folder in trials:
        read = [(row["step"], "eval/loss" in row) for row in rows(folder)]
        assert read == sorted(set(read))  # no row twice


def test_the_directory_of_a_run_is_no_place_for_a_study(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a run's directory, .* another --workdir"):
        runner.run(small(), tmp_path)
    assert not (tmp_path / "trials").exists()
