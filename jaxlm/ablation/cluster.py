"""Trials on a Ray cluster: each call's worth of lanes is a task, tried again where its worker or its node is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import socket
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.ablation import outcomes
from jaxlm.ablation.runner import Execute, Group, Stopped, folder, train_group
from jaxlm.ablation.study import Trial
from jaxlm.errors import PREEMPTED, ConfigError, DataError, JaxlmError
from jaxlm.telemetry import writers
from jaxlm.telemetry.board import Board
from jaxlm.training import host, lock, rundir
from jaxlm.training.signals import Signals

_RETRIES = 10  # of a task whose worker died; a run goes on from its checkpoint
_LOOK = 1.0  # seconds between looks at the signals and the runs
_SAVE = 60.0  # seconds that tasks which are to stop have for their checkpoints
_LOCKED = 60.0  # seconds that a task waits for the worker before it, which is lost to Ray but may still live
_STORE = 100 * 2**20  # bytes of memory for objects, of which there are few
_CONNECT = 5.0  # seconds
_TAIL = 2**14  # bytes of a run's metrics that are looked at


def on_ray(address: str = "") -> Execute:
    """Trains groups as tasks of Ray, with a GPU each where the cluster has some, else with a CPU.

    The study's directory must be the same one on all nodes, and jaxlm installed there. Workers get NPROC and the
    variables of JAX and XLA as they are here. Ray is shut down after each call, unless it was up before.

    Args:
      address: of a cluster that runs, such as "auto" or "10.0.0.1:6379"; "": one of this machine, for this study.

    Raises:
      ConfigError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError("--executor=ray needs Ray, which is not installed: pip install jaxlm[cluster]") from error
    environment = _environment()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for its worker, not for us

    def execute(groups: Sequence[Group], workdir: Path, board: Board, signals: Signals) -> None:
        with _connected(address):
            _run(groups, workdir.absolute(), environment, board, signals)

    return execute


def _environment() -> dict[str, str]:
    """What workers take over: what their numbers depend on, and where they find modules."""
    taken = {name: value for name, value in os.environ.items() if name == "NPROC" or name.startswith(("JAX_", "XLA_"))}
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    own = [path for path in map(os.path.abspath, sys.path) if not path.startswith(installed)]
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", **taken, "PYTHONPATH": os.pathsep.join(own)}


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address and address != "auto":
        _reach(address)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        settings |= {"include_dashboard": False, "object_store_memory": _STORE, "_node_ip_address": "127.0.0.1"}
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        with _same_handlers():
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)  # JAX; they exec
                    ray.init(address=address or "local", **settings)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(f"no Ray cluster at {address or 'this machine'}: {_line(error)}") from error
            except SystemExit:  # Ray's answer to a SIGTERM, with a code of its own
                sys.exit(PREEMPTED)
        yield


def _reach(address: str) -> None:
    """Ray itself tries for minutes."""
    import ray

    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--address={address} is no address of a Ray cluster; expected 'auto' or 'host:port'")
    host = host.strip("[]")
    if host in ("localhost", "127.0.0.1"):
        host = ray.util.get_node_ip_address()  # what Ray takes it for
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from error


