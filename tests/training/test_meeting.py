import pytest

from jaxlm.errors import ConfigError
from jaxlm.training.meeting import Meeting, asked

LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_flags_are_a_meeting():
    assert asked("node1:29500", 4, 3) == Meeting("node1:29500", 4, 3)
    assert asked("[::1]:29500", 2, 0) == Meeting("[::1]:29500", 2, 0)


def test_without_flags_and_launcher_a_process_is_alone():
    assert asked(None, None, None) is None
    assert asked(None, 1, None) is None


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_of_several_tells_the_rest(monkeypatch, name):
    monkeypatch.setenv(name, "8")
    assert asked(None, None, None) == Meeting(None, None, None)
    assert asked(None, 1, None) is None  # one beside others, on its own
    monkeypatch.setenv(name, "1")
    assert asked(None, None, None) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("node1:29500", None, None), "--num_processes and --process_id must be given with --coordinator_address"),
        ((None, 2, 0), "--coordinator_address must be given with --num_processes, --process_id"),
        (("node1:29500", 2, 2), "--process_id=2 of --num_processes=2; expected from 0 to one less"),
        (("node1:29500", 2, -1), "--process_id=-1 of"),
        (("node1:29500", 0, 0), "--process_id=0 of --num_processes=0"),
        (("node1", 2, 0), "--coordinator_address is 'node1'; expected HOST:PORT of process 0"),
        (("node1:http", 2, 0), "expected HOST:PORT"),
        ((":29500", 2, 0), "expected HOST:PORT"),
        (("node1:99999", 2, 0), "expected HOST:PORT"),
    ],
)
def test_flags_that_make_no_meeting_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        asked(*flags)
