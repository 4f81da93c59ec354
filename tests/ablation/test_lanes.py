"""A lane is the run that it would be alone."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.ablation import lanes
from jaxlm.errors import ConfigError
from jaxlm.telemetry import energy
from jaxlm.telemetry.writers import read_jsonl
from jaxlm.training import recorder
from jaxlm.training.load import load
from jaxlm.training.signals import Signals
from jaxlm.training.steps import Steps
from tests.ablation.small import BASE, PEAK, member
from tests.runs import ROOT, checkpoints, rows
from tests.tiny import leaves, tiny

DIFFERENT = [  # seeds, dropout, learning rates, decay, label smoothing: all that lanes may differ in
    {"seed": 0, PEAK: 1e-3, "model.dropout": 0.1},
    {"seed": 1, PEAK: 3e-3, "model.dropout": 0.2, "optimizer.add_decayed_weights.weight_decay": 0.3},
    {"seed": 2, PEAK: 1e-2, "model.dropout": 0.1, "loss.label_smoothing": 0.2},
    {"seed": 0, PEAK: 1e-3, "model.dropout": 0.3, "optimizer.scale_by_adam.b2": 0.99},
]
FIFTY = {"steps": 50, "eval__every": 25, "checkpoint__every": 25, "loss.label_smoothing": 0.1}


def train(members, width):
    with Signals() as signals:
        lanes.train(members, width, signals)


def status(workdir):
    return json.loads((workdir / "status.json").read_text())["status"]


def params(workdir):
    return leaves(load(str(workdir)).params)


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solo")
    for i, changes in enumerate(DIFFERENT):
        jaxlm.train(tiny(**{**BASE, **FIFTY, **changes}), folder / str(i))
    return folder


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes")
    train([member(folder / str(i), **{**FIFTY, **changes}) for i, changes in enumerate(DIFFERENT)], 4)
    return folder


@pytest.mark.parametrize("i", range(len(DIFFERENT)))
def test_each_lane_is_its_solo_run(solo, beside, i):
    alone, lane = solo / str(i), beside / str(i)
    assert status(lane) == status(alone) == "done"
    assert checkpoints(lane) == checkpoints(alone)
    assert (lane / "config.json").read_text() == (alone / "config.json").read_text()
    ours, theirs = rows(lane), rows(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (one["step"], name)
    # all at once: the keys' biases alone get no gradient but rounding, which Adam makes large
    flat, expected = (np.concatenate([x.ravel() for x in params(one).values()]) for one in (lane, alone))
    assert np.linalg.norm(flat - expected) <= 1e-4 * np.linalg.norm(expected)


def test_a_lane_goes_on_as_a_run_of_its_own(beside, tmp_path):
    longer = tiny(**{**BASE, **FIFTY, **DIFFERENT[0], "steps": 60})
    shutil.copytree(beside / "0", tmp_path / "0")
    assert jaxlm.train(longer, tmp_path / "0").status == "done"
    assert rows(tmp_path / "0")[: len(rows(beside / "0"))] == rows(beside / "0")


@pytest.mark.slow
def test_places_and_neighbours_change_no_bit(beside, tmp_path):
    """The other way round, with an empty lane, and beside a run whose numbers are none."""
    order = [3, 0, 1]
    train([member(tmp_path / str(i), **{**FIFTY, **DIFFERENT[i]}) for i in order], 4)
    for i in order:
        assert rows(tmp_path / str(i)) == rows(beside / str(i))
        for path, value in params(beside / str(i)).items():
            np.testing.assert_array_equal(params(tmp_path / str(i))[path], value, err_msg=path)


@pytest.mark.slow
def test_a_lane_that_diverges_ends_and_changes_no_bit_of_the_others(beside, tmp_path):
    broken = {**DIFFERENT[0], PEAK: 1e30, "divergence.max_bad_steps": 10}
    members = [member(tmp_path / str(i), **{**FIFTY, **DIFFERENT[i]}) for i in range(3)]
    train([*members, member(tmp_path / "broken", **{**FIFTY, **broken})], 4)
    assert status(tmp_path / "broken") == "diverged"
    assert max(row["step"] for row in rows(tmp_path / "broken")) < 50
    for i in range(3):
        assert rows(tmp_path / str(i)) == rows(beside / str(i))
        assert params(tmp_path / str(i)).keys() == params(beside / str(i)).keys()
        for path, value in params(beside / str(i)).items():
            np.testing.assert_array_equal(params(tmp_path / str(i))[path], value, err_msg=path)


def test_a_lane_stops_early_by_itself(tmp_path):
    """Its learning rate is zero in all but name, so that nothing improves; its neighbour's is not."""
    patience = {"early_stopping.patience": 1, "early_stopping.min_delta": 0.01, "steps": 24, "eval.every": 6}
    train([member(tmp_path / "still", **patience, **{PEAK: 1e-9}), member(tmp_path / "on", **patience)], 2)
    assert (status(tmp_path / "still"), status(tmp_path / "on")) == ("stopped early", "done")
    assert checkpoints(tmp_path / "still")[-1] == 12


