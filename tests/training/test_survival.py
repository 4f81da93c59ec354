"""Whatever happens to its process, a run ends with the bits of the undisturbed one. Real processes, real signals."""

import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import data
from jaxlm.errors import DivergedError
from jaxlm.training import loop
from jaxlm.training.checkpoint import Checkpoints
from tests.runs import THOROUGH, Life, checkpoints, rows, start, wait_for_step
from tests.tiny import assert_same_bits, tiny

RUN = dict(steps=120, eval__every=40, checkpoint__every=20, model__dropout=0.1)
KILLS = 30 if THOROUGH else 10


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    for folder in (tmp_path_factory.mktemp("first") / "run", workdir):  # the first one compiles for all
        begin = time.monotonic()
        life = Life(folder, **RUN)
        assert life.wait(120) == 0, life.said()
    return jaxlm.train(tiny(**RUN), workdir), time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_at_random_moments_change_no_bit(tmp_path, undisturbed, number):
    """Start-up, compiling, steps, saves, evaluations and the end: each chain goes on until its run is complete."""
    expected, seconds = undisturbed
    moments = random.Random(int(number))
    sent = chains = 0
    while sent < KILLS:
        workdir, code = tmp_path / str(chains), None
        while code != 0:
            life = Life(workdir, **RUN)
            code = life.wait(moments.uniform(0, seconds) if sent < KILLS else 120)
            if code is None:
                life.signal(number)
                sent += 1
                code = life.wait(120)
            assert code in {0, 75, -number}, life.said()
        again = jaxlm.train(tiny(**RUN), workdir)
        assert_same_bits(again.state, expected.state)
        assert rows(workdir) == rows(expected.workdir)
        chains += 1


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    process = start(tmp_path / "run", **{**RUN, "steps": 100_000, "eval__every": 0})
    wait_for_step(tmp_path / "run", 4, process)
    for _ in range(50):
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    process.stderr.close()


