import math

import jax
import numpy as np
import pytest

from jaxlm import files
from jaxlm.errors import ConfigError
from jaxlm.training import memory, throughput
from jaxlm.training.throughput import FIELDS, Found, Tried
from tests.tiny import batch, resolved, tiny

WIDE = dict(data__batch_size=16, model__context_length=16)
OWN = (1, "none", True, 1, "auto")


def climb(cost, room=math.inf, deadline=math.inf, **changes):
    """A search where a way takes `cost(micro_batches, remat, unroll, chunks, attention)` = (bytes, seconds)."""
    run = []

    def timer(values):
        needs, seconds = cost(*values)
        if needs > room:
            return Tried(values, needs, 1.0, None, "too much")
        run.append(values)
        return Tried(values, needs, 1.0, seconds, "")

    cfg = resolved(**WIDE | {"model__unroll": True, "model__loss_chunks": 1} | changes)
    return throughput._climb(cfg, timer, deadline, lambda _: None), run


def cost(micro_batches, remat, unroll, chunks, attention):
    """Fastest with 4 micro-batches, "dots", a loop, and the loss in one piece."""
    needs = 100 / micro_batches + {"none": 50, "dots": 20, "block": 5}[remat] + 10 / max(chunks, 0.5)
    slow = abs(math.log2(micro_batches) - 2) + {"none": 1, "dots": 0, "block": 2}[remat] + unroll + abs(chunks - 1)
    return needs, 1 + slow


def test_the_fastest_way_is_found():
    found, _ = climb(cost)
    assert found.best.values == (4, "dots", False, 1, "auto")
    assert found.tried[0].values == OWN
    assert found.overrides() == {"data.micro_batches": 4, "model.remat": "dots", "model.unroll": False}
    assert found.tokens == 256 and not found.left and not found.cached
    wanted = "--config.data.micro_batches=4 --config.model.remat=dots --config.model.unroll=False"
    assert throughput.flags(found) == wanted and throughput.describe(found).endswith(wanted)


def test_what_does_not_fit_is_never_run():
    found, run = climb(cost, room=46)
    assert all(cost(*values)[0] <= 46 for values in run)
    assert found.best.values == (8, "dots", False, 1, "auto")
    assert {one.why for one in found.tried if one.seconds is None} == {"too much"}


def test_from_a_config_that_does_not_fit_it_goes_where_less_is_needed():
    found, run = climb(cost, room=18)
    assert run and found.best.values[:2] == (16, "block")
    with pytest.raises(ConfigError, match="no way to compute a step fits a device: the least that was found takes"):
        climb(cost, room=1)


def test_a_difference_that_may_be_chance_changes_nothing():
    found, _ = climb(lambda *values: (1, 1.0 if values == OWN else 0.99))
    assert found.best.values == OWN and found.overrides() == {}
    assert "the config's own way is the fastest" in throughput.describe(found)


def test_time_that_runs_out_is_told():
    found, run = climb(cost, deadline=0)
    assert found.left and run == [OWN]
    assert "warning: time ran out" in throughput.describe(found)


def test_time_that_runs_out_before_anything_fits_is_no_verdict():
    found, run = climb(cost, room=18, deadline=0)
    assert found.left and run == [] and found.best.seconds is None and found.overrides() == {}
    lines = throughput.describe(found).splitlines()
    assert "none of these fits" in lines and "warning: time ran out" in lines[-1]


def test_what_time_cut_short_is_not_kept(monkeypatch, tmp_path):
    one = Tried(OWN, 1, 1.0, 1.0, "")
    for left in (True, False):
        monkeypatch.setattr(throughput, "_climb", lambda *_, left=left: Found(one, [one], 64, None, left, False))
        search(monkeypatch, data__cache_dir=str(tmp_path))
        assert (tmp_path / "throughput").exists() == (not left)


