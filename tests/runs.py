"""Runs of their own processes, and what they leave in their directories."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm import config
from jaxlm.telemetry.writers import read_jsonl
from tests.tiny import tiny

ROOT = Path(__file__).parents[1]


def rows(workdir):
    """metrics.jsonl without what depends on the clock."""
    clock = ("time", "throughput/")
    read = read_jsonl(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in read]


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def start(workdir, devices=1, **changes):
    """A training process of its own, on so many devices."""
    text = config.to_json(config.resolve(tiny(**changes)))
    script = (
        "import sys, jaxlm; from jaxlm import config, errors\n"
        "sys.exit(errors.exit_code(lambda: jaxlm.train(config.from_json(sys.argv[1]), sys.argv[2]).exit_code))"
    )
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", script, text, str(workdir)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)


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
