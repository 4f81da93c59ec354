"""One run, one writer: a lock on the run directory, held by the system for as long as its process lives.

So a lock whose process died is free at once. Only the standard library: a second process is to learn of the first
before it has imported anything large.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxlm.errors import DataError

NAME = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as of Lustre mounted without -o flock


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the lock of a run directory, which is made if missing. Where its file system has no locks, says that
    nothing guards the run.

    Raises:
      DataError: another process holds it; names its host and pid. Or the directory can't be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        what = f"run directory {workdir} can't be written: {error.strerror}"
        raise DataError(f"{what}; give another --workdir") from error
    try:
        try:
            _take(descriptor, workdir, patience=10)  # `check` holds it for a moment
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            what = f"the file system of {workdir} has no locks: {error.strerror}"
            print(f"warning: {what}; start no second run there while this one goes on", file=sys.stderr)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time(), 3)}
        with contextlib.suppress(OSError):  # a full disk keeps no one from running
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check(workdir: Path) -> None:
    """Raises what `held` would, where another process holds the lock now."""
    with (
        contextlib.suppress(OSError),  # what keeps `held` from its work, that one says
        (workdir / NAME).open("r+b") as file,  # writable: NFS locks nothing else
    ):
        _take(file.fileno(), workdir)


def _take(descriptor: int, workdir: Path, patience: int = 0) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if patience:
            time.sleep(0.02)
            return _take(descriptor, workdir, patience - 1)
        owner = {}
        with contextlib.suppress(ValueError):
            owner = json.loads(os.pread(descriptor, 1000, 0))
        who = f"process {owner.get('pid', '?')} on host {owner.get('host', '?')}"
        raise DataError(f"{who} trains in {workdir}; wait for it, stop it, or give another --workdir") from error