def test_one_program_serves_some_runs_and_those_after_them(tmp_path, caplog):
    import jax

    members = [member(tmp_path / str(i), seed=i, **{PEAK: 1e-3 * (i + 1)}) for i in range(6)]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        with Signals() as signals:
            for chunk in (members[:3], members[3:]):
                lanes.train(chunk, 3, signals)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert len([line for line in compiled if "train_step" in line]) == 1, compiled


@pytest.mark.slow
def test_runs_that_were_broken_off_at_different_steps_go_on(tmp_path):
    """As a kill leaves them between the saves of two lanes: they go on in the same program, with the same bits."""
    train([member(tmp_path / str(i), seed=i) for i in range(3)], 3)
    expected = [(rows(tmp_path / str(i)), params(tmp_path / str(i))) for i in range(3)]
    for i, kept in ((0, 8), (1, 4)):
        for step in checkpoints(tmp_path / str(i)):
            if step > kept:
                shutil.rmtree(tmp_path / str(i) / "checkpoints" / str(step))
        (tmp_path / str(i) / "status.json").unlink()
    train([member(tmp_path / str(i), seed=i) for i in range(3)], 3)
    for i, (known, values) in enumerate(expected):
        assert status(tmp_path / str(i)) == "done"
        assert rows(tmp_path / str(i)) == known
        for path, value in values.items():
            np.testing.assert_array_equal(params(tmp_path / str(i))[path], value, err_msg=path)


def test_a_signal_saves_every_lane(tmp_path):
    members = [member(tmp_path / str(i), seed=i, steps=100_000, eval__every=0) for i in range(2)]

    def stop():
        while not (tmp_path / "1" / "metrics.jsonl").exists() or not rows(tmp_path / "1"):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with Signals() as signals:
        lanes.train(members, 2, signals)
    thread.join()
    assert signals.exit_code == 75
    assert [status(one.workdir) for one in members] == ["preempted"] * 2
    assert checkpoints(members[0].workdir)[-1] == checkpoints(members[1].workdir)[-1]


def test_what_may_share_a_program():
    base = config.resolve(tiny(model__vocab_size=257))

    def same(**changes):
        return lanes.shared(config.resolve(tiny(model__vocab_size=257, **changes))) == lanes.shared(base)

    assert same(seed=3)
    assert same(**{PEAK: 0.5})
    assert same(optimizer__scale_by_adam__b2=0.5)
    assert not same(model__dropout=0.1)  # on or off is structure
    assert not same(steps=9)
    assert not same(data__batch_size=8)
    assert not same(eval__every=2)
    assert not same(early_stopping__min_delta=0.5)
    assert lanes.digest(lanes.shared(base)) == lanes.digest(lanes.shared(base))


def test_a_run_that_may_roll_back_has_no_neighbours():
    cfg = config.resolve(tiny(model__vocab_size=257, divergence__rollback_z=5.0))
    assert lanes.most(cfg) == 1
    assert lanes.most(config.resolve(tiny(model__vocab_size=257))) > 100


@pytest.mark.parametrize(
    ("runs", "width", "devices", "even"),
    [
        (5, 4, 1, 3),
        (65, 64, 1, 33),
        (4, 4, 1, 4),
        (3, 8, 1, 3),
        (1, 1, 1, 1),
        (6, 4, 4, 4),  # 3 lanes are no four devices' work
        (10, 8, 8, 8),
        (65, 64, 8, 40),
        (3, 2, 8, 2),
        (1, 1, 8, 1),
    ],
)
def test_chunks_are_even_and_use_all_devices(monkeypatch, runs, width, devices, even):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert lanes.even(runs, width) == even


def test_the_number_of_lanes_is_decided_by_timing(tmp_path, monkeypatch):
    members = [member(tmp_path / str(i), seed=i).prepared for i in range(6)]
    said, per_call = [], {0: 1.0, 2: 1.2, 4: 3.0}
    monkeypatch.setattr(lanes, "seconds_per_step", lambda members, width: per_call[width])
    assert lanes.choose(members, said.append) == 2
    assert len(said) == 2
    per_call[2] = 2.1
    assert lanes.choose(members, said.append) == 1


