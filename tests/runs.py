"""Runs of their own processes, and what they leave in their directories."""

import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm import config, config_json
from jaxlm.telemetry.writers import read_jsonl
from tests.tiny import tiny

ROOT = Path(__file__).parents[1]
THOROUGH = os.environ.get("JAXLM_TEST_THOROUGH") == "1"
"""Whether to try chance more often."""
_NUMBERS = itertools.count()


def rows(workdir):
    """metrics.jsonl without what depends on the clock."""
    clock = ("time", "throughput/", "energy/")
    read = read_jsonl(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in read]


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def start(workdir, devices=1, **changes):
    """A training process of its own, on so many devices."""
    text = config_json.to_json(config.resolve(tiny(**changes)))
    script = (
        "import sys, jaxlm; from jaxlm import config_json, errors\n"
        "sys.exit(errors.exit_code(lambda: jaxlm.train(config_json.from_json(sys.argv[1]), sys.argv[2]).exit_code))"
    )
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", script, text, str(workdir)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def start_together(workdir, number, devices=1, alter=lambda i: "", patch="", **changes):
    """So many training processes that meet, each with so many devices, by way of `python -m jaxlm.main`.

    Args:
      alter: for the process of a number, flags of its own.
      patch: Python that all execute before they meet.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    text = config_json.to_json(config.resolve(tiny(**changes)))
    file = workdir.with_name(f"{workdir.name}-{next(_NUMBERS)}.py")
    get_config = f"def get_config(arg=''):\n    return config_json.from_json({text!r})\n"
    file.write_text(f"from jaxlm import config_json\n{patch}\n\n{get_config}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "jaxlm.main", f"--config={file}", f"--workdir={workdir}"]
    command += [f"--coordinator_address={address}", f"--num_processes={number}"]
    return [
        subprocess.Popen(
            [*command, f"--process_id={i}", *alter(i).split()],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
        )
        for i in range(number)
    ]


def ended(processes, seconds=240):
    """(exit code, what it said) of each."""
    said = [process.communicate(timeout=seconds)[1] for process in processes]
    return [(process.returncode, text.decode()) for process, text in zip(processes, said, strict=True)]


def wait_for_step(workdir, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.stderr.read().decode()}")
        path = workdir / "metrics.jsonl"
        if path.exists() and any(row["step"] >= step for row in read_jsonl(path)):
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} never came")


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["jaxlm.training.loop"])


class Life:
    """A training process that is forked from one that has imported all, so that many lives take little time."""

    def __init__(self, workdir, **changes):
        self._said = workdir.with_name(f"{workdir.name}.{next(_NUMBERS)}.err")
        text = config_json.to_json(config.resolve(tiny(**changes)))
        self._process = _CONTEXT.Process(target=_live, args=(text, workdir, self._said))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds):
        """The exit code, or None where it lives on; minus its number for a signal."""
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number):
        os.kill(self.pid, number)

    def said(self):
        """What it wrote to stderr."""
        return self._said.read_text() if self._said.exists() else ""


def _live(text, workdir, said):
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, sys.stderr.fileno())
    import jaxlm
    from jaxlm import errors

    sys.exit(errors.exit_code(lambda: jaxlm.train(config_json.from_json(text), workdir).exit_code))