def test_attention_is_varied_where_there_is_a_choice(monkeypatch):
    assert {one.values[-1] for one in climb(cost)[0].tried} == {"auto"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert {one.values[-1] for one in climb(cost)[0].tried} == {"auto", "blockwise"}


def search(monkeypatch, **changes):
    monkeypatch.setattr(throughput, "_SECONDS", 0.0)
    said = []
    return throughput.search(tiny(**changes), say=said.append), said


@pytest.mark.slow
def test_ways_are_timed_and_kept(monkeypatch, tmp_path):
    fields = dict(data__cache_dir=str(tmp_path), data__batch_size=2, model__context_length=8)
    found, said = search(monkeypatch, **fields)
    assert said == [throughput.line(one) for one in found.tried]
    assert all(one.seconds > 0 and one.bytes > 0 and one.compile > 0 for one in found.tried)
    assert {one.values[0] for one in found.tried} == {1, 2}
    assert {one.values[1] for one in found.tried} == {"none", "dots", "block"}
    assert found.mfu is None  # of a CPU the peak is not known
    table = throughput.describe(found).splitlines()
    assert len([row for row in table if "auto" in row]) == len(found.tried)

    again, said = search(monkeypatch, **fields)
    assert again == found._replace(cached=True) and said == []
    assert "found before" in throughput.describe(again)

    monkeypatch.setattr(throughput, "_climb", lambda *_: found)
    assert not search(monkeypatch, **fields | {"data__batch_size": 1})[0].cached
    for kept in (tmp_path / "throughput").iterdir():
        kept.write_text("{")
    assert not search(monkeypatch, **fields)[0].cached


def test_packed_rows_are_timed_as_such():
    cfg = resolved(data__batch_size=2, data__pack=True)
    packed = batch(2) | {name: np.zeros((2, 16), np.int32) for name in ("segment_ids", "positions")}
    tried = throughput._Timer(cfg, packed)((1, "none", False, 1, "auto"))
    assert tried.seconds and throughput._key(cfg) != throughput._key(resolved(data__batch_size=2))


def test_a_step_that_needs_more_than_there_is_is_not_run(monkeypatch):
    cfg = resolved(data__batch_size=4)
    monkeypatch.setattr(memory, "limit", lambda: 1000)
    timer = throughput._Timer(cfg, None)
    tried = timer((1, "none", False, 1, "auto"))
    assert tried.seconds is None and tried.bytes > 1000 and tried.why == "more than 0.0 GB"


def test_a_device_that_is_full_after_all_is_no_end(monkeypatch):
    timer = throughput._Timer(resolved(), None)

    def full(values):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(timer, "_tried", full)
    assert timer(OWN) == Tried(OWN, None, None, None, "out of memory")

    def broken(values):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(timer, "_tried", broken)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        timer(OWN)


def test_a_cache_that_can_not_be_written_is_warned_of(monkeypatch, tmp_path):
    one = Tried(OWN, 1, 1.0, 1.0, "")
    monkeypatch.setattr(throughput, "_climb", lambda *_: Found(one, [one], 64, None, False, False))

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "atomic", full)
    found, said = search(monkeypatch)
    assert found.best == one and "can't be kept" in said[0] and "No space left" in said[0]


@pytest.mark.parametrize(
    ("changes", "seconds", "message"),
    [({"parallel__mode": "pmap"}, 1, "with parallel.mode='jit'"), ({}, 0, "--seconds=0; expected more than 0")],
)
def test_mistakes(changes, seconds, message):
    with pytest.raises(ConfigError, match=message):
        throughput.search(tiny(**changes), seconds=seconds)


def test_the_table():
    slow, fast = Tried(OWN, 2 * 10**9, 3.25, 0.2, ""), Tried((2, *OWN[1:]), 10**9, 4.0, 0.1, "")
    too_large = Tried((1, "block", *OWN[2:]), 9 * 10**10, 4.0, None, "more than 80.0 GB")
    lines = throughput.describe(Found(fast, [slow, fast, too_large], 1000, 0.25, False, False)).splitlines()
    assert lines[0].split()[0] == FIELDS[0].rpartition(".")[2]
    assert lines[1].split() == ["2", "none", "True", "1", "auto", "1.00", "4.0", "100.0", "10,000"]
    assert lines[3].endswith("more than 80.0 GB")
    assert lines[4] == "2.00 times as fast as the config: --config.data.micro_batches=2"
    assert lines[5] == "MFU 25.0%"
