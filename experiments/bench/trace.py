"""Where a device's time goes: its kernels, from a profile of some steps."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    name: str
    ms: float  # a step
    calls: float  # a step


def record(run: Callable[[], Any], folder: Path) -> Path:
    """The profile of a call, as the file that JAX's profiler writes.

    Raises:
      RuntimeError: the profiler left none.
    """
    import jax

    with jax.profiler.trace(str(folder)):
        run()
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise RuntimeError(f"the profiler wrote no .xplane.pb in {folder}")
    return files[-1]


def kernels(file: Path, steps: int, device: str = "/device:GPU", line: str = "Stream") -> list[Kernel]:
    """All that ran on the device while `steps` steps did, the longest first.

    Args:
      device, line: how the names of the planes and of their lines that count begin.
    """
    from jax.profiler import ProfileData

    total: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for plane in ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith(device):
            continue
        for events in (each.events for each in plane.lines if each.name.startswith(line)):
            for event in events:
                total[event.name] += event.duration_ns
                calls[event.name] += 1
    return [Kernel(name, ns / steps / 1e6, calls[name] / steps) for name, ns in total.most_common()]