@contextlib.contextmanager
def _same_handlers() -> Iterator[None]:
    """Ray sets a handler of SIGTERM, where `Signals` has one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _run(groups: Sequence[Group], workdir: Path, environment: dict[str, str], board: Board, signals: Signals) -> None:
    import ray

    resources = ray.cluster_resources()
    if not resources.get("CPU"):
        board.say("warning: the Ray cluster has no CPU for tasks; waiting for some")
    task = ray.remote(
        num_cpus=1,
        num_gpus=1 if resources.get("GPU") else 0,
        max_retries=_RETRIES,
        runtime_env={"env_vars": environment},
    )(_task)
    stepping, signals.stepping = signals.stepping, True  # a signal is looked for here
    waiting: dict[Any, Group] = {}
    with contextlib.ExitStack() as stack:

        def end() -> None:
            _cancel(list(waiting))
            signals.stepping = stepping

        stack.callback(end)

        def submit(chunk: Group) -> None:
            try:
                waiting[task.remote(chunk, str(workdir), board.metric)] = chunk
            except (TypeError, pickle.PicklingError) as error:
                raise ConfigError(f"{chunk.trials[0].title} can't be sent to a worker: {_line(error)}") from error

        shown = {}
        for group in groups:
            for chunk in group.parts():
                submit(chunk)
                for one in chunk.trials:
                    shown[one.address] = stack.enter_context(_Shown(one, folder(workdir, one), board))
        while waiting:
            over, _ = ray.wait(list(waiting), timeout=_LOOK)
            if signals.caught:
                raise Stopped(signals.exit_code)
            for reference in over:
                chunk = waiting.pop(reference)
                try:
                    error, lines = ray.get(reference)
                except ray.exceptions.RayTaskError:
                    raise  # a mistake of ours, with the worker's traceback
                except ray.exceptions.RayError as lost:
                    raise DataError(f"{chunk.trials[0].title} failed on the cluster: {_line(lost)}") from lost
                for line in lines:
                    board.say(line)
                if isinstance(error, Stopped):  # someone else stopped the worker
                    submit(chunk)
                elif error:
                    raise error
                else:
                    for one in chunk.trials:
                        shown[one.address].close()
            for chunk in waiting.values():
                for one in chunk.trials:
                    shown[one.address].look()


def _cancel(references: list[Any]) -> None:
    """Ends tasks; those under way may save."""
    import ray

    for reference in references:
        ray.cancel(reference)
    if references:
        ray.wait(references, num_returns=len(references), timeout=_SAVE)


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _Shown:
    """A run in a worker, shown by what is in its directory."""

    def __init__(self, trial: Trial, where: Path, board: Board):
        self._trial, self._where, self._board = trial, where, board
        self._stack = contextlib.ExitStack()
        self._lane: Any = None

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def look(self) -> None:
        status = rundir.read_status(self._where)
        if status and status.status == "running":
            self._update(*_latest(self._where))

    def close(self) -> None:
        """Once it is over."""
        status, (step, metrics) = rundir.read_status(self._where), _latest(self._where)
        self._update(status.step if status else step, metrics)
        self._stack.close()

    def _update(self, step: int, metrics: dict[str, float]) -> None:
        if self._lane is None:
            lane = self._board.lane(self._trial.title, self._trial.config.steps, step)
            self._lane = self._stack.enter_context(lane)
        self._lane.update(step, metrics)


def _latest(where: Path) -> tuple[int, dict[str, float]]:
    """The last step of a run's metrics, and the latest of each."""
    try:
        with (where / writers.METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0, {}
    found: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # the first may be cut
            found |= writers.floats(json.loads(line))
    return int(found.get("step", 0)), found


# In a worker


class _Said(Board):
    """Keeps the lines that a person should see."""

    def __init__(self, runs: int, steps: int, metric: str):
        super().__init__(runs, steps, metric)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def _task(group: Group, workdir: str, metric: str) -> tuple[JaxlmError | None, list[str]]:
    """Trains a group; gives back the error that the user can mend, which trying again does not, and lines to say."""
    root = Path(workdir)
    trials = [one for one in group.trials if not outcomes.over(folder(root, one))]
    board = _Said(len(trials), sum(one.config.steps for one in trials), metric)
    with Signals() as signals, board:
        try:
            for one in trials:
                _await_lock(folder(root, one))
            if trials:
                host.settle()
                train_group(Group(trials, group.lanes), root, board, signals)
        except JaxlmError as error:
            return error, board.lines
        except OSError as error:
            return DataError(str(error)), board.lines
    return None, board.lines


def _await_lock(where: Path) -> None:
    """Waits until the worker that had this run, and is lost to Ray, has died.

    Raises:
      DataError: it lives on.
    """
    deadline = time.monotonic() + _LOCKED
    while True:
        try:
            return lock.check(where)
        except DataError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
