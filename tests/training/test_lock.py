import json
import os
import socket
import subprocess
import sys
import time

import pytest

from jaxlm.errors import DataError
from jaxlm.training import lock
from tests.runs import ROOT

HOLD = "import sys, time; from pathlib import Path; from jaxlm.training import lock\n"
HOLD += "with lock.held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_named_and_when_it_dies_its_lock_is_free(tmp_path, holder):
    for ask in (lambda: lock.check(tmp_path), lambda: lock.held(tmp_path).__enter__()):
        with pytest.raises(DataError, match=f"process {holder.pid} on host {socket.gethostname()} trains in"):
            ask()
    holder.kill()
    holder.wait()
    lock.check(tmp_path)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_second_run_from_the_command_line_hears_of_it_before_anything_slow(tmp_path, holder):
    command = [sys.executable, "-X", "importtime", "-m", "jaxlm.main", "--config=missing.py", f"--workdir={tmp_path}"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 4 and f"error: process {holder.pid} on host" in refused.stderr
    assert not [name for name in (" jax\n", " orbax", " flax") if name in refused.stderr]


def test_it_waits_out_those_who_only_look(tmp_path):
    look = "import sys; from pathlib import Path; from jaxlm.training import lock\n"
    look += f"for _ in range(2000): lock.check(Path({str(tmp_path)!r}))"
    (tmp_path / "lock").touch()
    looking = subprocess.Popen([sys.executable, "-c", look], cwd=ROOT, stderr=subprocess.DEVNULL)
    while looking.poll() is None:
        with lock.held(tmp_path):
            pass
        time.sleep(0.001)


def test_a_directory_that_is_not_there_is_made_by_the_holder_only(tmp_path):
    lock.check(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with lock.held(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").exists()
