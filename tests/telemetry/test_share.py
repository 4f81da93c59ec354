import time

import pytest

from jaxlm.telemetry.energy import JOULES_PER_KWH, Meter
from jaxlm.telemetry.share import Share


class Counter:
    joules = 0.0

    def __call__(self):
        return self.joules


def test_a_run_alone_is_charged_all_and_its_tokens_what_steps_used():
    counter = Counter()
    share = Share(Meter("", counter, idle=3.0), lambda: 1, 10.0, 500.0)
    counter.joules = 100.0  # compilation
    share.stepping(True)
    counter.joules = 140.0
    share.stepping(False)
    counter.joules = 1000.0  # evaluation
    share.stepping(True)
    counter.joules = 1040.0
    found = share.metrics(tokens=40)
    kwh = 1050.0 / JOULES_PER_KWH
    assert found == pytest.approx(
        {
            "energy/joules_per_token": 2.0,
            "energy/kwh": kwh,
            "energy/gco2e": 500 * kwh,
            "energy/idle_watts": 3.0,
        }
    )
    counter.joules = 1041.0
    assert share.metrics(tokens=10)["energy/joules_per_token"] == pytest.approx(0.1)


def test_runs_side_by_side_are_charged_all_of_it_together():
    counter, going = Counter(), 4
    shares = [Share(Meter("", counter, estimated=True), lambda: going, 0.0, None) for _ in range(4)]
    counter.joules = 100.0
    assert [share.total() for share in shares] == [25.0] * 4
    going = 2
    counter.joules = 160.0
    assert sum(share.total() for share in shares[:2]) + 50.0 == 160.0
    assert shares[0].metrics(tokens=1)["energy/estimated"] == 1.0


def test_no_meter_no_metrics():
    share = Share(None, lambda: 1, 0.0, 56.0)
    share.stepping(True)
    assert share.metrics(tokens=10) == {}
    assert share.total() == 0.0


def test_a_counter_is_read_now_and_then(monkeypatch):
    reads = []
    share = Share(Meter("", lambda: reads.append(1) or 0.0), lambda: 1, 0.0, None)
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now + 30)
    share.tick()
    assert len(reads) == 1
    monkeypatch.setattr(time, "perf_counter", lambda: now + 61)
    share.tick()
    assert len(reads) == 2
