"""Processes that train together, on one host or many: how they meet and agree.

All run the same program. Each reads its rows of a batch and holds its part of the state; the first one also does what
is done once: it writes metrics, logs and the lists of checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from jaxlm.errors import PREEMPTED, ConfigError
from jaxlm.telemetry.energy import Meter
from jaxlm.training import watch
from jaxlm.training.meeting import Meeting
from jaxlm.training.watch import LastWords, Watch

Value = TypeVar("Value")

MEETING = 120
"""Seconds that processes wait for each other at the start."""

_WEEK = 7 * 24 * 3600 * 1000  # milliseconds: a wait that only the end of another process ends
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
    key, client = f"jaxlm/value/{next(_numbers)}", watch.store()
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
        watch.store().wait_at_barrier(f"jaxlm/agreed/{next(_numbers)}", _WEEK)


def summed(meter: Meter | None) -> Meter | None:
    """In the first process the joules of all of them, as they last read them; of what is idle nothing is known then."""
    if meter is None or count() == 1:
        return meter
    key = f"jaxlm/joules/{socket.gethostname() if meter.whole_host else jax.process_index()}"
    read, highest = meter.read, 0.0

    def all_of_them() -> float:
        nonlocal highest
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others are gone: the watch says so
            watch.store().key_value_set(key, repr(own := read()), allow_overwrite=True)
            found = watch.store().key_value_dir_get("jaxlm/joules/") if first() else [(key, repr(own))]
            highest = max(highest, sum(float(joules) for _, joules in found))
        return highest

    return meter._replace(read=all_of_them, idle=None)


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    names = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"  # read from a folder

    return {name: version(name) for name in names} | {"python": sys.version.split()[0]}


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
    last = LastWords(
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
        last.say(f"{watch.name()}: lost process 0, which coordinates; {watch.AGAIN}", PREEMPTED)
        watching = Watch()
        watching.start()
        try:
            yield
        except BaseException as error:
            watching.end(error)
        watch.store().wait_at_barrier("jaxlm/finished", _WEEK)  # watched, for a save may take others longer
        watching.stop()
        jax.distributed.shutdown()


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
