import gzip
import json

import jax
import pytest

import jaxlm
from jaxlm.telemetry.profile import Profile
from tests.tiny import tiny


@pytest.fixture
def traced(monkeypatch):
    """What was started and stopped."""
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: found.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


def calls(profile, counts):
    for count in counts:
        profile.before_call()
        profile.after_call(count, ())


@pytest.mark.parametrize(
    ("steps", "counts", "events"),
    [
        (0, [1] * 9, []),
        (3, [1] * 9, ["start", "stop"]),
        (3, [4, 4, 4], ["start", "stop"]),
        (3, [1, 1], []),  # over before it begins
        (3, [1, 1, 1], ["start"]),
    ],
)
def test_it_begins_when_all_is_compiled_and_ends_after_its_steps(traced, tmp_path, steps, counts, events):
    said = []
    profile = Profile(steps, tmp_path, said.append)
    calls(profile, counts)
    assert traced == events
    profile.close()
    assert traced == ["start", "stop"][: len(traced)] and len(traced) in (0, 2)
    if steps and not events:
        assert said == ["warning: no profile: it begins with call 3 of a run, which had 2"]
    else:
        assert len(said) == len(traced) / 2


@pytest.mark.parametrize("call", ["start_trace", "stop_trace"])
def test_a_profile_that_fails_stops_no_run(monkeypatch, traced, tmp_path, call):
    def fails(*_, **__):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(jax.profiler, call, fails)
    said = []
    calls(Profile(1, tmp_path, said.append), [1, 1, 1, 1])
    assert said == ["warning: no profile: RuntimeError: no room"]


def test_a_run_with_a_profile(tmp_path):
    jaxlm.train(tiny(log__profile=2, eval__every=0), tmp_path)
    (file,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any("train_step" in event.get("name", "") for event in events)
    assert "profile: " in (tmp_path / "log.txt").read_text()
