"""Processes that train together, on one host or many: how they meet, agree, and end together.

All run the same program. Each reads its rows of a batch and holds its part of the state; the first one also does what
is done once: it writes metrics, logs and the lists of checkpoints. None outlives another: what ends one is told to all,
and one that falls silent is missed by the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the store of keys and values has no public name; Orbax takes it from here too

from jaxlm.errors import INTERRUPTED, PREEMPTED, ConfigError, DataError, JaxlmError
from jaxlm.telemetry.energy import Meter
from jaxlm.training.meeting import Meeting

Value = TypeVar("Value")

MEETING = 120
"""Seconds that processes wait for each other at the start."""
SILENCE = 15
"""Seconds after which a process that gives no sign of life is held for lost."""

_TICK = 1.0
_WEEK = 7 * 24 * 3600 * 1000  # milliseconds: a wait that only the end of another process ends
_ENDED = "jaxlm/ended"
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "Connection", "coordination service", "DEADLINE_EXCEEDED")
_numbers = itertools.count()


def count() -> int:
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that does what is done once."""
    return jax.process_index() == 0


def first_does(call: Callable[[], Value]) -> Value:
    """What `call` gives in the first process, in all of them: JSON values. The others wait for it.

    What it raises there ends all of them.
    """
    if count() == 1:
        return call()
    key, client = f"jaxlm/value/{next(_numbers)}", _store()
    if first():
        value = call()
        client.key_value_set(key, json.dumps(value))
        return value
    found: Value = json.loads(client.blocking_key_value_get(key, _WEEK))
    return found


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """The first process does what is inside before the others do: they may find what it left."""
    if not first():
        first_does(lambda: None)
    yield
    if first():
        first_does(lambda: None)


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same facts, which are JSON values; none goes on before all did.

    Raises:
      ConfigError: this process has others than the first; names them.
    """
    own = json.loads(json.dumps(facts))
    theirs = first_does(lambda: own)
    if different := [name for name in sorted(own | theirs) if own.get(name) != theirs.get(name)]:
        listed = "; ".join(f"{name} is {own.get(name)!r}, there {theirs.get(name)!r}" for name in different)
        raise ConfigError(f"{what} other than process 0's: {listed}. Give all processes the same")
    if count() > 1:
        _store().wait_at_barrier(f"jaxlm/agreed/{next(_numbers)}", _WEEK)


def summed(meter: Meter | None) -> Meter | None:
    """In the first process the joules of all of them, as they last read them; of what is idle nothing is known then."""
    if meter is None or count() == 1:
        return meter
    key, read, highest = (
        f"jaxlm/joules/{socket.gethostname() if meter.whole_host else jax.process_index()}",
        meter.read,
        0.0,
    )

    def all_of_them() -> float:
        nonlocal highest
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others are gone: the watch says so
            _store().key_value_set(key, repr(own := read()), allow_overwrite=True)
            found = _store().key_value_dir_get("jaxlm/joules/") if first() else [(key, repr(own))]
            highest = max(highest, sum(float(joules) for _, joules in found))
        return highest

    return meter._replace(read=all_of_them, idle=None)


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    names = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names} | {"python": sys.version.split()[0]}


@contextlib.contextmanager
def joined(meeting: Meeting) -> Iterator[None]:
    """Meets the other processes; inside, JAX sees the devices of all.

    Where the body raises, this process ends, and tells the others why: they end with its exit code. Where one is lost,
    the others end with that of preemption: the same command on all goes on.

    Raises:
      ConfigError: no coordinator answers.
    """
    who = "this process" if meeting.number is None else f"process {meeting.number} of {meeting.processes}"
    where = f" at {meeting.address}" if meeting.address else ""
    last = _LastWords(
        f"{who} has not met all others{where} within {MEETING} s: were all started, with one --num_processes and a "
        "--process_id each, and is the port open between them?",
        ConfigError.exit_code,
    )
    with last:
        if meeting.address and meeting.number:
            _reach(meeting.address)
        try:
            jax.distributed.initialize(*meeting, initialization_timeout=MEETING)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{who} has not met the others: {str(error).splitlines()[0]} If the launcher does not tell all, give "
                "--coordinator_address, --num_processes and --process_id; --num_processes=1 trains alone"
            ) from error
        last.say(f"{_name()}: lost process 0, which coordinates; {_AGAIN}", PREEMPTED)
        watch = _Watch()
        watch.start()
        try:
            yield
        except BaseException as error:
            watch.end(error)
        watch.stop()
        jax.distributed.shutdown()


_AGAIN = "run the same command on all to go on from the latest checkpoint"


def _store() -> Any:
    """Of keys and values, in the process that coordinates."""
    return distributed.global_state.client


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


def _reach(address: str) -> None:
    """Waits for the coordinator: JAX aborts where it finds none."""
    host, _, port = address.rpartition(":")
    deadline, reason = time.monotonic() + MEETING, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            reason = str(error)
        time.sleep(0.3)
    raise ConfigError(
        f"no coordinator answers at {address} within {MEETING} s ({reason}): is process 0 running there, does "
        "--coordinator_address name its host, and is the port open?"
    )


class _LastWords:
    """What JAX's runtime does not leave Python time for: it aborts the process where the coordinator is gone. In this
    context an abort says these words and ends with this exit code."""

    def __init__(self, words: str, exit_code: int):
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept: C has only its address
        self.say(words, exit_code)

    def say(self, words: str, exit_code: int) -> None:
        self._words, self._exit_code = words, exit_code

    def _aborted(self, _: int) -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"error: {self._words}\n".encode())
        os._exit(self._exit_code)

    def __enter__(self) -> _LastWords:
        set_handler = ctypes.CDLL(None).signal
        set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        self._set = functools.partial(set_handler, signal.SIGABRT)
        self._previous = self._set(ctypes.cast(self._handler, ctypes.c_void_p))
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._previous)


class _Watch:
    """A thread that gives signs of life, and ends this process when another has ended; the first one misses others."""

    def __init__(self) -> None:
        self._client = _store()
        self._own, self._stopped = jax.process_index(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._ending, self._lost = threading.RLock(), 0
        self.start, self._seen = self._thread.start, dict.fromkeys(range(count()), ("", time.monotonic()))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        for beat in itertools.count():
            try:
                if told := self._told():
                    self._leave(told["words"], told["exit_code"])
                self._client.key_value_set(f"jaxlm/alive/{self._own}", str(beat), allow_overwrite=True)
                if self._own == 0 and (lost := self._missed()):
                    self._lost = len(lost)
                    who = ", ".join(map(str, lost))
                    self._tell(f"lost process {who} of {count()}: no sign of life for {SILENCE} s; {_AGAIN}", PREEMPTED)
            except jax.errors.JaxRuntimeError:
                self._leave(f"{_name()}: lost process 0, which coordinates; {_AGAIN}", PREEMPTED)
            if self._stopped.wait(_TICK):
                return

    def _told(self) -> dict[str, Any] | None:
        try:
            told: dict[str, Any] = json.loads(self._client.key_value_try_get(_ENDED))
            return told
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def _missed(self) -> list[int]:
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get("jaxlm/alive/"):
            index = int(key.rpartition("/")[2])
            if self._seen[index][0] != beat:
                self._seen[index] = beat, now
        return [index for index, (_, when) in self._seen.items() if now - when > SILENCE]

    def _tell(self, words: str, exit_code: int) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was faster
            self._client.key_value_set(_ENDED, json.dumps({"words": words, "exit_code": exit_code}))

    def _leave(self, words: str, exit_code: int) -> NoReturn:
        """Ends this process, whatever it waits for; the first one last, since the others hear through it."""
        with self._ending:
            print(f"error: {words}", file=sys.stderr, flush=True)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(f"jaxlm/left/{self._own}", "")
                deadline = time.monotonic() + 5 * _TICK
                while self._own == 0 and time.monotonic() < deadline:
                    if len(self._client.key_value_dir_get("jaxlm/left/")) + self._lost == count():
                        time.sleep(0.2)  # for them to be gone
                        break
                    time.sleep(0.1)
            os._exit(exit_code)

    def end(self, error: BaseException) -> NoReturn:
        """Ends all processes for what this one raised."""
        if isinstance(error, Exception) and not isinstance(error, JaxlmError) and any(x in str(error) for x in _LOST):
            time.sleep(SILENCE + 5 * _TICK)  # another process is gone: the watch will say which, and end this one
        match error:
            case JaxlmError():
                words, exit_code = str(error), error.exit_code
            case OSError():
                words, exit_code = str(error), DataError.exit_code
            case KeyboardInterrupt():
                words, exit_code = "interrupted", INTERRUPTED
            case SystemExit():
                words, exit_code = "stopped before the first step", int(error.code or 0)
            case _:
                words, exit_code = "".join(traceback.format_exception_only(error)).strip(), 1
        with self._ending:  # unless the watch is at it
            if exit_code == 1:
                traceback.print_exception(error)
            self._tell(f"{_name()} ended: {words}", exit_code)
            self._leave(words, exit_code)
