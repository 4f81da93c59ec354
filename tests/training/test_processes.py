import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

import jaxlm
from jaxlm.errors import ConfigError
from jaxlm.telemetry.energy import Meter
from jaxlm.training import processes, watch
from tests.runs import ROOT, checkpoints, ended, rows, start_together, wait_for_step
from tests.tiny import tiny

FIELDS = {
    "steps": 40,
    "model__num_heads": 4,
    "model__dropout": 0.1,
    "data__batch_size": 8,
    "eval__every": 20,
    "checkpoint__every": 8,
    "log__every": 1,
    "optimizer__scale_by_learning_rate": {"peak": 1e-3, "schedule": "constant"},  # whatever the number of steps
}


def losses(workdir):
    return {(row["step"], name): row[name] for row in rows(workdir) for name in row if name.endswith("/loss")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses by step and name, of a run of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    jaxlm.train(tiny(**FIELDS, parallel__data=1), workdir)
    return losses(workdir)


def assert_like(undisturbed, workdir):
    found = losses(workdir)
    np.testing.assert_allclose([found.pop(key) for key in undisturbed], list(undisturbed.values()), rtol=1e-4)
    assert not found


@pytest.mark.slow
def test_four_processes_and_then_two_are_the_run_of_one(tmp_path, undisturbed):
    workdir = tmp_path / "run"
    arrangement = {"parallel__fsdp": 2, "parallel__tensor": 2}
    four = ended(start_together(workdir, 4, **FIELDS | arrangement | {"steps": 8, "eval__every": 0}))
    assert [code for code, _ in four] == [0, 0, 0, 0], four
    assert checkpoints(workdir) == [8]
    assert "4 x cpu" in four[0][1] and not any("4 x cpu" in said for _, said in four[1:])
    two = ended(start_together(workdir, 2, devices=2, **FIELDS))
    assert [code for code, _ in two] == [0, 0], two
    assert "resumed at step 8" in two[0][1]
    assert_like(undisturbed, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_the_same_command_goes_on(tmp_path, undisturbed, victim):
    workdir = tmp_path / "run"
    patch = "from jaxlm.training import watch\nwatch.SILENCE = 6\n"
    both = start_together(workdir, 2, patch=patch, **FIELDS | {"steps": 100_000})
    wait_for_step(workdir, 20, both[0])  # the save at 8 is whole by then
    both[victim].kill()
    code, said = ended(both)[1 - victim]
    assert code == 75
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and f"lost process {victim}" in last and "run the same command on all" in last
    if victim:  # whoever was lost, what goes on is the same
        return
    again = ended(start_together(workdir, 2, **FIELDS))
    assert [code for code, _ in again] == [0, 0], again
    begun = int(re.search(r"resumed at step (\d+)", again[0][1])[1])
    assert 8 <= begun < FIELDS["steps"]
    assert_like(undisturbed, workdir)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    workdir = tmp_path / "run"
    both = start_together(workdir, 2, **FIELDS | {"steps": 100_000, "eval__every": 0})
    wait_for_step(workdir, 10, both[0])
    both[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in ended(both)] == [75, 75]
    assert max(checkpoints(workdir)) == max(row["step"] for row in rows(workdir))


@pytest.mark.slow
def test_a_save_that_takes_the_first_process_longer_than_a_silence_is_waited_for(tmp_path):
    workdir = tmp_path / "run"
    patch = (
        "import time\nfrom jaxlm.training import manifest, watch\nwatch.SILENCE, write = 3, manifest.write\n"
        "def slow(*args, **kwargs):\n    time.sleep(5)\n    write(*args, **kwargs)\nmanifest.write = slow\n"
    )
    both = ended(start_together(workdir, 2, patch=patch, **FIELDS | {"steps": 4, "eval__every": 0}))
    assert [code for code, _ in both] == [0, 0], both
    assert json.loads((workdir / "status.json").read_text())["status"] == "done"
    assert (workdir / "checkpoints/4/manifest.json").exists()


@pytest.mark.slow
def test_another_config_is_found_at_the_start_and_named_by_all(tmp_path):
    workdir = tmp_path / "run"
    both = ended(start_together(workdir, 2, alter=lambda i: "--config.model.dropout=0.2" if i else "", **FIELDS))
    assert [code for code, _ in both] == [2, 2]
    for _, said in both:
        assert "a config other than process 0's: model.dropout is 0.2, there 0.1" in said.splitlines()[-1]
    assert "process 1 of 2" in both[0][1].splitlines()[-1]
    assert not workdir.exists()


MEET = """
import sys
from jaxlm import errors
from jaxlm.training import processes, watch
from jaxlm.training.meeting import asked
processes.MEETING = 3
def meet():
    with processes.joined(asked(*eval(sys.argv[1]))):
        print(processes.first_does(lambda: "said by the first"), processes.count(), processes.first(), file=sys.stderr)
    return 0
sys.exit(errors.exit_code(meet))
"""


def meet(flags, **environment):
    command = [sys.executable, "-c", MEET, repr(flags)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | environment)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def slurm(index, port):
    job = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost"}
    return job | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def open_mpi(index, port):
    uri = f"{port << 12}.0;tcp://127.0.0.1:1"
    ranks = {"OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index)}
    return {"OMPI_MCA_orte_hnp_uri": uri, "OMPI_COMM_WORLD_SIZE": "2"} | ranks


def open_mpi_5(index, port):
    return {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(index)}


def test_a_launcher_that_does_not_tell_all_asks_for_flags():
    [(code, said)] = ended([meet((None, None, None), **open_mpi_5(0, 0))])
    assert code == 2
    assert "this process has not met the others" in said and "give --coordinator_address" in said


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_a_launcher_brings_processes_together(launcher):
    number = free_port() % 4096  # of which JAX makes a port from 61440 on
    both = ended([meet((None, None, None), **launcher(index, number)) for index in range(2)])
    assert [code for code, _ in both] == [0, 0], both
    assert "said by the first 2 True" in both[0][1] and "said by the first 2 False" in both[1][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (0, "process 0 of 2 has not met all others at 127.0.0.1:"),
        (1, "no coordinator answers at 127.0.0.1:"),
    ],
)
def test_a_process_that_meets_no_other_says_what_to_look_at(index, message):
    [(code, said)] = ended([meet((f"127.0.0.1:{free_port()}", 2, index))])
    assert code == 2
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and message in last and "within 3 s" in last and "port open" in last


def test_a_process_alone_does_all_itself():
    assert processes.count() == 1 and processes.first()
    assert processes.first_does(lambda: {"a": 1}) == {"a": 1}
    with processes.in_turn():
        pass
    processes.agree("versions", processes.versions())


def test_facts_that_differ_are_named(monkeypatch):
    monkeypatch.setattr(processes, "first_does", lambda call: call() | {"jax": "0.1", "more": 1})
    with pytest.raises(ConfigError, match="versions other than process 0's: jax is '0.2', there '0.1'; more is None"):
        processes.agree("versions", {"jax": "0.2", "numpy": "2"})


def test_versions_are_of_what_is_installed():
    import jax

    found = processes.versions()
    assert found["jax"] == jax.__version__ and found["python"].startswith(f"{sys.version_info.major}.")


class Store:
    """Of keys and values, as the coordinator's."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]


@pytest.mark.parametrize(("whole_host", "total"), [(False, 5.0), (True, 3.0)])
def test_the_first_process_sums_the_joules_of_all(monkeypatch, whole_host, total):
    import jax

    store = Store()
    monkeypatch.setattr(watch, "store", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    read = {}
    for index, joules in [(1, 2.0), (0, 3.0)]:
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        meter = Meter("a counter", lambda joules=joules: joules, idle=5.0, whole_host=whole_host)
        summed = processes.summed(meter)
        assert summed.idle is None  # of the others it is not known
        read[index] = summed.read()
    assert read == {1: 2.0, 0: total}
    assert processes.summed(None) is None


def test_a_process_alone_keeps_its_meter():
    meter = Meter("a counter", lambda: 1.0)
    assert processes.summed(meter) is meter
