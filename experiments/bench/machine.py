"""What the figures were measured on: facts that matter to them, none that name the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jaxlm

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "tokenizers")
_SETTINGS = (  # of the environment, that can move a figure
    *("NPROC", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
    *("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"),
    *("MALLOC_ARENA_MAX", "JAX_CPU_ENABLE_ASYNC_DISPATCH"),
)


def facts() -> dict[str, Any]:
    """Processor, memory, versions, settings, date; `load` is the average over the last minute, before anything ran."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {"jaxlm": jaxlm.__version__} | {name: found for name in _PACKAGES if (found := _version(name))},
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has(*packages: str) -> bool:
    return all(_version(name) for name in packages)


def say(text: str) -> None:
    """Progress, on stderr: stdout is the table's."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().replace("\n", "; ") if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