@pytest.mark.parametrize(("count", "chosen"), [(1, 2), (2, 4), (4, 4), (8, 8)])
def test_of_several_devices_all_are_used(tmp_path, monkeypatch, count, chosen):
    members = [member(tmp_path / str(i), seed=i).prepared for i in range(6)]
    monkeypatch.setattr(jax, "device_count", lambda: count)
    # as long as the lanes that a device has, and a little less for two of them
    seconds = {1: 1.0, 2: 1.9, 3: 3.1, 4: 4.1}

    def times(members, width):
        return seconds[-(-max(width, 1) // math.gcd(max(width, 1), count))]

    monkeypatch.setattr(lanes, "seconds_per_step", times)
    assert lanes.choose(members, lambda _: None) == chosen


def test_lanes_that_do_not_fit_are_not_chosen(tmp_path, monkeypatch):
    members = [member(tmp_path / str(i), seed=i).prepared for i in range(6)]

    def seconds(members, width):
        if width == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
        return 1.0

    monkeypatch.setattr(lanes, "seconds_per_step", seconds)
    said = []
    assert lanes.choose(members, said.append) == 2
    assert said[-1] == "4 lanes do not fit the memory"


@pytest.mark.parametrize("width", [0, 2])
def test_a_step_is_timed(tmp_path, width):
    members = [member(tmp_path / str(i), seed=i, steps_per_call=2).prepared for i in range(width or 1)]
    assert 0 < lanes.seconds_per_step(members, width) < 10


DEVICES = """
import sys, jax
from pathlib import Path
from jaxlm.ablation import lanes
from jaxlm.training import steps
from jaxlm.training.signals import Signals
from tests.ablation.small import member
members = [member(Path(sys.argv[1]) / str(i), seed=i, model__dropout=0.1) for i in range(4)]
with Signals() as signals:
    lanes.train(members, 4, signals)
print(steps.build(members[0].prepared.config, 4).mesh.size)
"""


def test_no_lane_counts_what_is_done_for_another_as_time_of_its_steps(tmp_path, monkeypatch):
    now, fetch, evaluate = [0.0], Steps.fetch, Steps.evaluate

    def waiting(self, *given):
        now[0] += 1.0
        return fetch(self, *given)

    def evaluating(self, *given):
        now[0] += 100.0
        return evaluate(self, *given)

    monkeypatch.setattr(Steps, "fetch", waiting)
    monkeypatch.setattr(Steps, "evaluate", evaluating)
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    train([member(tmp_path / str(i), seed=i, steps=12, eval__every=3, log__every=1) for i in range(3)], 3)
    each = [
        [row.get("throughput/step_ms") for row in read_jsonl(tmp_path / str(i) / "metrics.jsonl")] for i in range(3)
    ]
    assert each[0] == each[1] == each[2] and {time for time in each[0] if time} == {1000.0}


def test_lanes_are_charged_all_of_the_energy_together(tmp_path, monkeypatch):
    counter = itertools.count(step=6.0)
    latest = []
    meter = energy.Meter("a counter", lambda: latest.append(next(counter)) or latest[-1])
    monkeypatch.setattr(energy, "_rapl", lambda stack: meter)
    monkeypatch.setattr(energy, "_IDLE_SECONDS", 0.0)
    train([member(tmp_path / str(i), seed=i) for i in range(4)], 4)
    said = [re.findall(r"used (.*) J, ", (tmp_path / str(i) / "log.txt").read_text()) for i in range(4)]
    assert sum(float(one) for (one,) in said) == pytest.approx(latest[-1] - latest[2], rel=0.05)


@pytest.mark.slow
def test_a_lane_that_has_ended_is_charged_nothing_of_the_others(tmp_path, monkeypatch):
    counter = itertools.count(step=6.0)
    monkeypatch.setattr(energy, "_rapl", lambda stack: energy.Meter("a counter", counter.__next__))
    monkeypatch.setattr(energy, "_IDLE_SECONDS", 0.0)
    patience = {"early_stopping.patience": 1, "early_stopping.min_delta": 0.01, "steps": 60, "eval.every": 6}
    train([member(tmp_path / "still", **patience, **{PEAK: 1e-9}), member(tmp_path / "on", **patience)], 2)
    assert status(tmp_path / "still") == "stopped early"
    used = float(re.findall(r"used (.*) J, ", (tmp_path / "still" / "log.txt").read_text())[0])
    assert used < 1.5 * read_jsonl(tmp_path / "still" / "metrics.jsonl")[-2]["energy/kwh"] * energy.JOULES_PER_KWH


@pytest.mark.parametrize("kind", ["counter", "off"])
def test_the_joules_of_a_step(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(lanes, "_MEASURED", 0.01)
    monkeypatch.setattr(energy, "_IDLE_SECONDS", 0.0)
    one = member(tmp_path, log__energy=kind).prepared
    reads = itertools.count(step=50.0)
    monkeypatch.setattr(energy, "_rapl", lambda stack: energy.Meter("a counter", reads.__next__))
    if kind == "off":
        with pytest.raises(ConfigError, match="joules can't be kept: log.energy='off'"):
            lanes.joules_per_step(one)
    else:
        assert 0 < lanes.joules_per_step(one) <= 50


@pytest.mark.slow
def test_lanes_are_divided_over_devices(tmp_path):
    for count in (1, 2):
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(count)}
        command = [sys.executable, "-c", DEVICES, str(tmp_path / str(count))]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(count)
    for i in range(4):
        for one, two in zip(rows(tmp_path / "1" / str(i)), rows(tmp_path / "2" / str(i)), strict=True):
            assert one == pytest.approx(two, rel=1e-4)
