import errno
import fcntl
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


def test_nfs_locks_a_file_only_where_it_is_open_for_writing(tmp_path, monkeypatch):
    """By `man 2 flock`: it emulates the lock there by one of fcntl's."""
    real = fcntl.flock

    def flock(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock.check(tmp_path)
    with lock.held(tmp_path), pytest.raises(DataError, match=f"process {os.getpid()} on host"):
        lock.check(tmp_path)
    lock.check(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path):
        lock.check(tmp_path)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and f"{tmp_path} has no locks: {os.strerror(number)}; start no second" in said