def test_slurms_warning_saves_and_asks_to_be_called_again(tmp_path):
    process = start(tmp_path / "run", **{**RUN, "steps": 100_000, "eval__every": 0})
    wait_for_step(tmp_path / "run", 4, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    process.stderr.close()
    assert '"status": "preempted"' in (tmp_path / "run" / "status.json").read_text()


@pytest.mark.slow
def test_of_two_processes_on_one_directory_one_trains(tmp_path):
    for turn in range(20 if THOROUGH else 3):
        lives = [Life(tmp_path / str(turn), steps=4, eval__every=0) for _ in range(2)]
        codes = [life.wait(120) for life in lives]
        assert sorted(codes) == [0, 4], [life.said() for life in lives]
        winner, loser = (lives[codes.index(code)] for code in (0, 4))
        assert f"error: process {winner.pid} on host " in loser.said() and "Traceback" not in loser.said()


CONSTANT = {"optimizer__scale_by_learning_rate__schedule": "constant", "optimizer__scale_by_learning_rate__warmup": 0}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run of 4 steps, and the last evaluation of one of 8."""
    folder = tmp_path_factory.mktemp("halfway")
    jaxlm.train(tiny(steps=4, **CONSTANT), folder / "run")
    return folder / "run", jaxlm.train(tiny(**CONSTANT), folder / "whole").metrics["eval/loss"]


def goes_on(halfway, tmp_path):
    """A copy of that run, and a check that it came to its end there at such a token."""
    workdir = shutil.copytree(halfway[0], tmp_path / "run")

    def check(devices, tokens):
        log = (workdir / "log.txt").read_text()
        assert f"{devices} x cpu; resumed at step 4" in log and "the schedule of" not in log
        *_, step, evaluation = rows(workdir)
        assert step["data/tokens"] == tokens
        if tokens == 8 * 4 * 16:  # the same run, but for the order of sums
            assert evaluation["eval/loss"] == pytest.approx(halfway[1], rel=1e-5)

    return workdir, check


def test_on_other_devices_it_goes_on_at_the_same_token(tmp_path, halfway):
    workdir, check = goes_on(halfway, tmp_path)
    process = start(workdir, devices=2, **CONSTANT)
    told = process.communicate()[1].decode()
    assert process.returncode == 0, told
    check(2, 8 * 4 * 16)


@pytest.mark.parametrize(
    ("change", "tokens"), [({"data__micro_batches": 2}, 8 * 4 * 16), ({"data__batch_size": 2}, 6 * 4 * 16)]
)
def test_with_other_batches_it_goes_on_at_the_same_token(tmp_path, halfway, change, tokens):
    workdir, check = goes_on(halfway, tmp_path)
    jaxlm.train(tiny(**CONSTANT, **change), workdir)
    check(1, tokens)


# batches that break


def planted(monkeypatch, sequences, spoil):
    """Lets `spoil` change the batches that hold one of these sequences."""
    rows = data.Batches.rows

    def planting(self, first, count):
        batch = rows(self, first, count)
        for sequence in sequences:
            if first <= sequence < first + count:
                spoil(batch, sequence - first)
        return batch

    monkeypatch.setattr(data.Batches, "rows", planting)


def not_a_number(batch, row):
    batch["weights"][row] = np.nan


def noise(batch, row):
    targets = batch["targets"][row : row + 4]  # of a step
    targets[:] = np.random.default_rng(0).integers(200, 257, targets.shape)


def test_a_batch_that_is_not_a_number_is_told_and_counted_and_training_goes_on(tmp_path, monkeypatch):
    planted(monkeypatch, [4 * 5 + 1], not_a_number)  # in the batch of step 6
    jaxlm.train(tiny(steps=6, checkpoint__every=6, eval__every=0), tmp_path / "skipped")
    log = (tmp_path / "skipped" / "log.txt").read_text()
    assert "warning: step 6, of batch 5, changes nothing: its loss is nan" in log
    on = jaxlm.train(tiny(steps=8, checkpoint__every=6, eval__every=0), tmp_path / "skipped")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(on.state.params))
    last = rows(tmp_path / "skipped")[-1]
    assert last["step"] == 8 and last["optim/skipped"] == 1


def test_a_step_of_nan_leaves_parameters_and_optimizer_as_they_are(tmp_path, monkeypatch):
    planted(monkeypatch, [4 * 7 + 2], not_a_number)  # in the batch of step 8, the last
    cfg = tiny(steps=8, checkpoint__every=1, checkpoint__keep=2, eval__every=0)
    last = jaxlm.train(cfg, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [7, 8]
    with Checkpoints(tmp_path / "run" / "checkpoints", writable=False) as saved:
        seven = saved.restore(jax.eval_shape(lambda state: state, last.state), 7).state
    assert_same_bits((last.state.params, last.state.opt_state), (seven.params, seven.opt_state))


ROLLING = dict(
    steps=120,
    checkpoint__every=10,
    eval__every=0,
    log__every=1,
    divergence__rollback_z=6.0,
    divergence__window=20,
)


def test_a_spike_sends_the_run_back_and_past_its_batch(tmp_path, monkeypatch):
    planted(monkeypatch, [4 * 94], noise)  # in the batch of step 95
    result = jaxlm.train(tiny(**ROLLING), tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "warning: the loss of step 95 is a spike" in log and "back to step 90, to go on with sequence 380" in log
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == 120
    assert int(result.state.step) == 120 and log.count("is a spike") == 1


def test_a_run_that_breaks_after_a_rollback_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_AHEAD", 4 * 16)  # tokens: a batch is made when it is wanted
    planted(monkeypatch, [4 * 94], noise)
    whole = jaxlm.train(tiny(**ROLLING), tmp_path / "whole")
    with monkeypatch.context() as broken:
        planted(broken, [4 * 97], lambda batch, row: batch.pop("nothing"))
        with pytest.raises(KeyError, match="nothing"):
            jaxlm.train(tiny(**ROLLING), tmp_path / "run")
    again = jaxlm.train(tiny(**ROLLING), tmp_path / "run")
    assert_same_bits(again.state, whole.state)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_too_many_spikes_end_the_run(tmp_path, monkeypatch):
    planted(monkeypatch, [4 * 94], noise)
    with pytest.raises(DivergedError, match=r"step 95 is a spike: .*, after 0 rollbacks \(divergence.max_rollbacks\)"):
        jaxlm.train(tiny(**ROLLING, divergence__max_rollbacks=0), tmp_path / "run")
