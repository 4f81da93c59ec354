"""Suite `startup`: how long until something happens, in fresh processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.bench import machine
from experiments.bench.report import HERE, Limit, Row
from experiments.bench.timing import interleave

ROOT = HERE.parents[1]
CONFIG = "configs/shakespeare_char.py:cpu"
IMPORT, PEER_IMPORT = "import jaxlm; jaxlm.train", "import torch; from transformers import GPT2LMHeadModel"
FLAGS = {  # one step, whose row is written at once; nothing else
    **{"data.source": "stdlib", "data.tokenizer": "bytes", "steps": "1", "log.every": "1", "log.writers": "jsonl,"},
    **{"log.progress": "False", "eval.every": "0", "checkpoint.every": "0"},
}


def run(quick: bool) -> list[Row]:
    rounds = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        count = itertools.count()

        def fresh() -> Path:
            return Path(folder) / str(next(count))

        blocks = {
            "import": lambda: _run("import jaxlm"),
            "train": lambda: _run(IMPORT),
            "nothing": lambda: _run(""),
            "cold": lambda: first_step(fresh(), cache=fresh()),
            "again": lambda: first_step(fresh(), cache=warm),
        }
        peer = ""
        if machine.has("torch", "transformers"):
            peer = "PyTorch, eager"
            blocks["peer import"] = lambda: _run(PEER_IMPORT)
            blocks[peer] = lambda: _peer_first_step(fresh())
        machine.say("startup: filling the caches")
        for block in blocks.values():
            block()
        machine.say(f"startup: {rounds} rounds")
        found = interleave(blocks, rounds)
    theirs = found.get(peer)
    libraries = (PEER_IMPORT, found.get("peer import")) if peer else ("", None)
    step, cold, again = "tiny: from the command to the first step", Limit("value", "<=", 15), Limit("value", "<=", 6)
    return [
        Row("startup", "import jaxlm", "s", found["import"], limit=Limit("value", "<=", 2)),
        Row("startup", IMPORT, "s", found["train"], *libraries),
        Row("startup", "of each of these, the interpreter", "s", found["nothing"]),
        Row("startup", f"{step}, nothing cached", "s", found["cold"], peer, theirs, cold),
        Row("startup", f"{step}, tokens and programs cached", "s", found["again"], peer, theirs, again),
    ]


def _run(program: str) -> float:
    """Seconds of a whole process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - begin


def first_step(workdir: Path, cache: Path) -> float:
    """Seconds from the start of `jaxlm.main` until the first step's row is in metrics.jsonl.

    Raises:
      RuntimeError: it ended without one.
    """
    flags = [f"--config.{name}={value}" for name, value in FLAGS.items()]
    arguments = ["jaxlm.main", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    return _until(arguments, workdir / "metrics.jsonl", {"JAXLM_CACHE": str(cache)})


def _peer_first_step(file: Path) -> float:
    return _until(["experiments.bench.peer", str(file)], file)


def _until(arguments: Sequence[str], file: Path, environment: Mapping[str, str] | None = None) -> float:
    """Seconds until `python -m ...` has written to a file; then waits for its end, so that the next has the machine."""
    with tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        command = [sys.executable, "-m", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=log, stderr=log)
        seconds = 0.0
        while not seconds:
            ended = process.poll() is not None
            if file.exists() and file.stat().st_size:
                seconds = time.perf_counter() - begin
            elif ended:
                break
            else:
                time.sleep(0.005)
        if process.wait() or not seconds:
            log.seek(0)
            tail = log.read()[-2000:]
            raise RuntimeError(f"python -m {' '.join(arguments)} ended with {process.returncode}:\n{tail}")
        return seconds
