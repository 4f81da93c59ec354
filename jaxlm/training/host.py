"""What a door settles with its own process before JAX starts."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

from jaxlm.files import cache_dir

_PROGRAMS = 4 * 2**30  # bytes; what was not used for the longest goes first

_MALLOPT = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
}

_TOLD = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def settle() -> None:
    """All of it. Called by doors only: a library does not settle this for its user's process."""
    keep_memory()
    keep_programs()


def keep_memory() -> None:
    """Tells glibc to keep freed memory, for one heap, in this process.

    XLA on the CPU allocates its temporary buffers anew each step; handed back to the system in between, each page
    faults again. Elsewhere than on Linux with glibc it does nothing; nor where the environment tells glibc how to
    (MALLOC_TRIM_THRESHOLD_=131072 is its own way), which is the switch.
    """
    if any(name in os.environ for name in _TOLD) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for name, value in _MALLOPT.values():
            libc.mallopt(name, value)


def keep_programs() -> None:
    """Has JAX keep what it compiles in the cache directory, for processes to come. A place that JAX was given, as by
    JAX_COMPILATION_CACHE_DIR, stays; JAX_ENABLE_COMPILATION_CACHE=false is the switch."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "programs" / _processor()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        jax.config.update("jax_compilation_cache_max_size", _PROGRAMS)


def _processor() -> str:
    """A name for this kind of CPU: code that is compiled for one may not run on another."""
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
