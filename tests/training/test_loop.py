import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlm
from jaxlm import config, config_json, data
from jaxlm.errors import ConfigError, DataError, DivergedError
from jaxlm.optim import chain, wrappers
from jaxlm.telemetry import energy, flops
from jaxlm.telemetry.writers import read_jsonl
from jaxlm.training import load, loop, recorder, rundir
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.export import export
from jaxlm.training.prepare import prepare
from jaxlm.training.run import Run
from jaxlm.training.steps import Steps, build
from tests.runs import ROOT, checkpoints, rows, start, wait_for_step
from tests.tiny import CORPUS, assert_same_bits, resolved, tiny

CONSTANT = {"peak": 1e-3, "schedule": "constant"}  # one compiled program, whatever the number of steps
LONG = dict(steps=300, eval__every=20, checkpoint__every=20, log__every=1, model__dropout=0.1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    return jaxlm.train(tiny(**LONG), workdir)


def test_a_run_directory_holds_what_the_contract_says(undisturbed):
    workdir = undisturbed.workdir
    assert undisturbed.status == "done" and undisturbed.exit_code == 0
    names = "config.json status.json tokenizer.json metrics.jsonl log.txt checkpoints loss.png"
    assert {path.name for path in workdir.iterdir()} >= set(names.split())
    assert json.loads((workdir / "status.json").read_text()).items() >= {"status": "done", "step": 300}.items()
    assert checkpoints(workdir)[-2:] == [280, 300]
    assert set(os.listdir(workdir / "checkpoints" / "300")) >= {"state", "data", "config"}
    assert config_json.from_json((workdir / "config.json").read_text()).model.vocab_size == 257
    log = (workdir / "log.txt").read_text()
    assert re.search(r"64 tokens a step, 0.2 epochs of [\d,]+\.\d steps", log)
    assert re.search(rf"held out: 1 document, [\d,]+ tokens, of {re.escape(str(CORPUS))}\n", log)
    train = [row for row in rows(workdir) if "train/loss" in row]
    assert [row["step"] for row in train] == list(range(1, 301))
    assert train[-1]["data/tokens"] == 300 * 4 * 16
    assert train[-1]["train/loss"] < 0.8 * train[0]["train/loss"]
    full = read_jsonl(workdir / "metrics.jsonl")
    assert any(row.keys() >= {"throughput/step_ms", "throughput/tokens_per_second"} for row in full)
    evaluated = [row for row in full if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == list(range(20, 301, 20))
    assert evaluated[-1]["eval/perplexity"] == pytest.approx(np.exp(evaluated[-1]["eval/loss"]))
    assert evaluated[-1]["eval/loss"] == undisturbed.metrics["eval/loss"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_ends_with_the_bits_of_the_undisturbed_one(tmp_path, undisturbed, number):
    workdir = tmp_path / "run"
    process = start(workdir, **LONG)
    wait_for_step(workdir, 30, process)
    process.send_signal(number)
    code = process.wait(60)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}[number], process.stderr.read()
    process.stderr.close()
    status = json.loads((workdir / "status.json").read_text())
    assert status["status"] == {75: "preempted", 130: "interrupted", -9: "running"}[code]
    assert checkpoints(workdir)[-1] < 300
    if code > 0:
        assert checkpoints(workdir)[-1] == status["step"]  # nothing was lost
    again = jaxlm.train(tiny(**LONG), workdir)
    assert_same_bits(again.state, undisturbed.state)
    assert rows(workdir) == rows(undisturbed.workdir)


def test_more_steps_resume_and_a_finished_run_says_so(tmp_path, capsys):
    first = jaxlm.train(tiny(), tmp_path / "run")
    assert int(first.state.step) == 8
    jaxlm.train(tiny(), tmp_path / "run")
    assert "already at step 8 of 8" in capsys.readouterr().err
    more = jaxlm.train(tiny(steps=12), tmp_path / "run")
    told = capsys.readouterr().err
    assert int(more.state.step) == 12
    assert "steps changed from 8 to 12" in told and "resumed at step 8" in told
    before, now = (chain.learning_rates(tiny().optimizer.to_dict(), None, steps, 8) for steps in (8, 12))
    [(stage, rate)] = now.items()
    length = "ends at step 12 now, not 8: the learning rate of step 9 is"
    assert f"the schedule of optimizer.{stage} {length} {rate:.3g}, not {before[stage]:.3g}" in told
    assert [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row] == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_is_not_made_shorter(tmp_path):
    jaxlm.train(tiny(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"steps is 4, and the run in .* has a checkpoint of step 8: give at least 8"):
        jaxlm.train(tiny(steps=4), tmp_path / "run")
    assert rundir.read_config(tmp_path / "run").steps == 8


def test_several_steps_a_call_are_the_same_run(tmp_path):
    one = jaxlm.train(tiny(), tmp_path / "one")
    four = jaxlm.train(tiny(steps_per_call=3), tmp_path / "three")
    for a, b in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(four.state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    steps = [[row["step"] for row in rows(tmp_path / name)] for name in ("one", "three")]
    assert steps[0] == steps[1]


def test_what_compiles_is_no_time_of_a_step(tmp_path, monkeypatch):
    now, advance, seen = itertools.count(), Steps.advance, set()

    def slow(self, hparams, states, batch, count):
        if count not in seen:  # 3 steps a call, and 2 in the last one
            seen.add(count)
            for _ in range(1000):
                next(now)
        return advance(self, hparams, states, batch, count)

    monkeypatch.setattr(Steps, "advance", slow)
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    jaxlm.train(tiny(steps=14, steps_per_call=3, eval__every=0, checkpoint__every=0, log__every=1), tmp_path / "run")
    times = [row.get("throughput/step_ms", 0) for row in read_jsonl(tmp_path / "run/metrics.jsonl")]
    assert seen == {2, 3} and 0 < max(times) < 10_000


def test_mfu_is_of_the_devices_that_a_run_has(tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "peak_flops", lambda *_: 1e12)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    found = jaxlm.train(tiny(parallel__data=1), tmp_path / "run")
    row = next(row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "throughput/mfu" in row)
    each = flops.of_model(tiny(model__vocab_size=257).model, found.state.params)
    assert row["throughput/mfu"] == pytest.approx(row["throughput/tokens_per_second"] * each / 1e12)


@pytest.mark.parametrize("fields", [{"eval__every": 0}, {"data__validation": ""}])
def test_early_stopping_without_evaluations_is_warned_of(tmp_path, fields):
    assert jaxlm.train(tiny(early_stopping__patience=1, **fields), tmp_path / "run").status == "done"
    assert "warning: early_stopping stops nothing without evaluations" in (tmp_path / "run/log.txt").read_text()


def test_held_out_text_that_is_the_training_text_is_warned_of(tmp_path):
    copy = shutil.copy(CORPUS, tmp_path / "copy.py")
    jaxlm.train(tiny(data__validation=str(copy)), tmp_path / "run")
    assert "warning: data.validation is the text of data.source" in (tmp_path / "run/log.txt").read_text()


def test_a_share_that_few_documents_miss_is_warned_of(tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        (tmp_path / "two" / f"{name}.txt").write_text(name * 4000)
    jaxlm.train(tiny(data__source=str(tmp_path / "two"), data__validation="5%"), tmp_path / "run")
    assert (
        "warning: data.validation='5%' was asked for and 50.00% of the text" in (tmp_path / "run/log.txt").read_text()
    )


def test_a_run_of_bfloat16_parameters_goes_on(tmp_path):
    fields = dict(model__param_dtype="bfloat16", steps_per_call=2, optimizer__scale_by_learning_rate=CONSTANT)
    jaxlm.train(tiny(**fields, steps=4), tmp_path / "run")
    assert int(jaxlm.train(tiny(**fields), tmp_path / "run").state.step) == 8


def test_another_number_compiles_nothing_again(tmp_path):
    names = []
    for i, peak in enumerate((1e-3, 1e-2)):
        jaxlm.train(tiny(optimizer__scale_by_learning_rate__peak=peak), tmp_path / str(i))
        names.append(build(prepare(tiny(optimizer__scale_by_learning_rate__peak=peak)).config))
    assert names[0] is names[1] and names[0]._one._cache_size() == 1


def test_a_signal_after_the_last_step_finds_the_run_done(tmp_path, monkeypatch):
    settle = Run.settle

    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        settle(self)

    monkeypatch.setattr(Run, "settle", signalled)
    result = jaxlm.train(tiny(), tmp_path / "run")
    assert (result.status, result.exit_code) == ("done", 0)
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("number", "error", "status"),
    [(signal.SIGTERM, SystemExit, "preempted"), (signal.SIGINT, KeyboardInterrupt, "interrupted")],
)
def test_a_signal_before_the_first_step_is_in_the_status(tmp_path, monkeypatch, number, error, status):
    monkeypatch.setattr(Run, "begin", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(error):
        jaxlm.train(tiny(), tmp_path / "run")
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == status


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"early_stopping__metric": "eval/los", "early_stopping__patience": 1}, "early_stopping.metric is 'eval/los'"),
        ({"checkpoint__best": "-eval/acuracy"}, "checkpoint.best is '-eval/acuracy', and no evaluation gives that"),
    ],
)
def test_a_metric_that_is_none_is_an_error_before_the_first_step(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message + ".*did you mean 'eval/"):
        jaxlm.train(tiny(**fields), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert jaxlm.train(tiny(), tmp_path / "run").status == "done"  # nothing is in the way


def test_what_a_wrong_config_says_to_do_can_be_done_in_the_same_directory(tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("a few words, less than a context of them")
    with pytest.raises(DataError, match="lower model.context_length"):
        jaxlm.train(tiny(data__source=str(few), data__validation="", model__context_length=128), tmp_path / "run")
    cfg = tiny(steps=2, data__source=str(few), data__validation="", model__context_length=8, data__batch_size=2)
    assert jaxlm.train(cfg, tmp_path / "run").status == "done"


def test_what_a_run_trains_on_can_be_seen(tmp_path):
    found = {}

    def note(first, rows):
        found.update({first + i: row for i, row in enumerate(rows["inputs"])})

    loop.train(tiny(), tmp_path / "run", seen=note)
    cfg = resolved()
    batches, _ = data.training(cfg.data, data.open(cfg.data), cfg.model.context_length, cfg.seed)
    assert sorted(found) == list(range(8 * cfg.data.batch_size))
    for first, row in found.items():
        np.testing.assert_array_equal(row, batches.rows(first, 1)["inputs"][0])


def test_every_zero_means_never(tmp_path):
    result = jaxlm.train(tiny(eval__every=0, checkpoint__every=0, log__every=0), tmp_path / "run")
    assert result.metrics == {} and rows(tmp_path / "run") == []
    assert checkpoints(tmp_path / "run") == []


def test_the_best_step_is_kept_though_it_is_not_among_the_latest(tmp_path):
    # after a start that learns, a rate that only harms
    schedule = {"optimizer__scale_by_learning_rate__schedule": "warmup_linear"}
    peak = {"optimizer__scale_by_learning_rate__peak": 3.0, "optimizer__scale_by_learning_rate__warmup": 0.99}
    chain = {"optimizer__chain": ("scale_by_adam", "scale_by_learning_rate")}
    cfg = tiny(steps=40, checkpoint__keep=1, eval__every=2, checkpoint__every=20, **schedule, **peak, **chain)
    jaxlm.train(cfg, tmp_path / "run")
    losses = {row["step"]: row["eval/loss"] for row in rows(tmp_path / "run") if "eval/loss" in row}
    best = min(losses, key=losses.get)
    assert best < 40
    assert checkpoints(tmp_path / "run") == [best, 40]


STILL = {"optimizer__scale_by_learning_rate__peak": 0.0, "early_stopping__min_delta": 1e-3}  # nothing improves


def test_early_stopping_ends_the_run_after_its_patience(tmp_path):
    run, cfg = tmp_path / "run", tiny(steps=40, eval__every=2, early_stopping__patience=3, **STILL)
    result = jaxlm.train(cfg, run)
    assert (result.status, result.exit_code) == ("stopped early", 0)
    assert int(result.state.step) == 2  # the best
    assert json.loads((run / "status.json").read_text()).items() >= {"status": "stopped early", "result": 2}.items()
    assert checkpoints(run)[-1] == 8 and load.locate(run).step == 2
    again = jaxlm.train(cfg, run)  # it has ended
    assert (again.status, int(again.state.step), checkpoints(run)[-1]) == ("stopped early", 2, 8)
    assert load.locate(run).step == 2 and "raise --config.early_stopping.patience" in (run / "log.txt").read_text()
    assert again.metrics == result.metrics and "eval/loss" in again.metrics
    cfg.early_stopping.patience = 5
    assert jaxlm.train(cfg, run).status == "stopped early" and checkpoints(run)[-1] == 12


def test_a_run_that_stops_early_in_its_last_step_stays_so(tmp_path):
    cfg = tiny(steps=8, eval__every=2, early_stopping__patience=3, **STILL)
    for _ in range(2):
        result = jaxlm.train(cfg, tmp_path / "run")
        assert (result.status, int(result.state.step)) == ("stopped early", 2)
        assert load.locate(tmp_path / "run").step == 2


def test_with_patience_the_best_step_is_the_result_of_a_run_that_came_to_its_end_too(tmp_path):
    run, cfg = tmp_path / "run", tiny(steps=8, eval__every=4, early_stopping__patience=2, **STILL)
    for steps in (8, 8, 12):  # the same again stays so, and more steps go on from the last one
        cfg.steps = steps
        result = jaxlm.train(cfg, run)
        assert (result.status, int(result.state.step)) == ("done" if steps == 8 else "stopped early", 4)
        assert load.locate(run).step == 4 and checkpoints(run)[-1] == steps
        assert json.loads((run / "status.json").read_text())["result"] == 4
    assert "resumed at step 8" in (run / "log.txt").read_text()


def test_the_best_step_is_said_at_the_end_of_every_run(tmp_path):
    result = jaxlm.train(tiny(eval__every=2, checkpoint__best="-eval/accuracy"), tmp_path / "run")
    accuracies = {row["step"]: row["eval/accuracy"] for row in rows(tmp_path / "run") if "eval/accuracy" in row}
    best = max(accuracies, key=accuracies.get)
    assert (
        f"the best: step {best}, with eval/accuracy {accuracies[best]:.4f}"
        in (tmp_path / "run" / "log.txt").read_text()
    )
    assert int(result.state.step) == 8  # which is the result without patience


def signalled(monkeypatch, number, step):
    """From now on a signal is heard after that step."""
    between_steps = Run.between_steps

    def heard(self, evaluate, state, caught):
        if self.done == step:
            caught = number
            self.pause()
        between_steps(self, evaluate, state, caught)

    monkeypatch.setattr(Run, "between_steps", heard)


@pytest.mark.parametrize(
    ("fields", "status"), [({**STILL, "early_stopping__patience": 1}, "stopped early"), ({}, "done")]
)
def test_a_signal_in_the_step_that_ends_a_run_finds_it_ended(tmp_path, monkeypatch, fields, status):
    signalled(monkeypatch, signal.SIGTERM, 4)
    result = jaxlm.train(tiny(steps=40 if fields else 4, eval__every=2, **fields), tmp_path / "run")
    assert (result.status, result.exit_code) == (status, 0)
    assert "run the same command again" not in (tmp_path / "run" / "log.txt").read_text()


def test_without_checkpoints_a_signal_saves_and_so_does_the_end_of_what_goes_on_from_there(tmp_path, monkeypatch):
    cfg = tiny(steps=8, checkpoint__every=0)
    with monkeypatch.context() as patched:
        signalled(patched, signal.SIGTERM, 3)
        assert jaxlm.train(cfg, tmp_path / "run").status == "preempted"
    assert checkpoints(tmp_path / "run") == [3]
    assert jaxlm.train(cfg, tmp_path / "run").status == "done" and checkpoints(tmp_path / "run") == [3, 8]


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_in_python_raises_once_all_is_saved_and_a_second_one_at_once(tmp_path, monkeypatch, capsys, times):
    between_steps = Run.between_steps

    def interrupted(self, *arguments):
        if self.done == 3:
            for _ in range(times):  # of which the second would have ended this process
                os.kill(os.getpid(), signal.SIGINT)
        between_steps(self, *arguments)

    monkeypatch.setattr(Run, "between_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jaxlm.train(tiny(checkpoint__every=0), tmp_path / "run")
    assert "SIGINT: stops after this step; once more: at once" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "interrupted"
    assert checkpoints(tmp_path / "run") == ([4] if times == 1 else [])


@pytest.mark.slow
def test_a_run_that_overfits_stops_within_its_patience_at_the_bits_of_its_best_step(tmp_path):
    lines = CORPUS.read_text().splitlines(keepends=True)
    (tmp_path / "few.txt").write_text("".join(lines[88:100]))
    (tmp_path / "others.txt").write_text("".join(lines[600:800]))
    data = {"data__source": str(tmp_path / "few.txt"), "data__validation": str(tmp_path / "others.txt")}
    rate = {"optimizer__scale_by_learning_rate__peak": 0.02, "optimizer__scale_by_learning_rate__schedule": "constant"}
    plan = dict(steps=400, eval__every=10, checkpoint__every=10, model__embed_dim=32, **rate)
    plan |= {"optimizer__chain": ("scale_by_adam", "scale_by_learning_rate")}
    free = jaxlm.train(tiny(**data, **plan, checkpoint__keep=100), tmp_path / "free")
    losses = {row["step"]: row["eval/loss"] for row in rows(free.workdir) if "eval/loss" in row}
    best, gaps = min(losses, key=losses.get), [row["eval/gap"] for row in rows(free.workdir) if "eval/gap" in row]
    assert best < 300 and losses[400] > losses[best] + 0.3 and gaps[-1] > gaps[0] + 0.3  # it does overfit
    patience = 3
    stopped = jaxlm.train(tiny(**data, **plan, early_stopping__patience=patience), tmp_path / "stopped")
    assert stopped.status == "stopped early"
    last = max(row["step"] for row in rows(stopped.workdir) if "eval/loss" in row)
    seen = {step: loss for step, loss in losses.items() if step <= last}
    best = min(seen, key=seen.get)
    assert int(stopped.state.step) == best and last == best + 10 * patience
    with Checkpoints(free.workdir / "checkpoints", writable=False) as kept:
        assert_same_bits(stopped.state, kept.restore(free.state, best).state)


def test_divergence_is_an_error_that_keeps_the_checkpoints_before(tmp_path):
    wild = {"optimizer__chain": ("scale_by_learning_rate",), "optimizer__scale_by_learning_rate__peak": 1e30}
    late = {"optimizer__scale_by_learning_rate__warmup": 0.0, "optimizer__scale_by_learning_rate__schedule": "constant"}
    with pytest.raises(DivergedError, match=r"steps 1 to 3 had no finite loss.*lower the peak") as error:
        cfg = tiny(**wild, **late, checkpoint__every=1, eval__every=0, divergence__max_bad_steps=3)
        jaxlm.train(cfg, tmp_path / "run")
    assert error.value.exit_code == 3
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "diverged"
    saved = jaxlm.load(tmp_path / "run").params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved))


def test_another_config_in_the_same_directory_names_the_fields(tmp_path):
    jaxlm.train(tiny(), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"model.embed_dim was 16, is 32; seed was 0, is 1.*another --workdir"):
        jaxlm.train(tiny(model__embed_dim=32, seed=1), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_text_that_changed_since_is_refused(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text(CORPUS.read_text())
    jaxlm.train(tiny(data__source=str(source)), tmp_path / "run")
    source.write_text(CORPUS.read_text().upper())
    with pytest.raises(DataError, match="training tokens .* are not those"):
        jaxlm.train(tiny(data__source=str(source)), tmp_path / "run")


def test_a_tokenizer_that_differs_from_the_checkpoints_is_refused(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text(CORPUS.read_text())
    changes = dict(data__source=str(source), data__tokenizer="chars", model__vocab_size=200)
    jaxlm.train(tiny(**changes), tmp_path / "run")
    source.write_text(CORPUS.read_text() + "ßøł")
    with pytest.raises(DataError, match="tokenizer 'chars' differs"):
        jaxlm.train(tiny(**changes), tmp_path / "run")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model.vocab_size=100, but the tokenizer 'bytes' has 257"):
        jaxlm.train(tiny(model__vocab_size=100), tmp_path / "run")


def test_another_batch_size_goes_on_at_the_same_sequence(tmp_path):
    jaxlm.train(tiny(), tmp_path / "run")
    more = jaxlm.train(tiny(steps=10, data__batch_size=8), tmp_path / "run")
    assert int(more.state.step) == 10
    assert rows(tmp_path / "run")[-2]["data/tokens"] == (8 * 4 + 2 * 8) * 16


@pytest.mark.parametrize("blocked", ["a file", "read-only"])
def test_a_run_directory_that_cannot_be_made_is_an_error(tmp_path, blocked):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "run" if blocked == "a file" else Path("/proc/run")
    with pytest.raises(DataError, match="can't be written"):
        jaxlm.train(tiny(), workdir)


def test_a_run_directory_may_lie_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(loop, "go", lambda runs, *_: setattr(runs[0], "ended", "done"))
    assert jaxlm.train(tiny(), "~/run").workdir == tmp_path / "run"


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk: the same errors, in a process of its own."""
    workdir = tmp_path / "run"
    jaxlm.train(tiny(), workdir)
    before = jaxlm.load(workdir).params
    text = config_json.to_json(config.resolve(tiny(steps=16)))
    script = (
        "import resource, signal, sys, jaxlm; from jaxlm import config_json, errors\n"
        "def run():\n"
        "    cfg = config_json.from_json(sys.argv[1])\n"
        "    from jaxlm.training import loop\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    return jaxlm.train(cfg, sys.argv[2]).exit_code\n"
        "sys.exit(errors.exit_code(run))"
    )
    command = [sys.executable, "-c", script, text, str(workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "can't be written" in told[0] and "File too large" in told[0]
    assert_same_bits(jaxlm.load(workdir).params, before)


def test_a_save_that_fails_is_told_and_training_goes_on(tmp_path, monkeypatch):
    usage, asked = shutil.disk_usage(tmp_path), []

    def full_once(path):
        asked.append(path)
        return usage._replace(free=0) if len(asked) <= 2 else usage  # asked before the save, and for the message

    monkeypatch.setattr(shutil, "disk_usage", full_once)
    result = jaxlm.train(tiny(steps=12), tmp_path / "run")
    assert result.status == "done" and checkpoints(tmp_path / "run") == [8, 12]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("warning: a checkpoint can't be written to") == 1 and "step 4 needs" in log


def test_a_status_that_cannot_be_written_is_told_and_training_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise DataError("status.json can't be written: No space left on device")

    monkeypatch.setattr(rundir, "write_status", full)
    assert jaxlm.train(tiny(steps=4), tmp_path / "run").status == "done"
    assert "warning: status.json can't be written" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(("limit", "step"), [(1, 4), (2, 8)])
def test_too_many_saves_that_fail_end_the_run(tmp_path, monkeypatch, limit, step):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(DataError, match=f"can't be written to .*step {step} needs"):
        jaxlm.train(tiny(steps=40, checkpoint__max_failures=limit), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_file_system_that_is_full_keeps_the_older_checkpoint(tmp_path):
    """A real one, of a few megabytes, where mounting is allowed."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    often = dict(log__every=1, log__writers=("jsonl", "tensorboard"), checkpoint__max_failures=100)
    text = config_json.to_json(config.resolve(tiny(steps=80, eval__every=0, **often)))
    script = (
        "import pathlib, shutil, sys, jaxlm; from jaxlm import config, config_json, errors\n"
        "from ml_collections import ConfigDict\n"
        "cfg, run = config_json.from_json(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
        "jaxlm.train(config.override(ConfigDict(cfg), {'steps': 8}), run)\n"
        "(run.parent / 'fill').write_bytes(bytes(shutil.disk_usage(run).free - 30_000))\n"
        "code = errors.exit_code(lambda: jaxlm.train(cfg, run).exit_code)\n"
        "print(code, sorted(path.name for path in (run / 'checkpoints').iterdir()), jaxlm.load(run).params.keys())\n"
    )
    mount = f'mount -t tmpfs -o size=8m none {mounted} && exec {sys.executable} -c "$0" "$1" {mounted}/run'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, script, text]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "unshare: " in done.stderr or "mount: " in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.stdout.startswith("4 ['4', '8'] dict_keys("), done.stderr
    assert "No space left" in done.stderr or "needs" in done.stderr
    for writer in ("jsonl", "tensorboard"):
        assert done.stderr.count(f"warning: writer '{writer}' can't write step") == 1
    assert "Traceback" not in done.stderr


def test_bfloat16_and_micro_batches_and_remat_run_as_configured(tmp_path):
    changes = dict(model__dtype="bfloat16", data__micro_batches=2, model__remat="dots", model__unroll=True)
    result = jaxlm.train(tiny(**changes), tmp_path / "run")
    assert result.status == "done" and np.isfinite(result.metrics["eval/loss"])


# what the optimizer means to be evaluated


def with_optimizer(*chain, steps=8, **tables):
    cfg = tiny(steps=steps, optimizer__chain=chain)
    for stage, table in tables.items():
        cfg.optimizer[stage] = table
    return cfg


def test_an_average_of_the_parameters_is_evaluated_beside_them(tmp_path):
    cfg = with_optimizer("scale_by_adam", "scale_by_learning_rate", "ema_of_params", ema_of_params={"decay": 0.9})
    result = jaxlm.train(cfg, tmp_path)
    last = [row for row in rows(tmp_path) if "eval/loss" in row][-1]
    assert last["eval/loss"] != last["eval/ema_loss"] and last["eval/ema_perplexity"] > 1
    assert jaxlm.load(tmp_path).params["ln_f"]["scale"].shape == result.state.params["ln_f"]["scale"].shape


def test_schedule_free_is_evaluated_and_loaded_at_its_average(tmp_path):
    cfg = with_optimizer("it", it={"transform": "contrib.schedule_free_adamw", "learning_rate": 1e-2})
    result = jaxlm.train(cfg, tmp_path)
    average = wrappers.evaluation_params(result.state.opt_state, result.state.params)[""]
    loaded = jaxlm.load(tmp_path)
    np.testing.assert_allclose(loaded.params["wte"]["embedding"], average["wte"]["embedding"], rtol=1e-6, atol=1e-8)
    assert np.abs(average["wte"]["embedding"] - result.state.params["wte"]["embedding"]).max() > 1e-5


def test_the_gap_is_evaluation_loss_less_the_mean_training_loss_right_before(undisturbed):
    losses = {row["step"]: row["train/loss"] for row in rows(undisturbed.workdir) if "train/loss" in row}
    evals = {row["step"]: row for row in rows(undisturbed.workdir) if "eval/loss" in row}
    assert len(evals) == 15
    for step, row in evals.items():
        mean = (losses[step - 1] + losses[step]) / 2  # a tenth of 20 steps
        assert row["eval/gap"] == pytest.approx(row["eval/loss"] - mean, rel=1e-6)


def test_norms_and_sparsity_by_group_on_request(tmp_path):
    jaxlm.train(tiny(steps=2, log__groups=True), tmp_path)
    row = [row for row in rows(tmp_path) if "train/loss" in row][-1]
    groups = [row[f"optim/param_norm/{name}"] for name in ("kernels", "embeddings", "norms", "biases")]
    assert row["optim/param_norm"] == pytest.approx(np.linalg.norm(groups), rel=1e-5)
    padding = 127 * 16 / ((384 + 16) * 16)  # of the vocabulary: zero as initialised
    assert row["optim/sparsity/kernels"] == 0 and row["optim/sparsity/embeddings"] == pytest.approx(padding)


# doubts


def test_energy_is_told_and_goes_on_where_a_run_resumes(tmp_path, monkeypatch):
    reads = itertools.count(step=6.0)
    monkeypatch.setattr(energy, "_rapl", lambda stack: energy.Meter("a counter", reads.__next__))
    monkeypatch.setattr(energy, "_IDLE_SECONDS", 0.0)
    for steps in (8, 15):
        jaxlm.train(tiny(steps=steps, log__every=2, log__carbon_intensity="500"), tmp_path)
    found = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "energy/kwh" in row]
    assert [row["step"] for row in found] == [*range(2, 15, 2), 15]  # and at the end, whatever log.every
    kwh = [row["energy/kwh"] for row in found]
    assert kwh == sorted(set(kwh)) and kwh[0] < kwh[3] < kwh[4]
    assert all(row["energy/joules_per_token"] > 0 and row["energy/gco2e"] == 500 * row["energy/kwh"] for row in found)
    log = (tmp_path / "log.txt").read_text()
    assert "energy: a counter" in log
    joules = [float(value) for value in re.findall(r"used (.*) J, ", log)]
    assert len(joules) == 2 and joules[1] > kwh[-1] * energy.JOULES_PER_KWH > joules[0]


def test_rows_of_one_call_share_its_time_and_energy(tmp_path, monkeypatch):
    reads = itertools.count(step=6.0)
    monkeypatch.setattr(energy, "_rapl", lambda stack: energy.Meter("a counter", reads.__next__))
    monkeypatch.setattr(energy, "_IDLE_SECONDS", 0.0)
    jaxlm.train(tiny(steps=32, log__every=2, steps_per_call=8, eval__every=0, checkpoint__every=0), tmp_path)
    found = {row["step"]: row for row in read_jsonl(tmp_path / "metrics.jsonl")}
    for name in ("energy/joules_per_token", "throughput/step_ms"):
        shared = [{found[step].get(name) for step in range(end - 6, end + 1, 2)} for end in (16, 24, 32)]
        assert all(len(values) == 1 and values != {None} for values in shared), (name, shared)
    spent = sum(found[end]["energy/joules_per_token"] * 8 * 4 * 16 for end in (8, 16, 24, 32))
    assert 0 < spent <= found[32]["energy/kwh"] * energy.JOULES_PER_KWH


def test_a_doubtful_optimizer_is_warned_of_and_refused_where_strict(tmp_path, capsys):
    doubtful = with_optimizer("scale_by_learning_rate", "clip_by_global_norm", steps=1)
    doubtful.optimizer["add_decayed_weights"]["where"] = "all"
    doubtful.optimizer["chain"] = ("scale_by_adam", "add_decayed_weights", "scale_by_learning_rate")
    jaxlm.train(doubtful, tmp_path / "warned")
    assert "warning: optimizer.add_decayed_weights: it decays biases" in (tmp_path / "warned" / "log.txt").read_text()
    doubtful.strict = True
    with pytest.raises(ConfigError, match="optimizer stage 'add_decayed_weights': it decays biases"):
        jaxlm.train(doubtful, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_an_optimizer_without_a_learning_rate_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no learning rate: nothing multiplies the updates of 'h/attn/c_attn/bias'"):
        jaxlm.train(with_optimizer("scale_by_adam"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_transform_of_a_notebook_trains_and_is_named_in_the_saved_config(tmp_path):
    lion = {"transform": optax.scale_by_lion, "b1": 0.8}
    cfg = with_optimizer("mine", "scale_by_learning_rate", steps=2, mine=lion, scale_by_learning_rate=CONSTANT)
    jaxlm.train(cfg, tmp_path)
    assert "scale_by_lion" in (tmp_path / "config.json").read_text()
    assert "config.json can't hold optimizer.mine.transform" in (tmp_path / "log.txt").read_text()
    cfg.steps = 4
    assert int(jaxlm.train(cfg, tmp_path).state.step) == 4  # and goes on from the same notebook


def made(factor):
    """A transform as a notebook makes one."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformation(lambda params: (), update)


def test_another_transform_of_the_same_name_is_another_run(tmp_path):
    jaxlm.train(with_optimizer("mine", steps=2, mine={"transform": made(-0.1)}), tmp_path)
    again = jaxlm.train(with_optimizer("mine", steps=4, mine={"transform": made(-0.1)}), tmp_path)
    assert int(again.state.step) == 4
    with pytest.raises(ConfigError, match=r"optimizer.mine.transform was '<.*made.* \w{8}>', is '<.*made.* \w{8}>'"):
        jaxlm.train(with_optimizer("mine", steps=4, mine={"transform": made(-0.5)}), tmp_path)


def test_a_run_says_where_a_function_that_its_config_names_was_edited(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = "edited_between_runs"
    for turn, rate in enumerate((0.1, 0.1, 0.2), 1):
        (tmp_path / f"{name}.py").write_text(f"import optax\n\n\ndef mine():\n    return optax.sgd({rate})\n")
        importlib.invalidate_caches()
        sys.modules.pop(name, None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        jaxlm.train(with_optimizer("mine", steps=turn, mine={"transform": f"{name}:mine"}), tmp_path / "run")
        said = f"warning: the code of optimizer.mine.transform, '{name}:mine', is not what it was"
        assert (said in (tmp_path / "run" / "log.txt").read_text()) == (turn == 3)


def test_out_of_memory_says_what_to_change(tmp_path):
    with pytest.raises(ConfigError, match=r"out of memory: .*logits .* MB.*Raise data.micro_batches=1"):
        jaxlm.train(tiny(data__batch_size=2_000_000, eval__every=0), tmp_path / "run")


def test_no_secret_of_the_environment_gets_into_a_run_directory(tmp_path, monkeypatch):
    """Nor one in a URL: of all files that a run, its export and its logs leave."""
    canary = "c4n4ry-of-the-mine"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET"):
        monkeypatch.setenv(name, f"{canary}-{name}")
    source = tmp_path / f"{canary}-MY_SECRET.txt"
    source.write_text(CORPUS.read_text())
    run = tmp_path / "run"
    for steps in (4, 8):  # and it goes on
        jaxlm.train(tiny(steps=steps, data__source=str(source), log__writers=("jsonl", "tensorboard")), run)
    export(run, tmp_path / "exported")
    files = [path for folder in (run, tmp_path / "exported") for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    assert "<redacted>.txt" in (run / "config.json").read_text()


def test_a_run_is_judged_by_a_gap_whose_steps_were_skipped(tmp_path):
    def bad(updates, state, params=None):  # the state is that of the step before, as often as this is skipped
        return jax.tree.map(lambda u: jnp.where(state == 3, jnp.nan, u), updates), state + 1

    cfg = tiny(eval__every=4, early_stopping__patience=5, early_stopping__metric="eval/gap", steps=8)
    cfg.optimizer.chain = ("bad", "scale_by_learning_rate")
    cfg.optimizer.bad = {"transform": optax.GradientTransformation(lambda params: jnp.int32(0), bad)}
    run = jaxlm.train(cfg, tmp_path / "run")
    assert run.status == "done" and "eval/gap" not in run.metrics


def test_what_begins_anew_for_lack_of_a_checkpoint_says_so(tmp_path):
    for said in (False, True):
        jaxlm.train(tiny(checkpoint__every=0, steps=2), tmp_path / "run")
        line = "no checkpoint to go on from: it begins anew, without the "
        assert (line in (tmp_path / "run" / "log.txt").read_text()) == said
