"""Whether a config's runs end with the same bits when they are killed on the way: tried in processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, config_json, tree
from jaxlm.data.batches import Batch
from jaxlm.errors import ConfigError, JaxlmError, exit_code
from jaxlm.telemetry import writers
from jaxlm.training import rundir, step
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.load import locate
from jaxlm.training.step_folders import StepFolders

KILLS = 3
_BATCHES = "batches.jsonl"
_CLOCK = ("time", "throughput/", "energy/")


class Differs(JaxlmError):
    """The killed run is not the straight one."""


class Failed(JaxlmError):
    """A run didn't get to its end, for a reason that it told; with its exit code."""

    def __init__(self, what: str, code: int):
        super().__init__(f"{what} ended with exit code {code}; see above")
        self.exit_code = code if code > 0 else 128 - code  # as a shell gives that of a signal


def verify_resume(cfg: ConfigDict | FrozenConfigDict, steps: int) -> str:
    """Runs so many steps straight, and the same steps killed `KILLS` times on the way, in a temporary folder. Those of
    a branch are counted from where it leaves its source.

    Returns:
      what was compared, as a line.

    Raises:
      Differs: names the first difference: in the batches, the metrics, the parameters or the optimizer state.
      Failed: with the exit code of a run that failed, as `loop.train` does.
      ConfigError: so few steps, or a config that no other process can be given; or no killed run had saved a step to
        go on from.
    """
    cfg = shortened(cfg, steps)
    first = cfg.steps - steps
    folder = Path(tempfile.mkdtemp(prefix="jaxlm-verify-"))
    straight, killed = folder / "straight", folder / "killed"
    saved: set[int] = set()  # where lives went on
    moments = [first + steps * (kill + 1) // (KILLS + 1) for kill in range(KILLS)]
    with contextlib.ExitStack() as leaving:
        leaving.callback(shutil.rmtree, folder)
        if code := _run(cfg, straight):
            raise Failed("the undisturbed run", code)
        for moment in moments:
            _run(cfg, killed, until=moment)
            saved.update(StepFolders(killed / rundir.CHECKPOINTS, writable=False).steps()[-1:])
        if code := _run(cfg, killed):
            leaving.pop_all()  # for a look
            raise Failed(f"the killed run, called again in {killed},", code)
        for compare in (_batches, _metrics, _state):
            if difference := next(compare(straight, killed), None):
                leaving.pop_all()
                raise Differs(f"{difference}. Both runs are in {folder}")
    if not saved - {cfg.steps}:
        raise ConfigError(f"--verify_resume={steps}: no killed run had saved a step to go on from; give more steps")
    after, at = f" after step {first}" if first else "", ", ".join(map(str, moments))
    return f"{steps} steps{after}, killed at about steps {at}: the same batches, metrics and bits"


def shortened(cfg: ConfigDict | FrozenConfigDict, steps: int) -> FrozenConfigDict:
    """The config for a run of so many steps that logs each and saves several times; of a branch, after its source's."""
    if steps <= KILLS:
        raise ConfigError(f"--verify_resume={steps}: a run that is to be killed {KILLS} times takes more steps")
    if names := config_json.objects(cfg):
        raise ConfigError(f"{next(iter(names))} is a Python object, which no other process can be given")
    source = locate(cfg.init_from).step if cfg.init_from and cfg.init_state else None
    changes = {
        "steps": (source or 0) + steps,
        "eval.every": steps // 2,
        "checkpoint.every": max(1, steps // 6),
        "early_stopping.patience": 0,
        "log.every": 1,
        "log.writers": ("jsonl",),
        "log.progress": False,
    }
    return config.resolve(config.override(cfg, changes))


def _run(cfg: FrozenConfigDict, workdir: Path, until: float = math.inf) -> int:
    """Trains in a process of its own, which is killed after a step; its exit code."""
    child = "from jaxlm.training import verify; verify.child()"
    workdir.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", child, str(workdir)], stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        with process.stdin as file:
            file.write(config_json.to_json(cfg, secrets=True).encode())
        while process.poll() is None and _last_step(workdir) < until:
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    return process.returncode


def child() -> None:
    """The process of a run: trains, and notes the sha256 of each sequence."""
    from jaxlm.training import host, loop

    cfg, workdir = config_json.from_json(sys.stdin.read()), Path(sys.argv[1])
    with (workdir / _BATCHES).open("a", encoding="utf-8") as file:

        def note(first: int, rows: Batch) -> None:
            for i in range(len(rows["inputs"])):
                row = b"".join(rows[name][i].tobytes() for name in sorted(rows))
                file.write(json.dumps([first + i, hashlib.sha256(row).hexdigest()]) + "\n")
            file.flush()

        host.settle()
        sys.exit(exit_code(lambda: loop.train(cfg, workdir, seen=note).exit_code))


def _last_step(workdir: Path) -> int:
    try:
        return max((row["step"] for row in writers.read_jsonl(workdir / writers.METRICS)), default=0)
    except OSError:
        return 0


def _batches(straight: Path, killed: Path) -> Iterator[str]:
    def read(workdir: Path) -> Iterator[tuple[int, str]]:
        for line in (workdir / _BATCHES).read_text(encoding="utf-8").splitlines():
            try:
                sequence, digest = json.loads(line)
            except ValueError:
                continue  # torn by a kill
            yield sequence, digest

    expected = dict(read(straight))
    for sequence, digest in read(killed):
        if expected.get(sequence) != digest:
            yield f"sequence {sequence} is another one in the killed run"
    for sequence in sorted(set(expected) - set(dict(read(killed)))):
        yield f"the killed run never saw sequence {sequence}"


def _metrics(straight: Path, killed: Path) -> Iterator[str]:
    def read(workdir: Path) -> list[dict[str, Any]]:
        return writers.read_jsonl(workdir / writers.METRICS)

    a, b = read(straight), read(killed)
    for one, other in zip(a, b):
        for name in sorted(one | other):
            if not name.startswith(_CLOCK) and repr(one.get(name)) != repr(other.get(name)):
                yield f"{name} of step {one['step']} is {one.get(name)!r}, in the killed run {other.get(name)!r}"
    if len(a) != len(b):
        yield f"{writers.METRICS} has {len(a)} rows, in the killed run {len(b)}"


def _state(straight: Path, killed: Path) -> Iterator[str]:
    cfg = rundir.read_config(straight)
    like = step.shapes(cfg)
    states = []
    for workdir in (straight, killed):
        with Checkpoints(workdir / rundir.CHECKPOINTS, writable=False) as checkpoints:
            checkpoints.whole(cfg.steps)
            states.append(checkpoints.restore(like, cfg.steps).state)
    for path, a, b in zip(tree.paths(like), *map(jax.tree.leaves, states), strict=True):
        a, b = (np.asarray(x if x.dtype != like.key.dtype else jax.random.key_data(x)) for x in (a, b))
        if a.tobytes() != b.tobytes():
            yield f"{path} differs in {np.sum(a != b)} of {a.size} numbers, by at most {np.max(np.abs(a - b)):.3g}"
