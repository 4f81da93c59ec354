"""Token ids mapped from a file, and what is asked before they are believed.

A map costs no memory and is as fast as an array, but where its file was cut short, reading it kills the process by
SIGBUS, and where it was written over, the ids are others. So who reads a batch asks first, for the price of an `fstat`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlm.data import readers
from jaxlm.errors import DataError


class _Map(mmap.mmap):
    """The memory of a token file. An array is of the file where its chain of bases ends here: views of views too."""

    path: Path
    descriptor: int  # of the file that is mapped, whatever has its name by now
    mtime: int
    max_id: int
    sha256: str


def map_tokens(file: BinaryIO, path: Path, dtype: np.dtype[Any], max_id: int, sha256: str) -> np.ndarray:
    """The ids [N] of an open token file, read-only."""
    mapped = _Map(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.descriptor = os.dup(file.fileno())
    weakref.finalize(mapped, os.close, mapped.descriptor)
    mapped.path, mapped.max_id, mapped.sha256 = path, max_id, sha256
    mapped.mtime = os.fstat(mapped.descriptor).st_mtime_ns
    return np.ndarray(len(mapped) // dtype.itemsize, dtype, mapped)


def check_unchanged(tokens: np.ndarray) -> None:
    """To be called before `tokens` are read; those that are not mapped can't change.

    Raises:
      DataError: the file has another size than when it was opened, or was written to and has other content.
    """
    mapped = _map_of(tokens)
    if mapped is None:
        return
    status = os.fstat(mapped.descriptor)
    if status.st_size != len(mapped):
        raise DataError(
            f"{mapped.path} holds {status.st_size} bytes, and {len(mapped)} when it was opened: it was truncated or "
            "written to while in use; restore it and run again"
        )
    if status.st_mtime_ns != mapped.mtime:
        verify(mapped.path, mapped.sha256)  # only touched, perhaps
        mapped.mtime = status.st_mtime_ns


def check_ids(tokens: np.ndarray, ids: np.ndarray, starts: Sequence[int] | np.ndarray) -> None:
    """Of ids [B, T] that were read from `tokens` at starts [B], round its end.

    Raises:
      DataError: an id is higher than any that was written to the file.
    """
    mapped = _map_of(tokens)
    if mapped is None or ids.max(initial=0) <= mapped.max_id:
        return
    row, column = map(int, np.unravel_index(ids.argmax(), ids.shape))
    before = (tokens.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data) // tokens.itemsize
    position = before + (int(starts[row]) + column) % len(tokens)
    raise DataError(
        f"{mapped.path} is damaged: token id {ids[row, column]} at position {position}; expected none above "
        f"{mapped.max_id}. Write it again, or copy it again from where it is whole"
    )


def verify(path: Path, sha256: str) -> None:
    """Reads a whole token file, not by a map, which may end in a SIGBUS.

    Raises:
      DataError: its content has another sha256.
    """
    with readers.reading(path), path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise DataError(f"{path} is damaged: sha256 is {actual[:16]}..., was {sha256[:16]}... when written")


def _map_of(tokens: np.ndarray) -> _Map | None:
    base: Any = tokens
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, _Map) else None
