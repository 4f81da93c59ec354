"""How a file appears whole or not at all, what vouches for its content, and where jaxlm caches."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxlm.errors import ConfigError, DataError


def cache_dir(setting: str = "") -> Path:
    """Where jaxlm caches: `setting`, else $JAXLM_CACHE, else jaxlm in the user's cache directory.

    Raises:
      DataError: the user has none.
    """
    if setting or os.environ.get("JAXLM_CACHE"):
        return expanded(setting or os.environ["JAXLM_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"
    except RuntimeError as error:
        raise DataError("this user has no home directory to cache in; set JAXLM_CACHE to a directory") from error


def expanded(path: str | Path) -> Path:
    """A path with the home that "~" means; that of a user who isn't there stays as it is, and names no file."""
    return Path(os.path.expanduser(path))


def workdir(given: str | None, usual: str) -> Path:
    """The directory that --workdir gives, or the usual one where the flag is left out.

    Raises:
      ConfigError: it is empty, as by a shell variable that isn't set.
    """
    if given is not None and not given.strip():
        raise ConfigError(f"--workdir is empty; expected a directory, or no --workdir for {usual}")
    return expanded(usual if given is None else given)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well, on disk by then; otherwise nothing is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Whether this process is the one to work in a folder, until the block ends. The lock is the system's, so none
    outlives its process; False also where the file system has none.

    Args:
      wait: is called where another holds the lock, to say that it is waited for; None does not wait.
    """
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(OSError):  # of NFS: EBADF, of a folder
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if wait:
                    wait()
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    held = True
        yield held


def seal(value: Any) -> str:
    """sha256 of a JSON value, kept beside it so that no flipped bit goes unseen."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
