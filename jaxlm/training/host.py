"""What a door settles with its own process before JAX starts."""

from __future__ import annotations

import ctypes
import sys

_MALLOPT = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
}


def keep_memory() -> None:
    """Tells glibc to keep freed memory, for one heap, in this process.

    XLA on the CPU allocates its temporary buffers anew each step; handed back to the system in between, each page
    faults again. Called by doors only: a library does not settle this for its user's process. Elsewhere than on
    Linux with glibc it does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for name, value in _MALLOPT.values():
            libc.mallopt(name, value)
