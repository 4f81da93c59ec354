"""Processes that train together stop together, whichever of them gets the signal."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT

PROCESS = """
import sys, time, jax
from jaxlm.training.signals import Signals
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
with Signals() as signals:
    for call in range(2000):
        print(call, flush=True)
        time.sleep(0.01 * (1 + int(sys.argv[2])))  # one is slower than the other
        if signals.heard():
            print("stopped", call, flush=True)
            break
sys.exit(signals.exit_code if signals.caught else 0)
"""


@pytest.mark.parametrize(("number", "receiver"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_call(number, receiver):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(i)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == b"0\n", process.stderr.read().decode()
    time.sleep(0.2)
    both[receiver].send_signal(number)
    ends = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [75, 75], ends
    last = [out.decode().splitlines()[-1] for out, _ in ends]
    assert last[0] == last[1]
    assert last[0].startswith("stopped ")


def test_a_signal_while_there_is_no_step_says_how_to_go_on():
    """As while a study times its lanes."""
    script = "import os, signal; from jaxlm.training.signals import Signals\nwith Signals(): os.kill(os.getpid(), 15)"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (75, b"preempted; run the same command to go on\n")
