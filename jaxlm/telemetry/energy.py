"""Joules that the devices of this process use: by a counter of the hardware where there is one, else by an estimate.

NVML counts what NVIDIA GPUs (Volta and later) use, the whole board; RAPL what the packages of Intel and AMD CPUs and
their memory use, other processes' part included. The estimate is codecarbon's, of power ratings and load.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

JOULES_PER_KWH = 3.6e6

_RAPL = Path("/sys/class/powercap")
_IDLE_SECONDS = 0.5


class Meter(NamedTuple):
    """What measures, from when it was opened.

    Attributes:
      name: of what it reads, for people.
      read: joules since it was opened, over all that it measures; never less than before.
      estimated: no counter, an estimate.
      idle: watts, while nothing ran; None where that was not measured.
      whole_host: other processes there would measure the same.
    """

    name: str
    read: Callable[[], float]
    estimated: bool = False
    idle: float | None = None
    whole_host: bool = False


@contextlib.contextmanager
def meter(kind: str, say: Callable[[str], None]) -> Iterator[Meter | None]:
    """What measures this process's devices; None where nothing does, which is said and no error.

    Args:
      kind: "counter", "estimate" (where there is no counter), "off".
      say: takes a line for people.
    """
    with contextlib.ExitStack() as stack:
        found, reasons = None, []
        if kind != "off":
            for open_one in (_nvml, _rapl, *([_codecarbon] if kind == "estimate" else [])):
                try:
                    found = open_one(stack)
                    break
                except _Missing as error:
                    if str(error):
                        reasons.append(str(error))
                except Exception as error:  # of a driver or a library: energy is no reason to stop a run
                    reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
            if found is None:
                hint = "" if kind == "estimate" else "; --config.log.energy=estimate has codecarbon estimate it"
                say(f"energy is not measured: {'; '.join(reasons) or 'no counter here'}{hint}")
        if found:
            found = found._replace(read=_lasting(found.read, say))
        if found and not found.estimated:
            before, begin = found.read(), time.perf_counter()
            time.sleep(_IDLE_SECONDS)
            found = found._replace(idle=(found.read() - before) / (time.perf_counter() - begin))
        if found:
            say(f"energy: {found.name}" + ("" if found.idle is None else f", {found.idle:.0f} W idle"))
        yield found


def _lasting(read: Callable[[], float], say: Callable[[str], None]) -> Callable[[], float]:
    """A reading that stands still, and says so once, where reading fails."""
    joules, lost = 0.0, False

    def lasting() -> float:
        nonlocal joules, lost
        if not lost:
            try:
                joules = max(joules, read())
            except Exception as error:
                lost = True
                say(f"warning: energy is not measured from here on: {type(error).__name__}: {error}".splitlines()[0])
        return joules

    return lasting


class _Missing(Exception):
    """There is no such counter here; why, where a person could change it."""


def _nvml(stack: contextlib.ExitStack) -> Meter:
    devices = [device for device in jax.local_devices() if device.platform == "gpu"]
    if not devices:
        raise _Missing
    try:
        import pynvml
    except ImportError as error:
        raise _Missing("NVML needs nvidia-ml-py: pip install 'jaxlm[energy]'") from error
    pynvml.nvmlInit()
    stack.callback(pynvml.nvmlShutdown)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]

    def handle(number: int) -> object:
        name = visible[number].strip() if visible else str(number)
        if name.isdigit():
            return pynvml.nvmlDeviceGetHandleByIndex(int(name))
        return pynvml.nvmlDeviceGetHandleByUUID(name)

    handles = [handle(device.local_hardware_id) for device in devices]

    def joules(handle: object) -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)

    read = _since([functools.partial(joules, one) for one in handles])
    return Meter(f"NVML's counters of {len(handles)} {'GPU' if len(handles) == 1 else 'GPUs'}", read)


def _rapl(stack: contextlib.ExitStack) -> Meter:
    if any(device.platform != "cpu" for device in jax.local_devices()):
        raise _Missing  # the CPU's joules would be taken for the accelerator's
    zones = [zone for zone in sorted(_RAPL.glob("intel-rapl:*")) if _zone(zone).startswith(("package", "dram"))]
    if not zones:
        raise _Missing
    try:
        counters = [_Wrapping(zone) for zone in zones]
    except PermissionError as error:
        raise _Missing(f"RAPL's {error.filename} can only be read by root") from error
    return Meter(f"RAPL's counters of {', '.join(map(_zone, zones))}", _since(counters), whole_host=True)


def _zone(zone: Path) -> str:
    return (zone / "name").read_text(encoding="utf-8").strip()


class _Wrapping:
    """A RAPL counter in joules, unwound where it went round."""

    def __init__(self, zone: Path):
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text(encoding="utf-8"))
        self._last = self._now()
        self._rounds = 0

    def _now(self) -> int:
        return int(self._file.read_text(encoding="utf-8"))

    def __call__(self) -> float:
        now = self._now()
        self._rounds += now < self._last
        self._last = now
        return (now + self._rounds * self._range) / 1e6


def _codecarbon(stack: contextlib.ExitStack) -> Meter:
    try:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output_methods.base_output import BaseOutput
    except ImportError as error:
        raise _Missing("codecarbon is not installed: pip install 'jaxlm[energy]'") from error

    class Latest(BaseOutput):
        kwh = 0.0

        def out(self, total: Any, delta: Any) -> None:
            self.kwh = total.energy_consumed

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it reads its log_level
    latest = Latest()
    tracker = OfflineEmissionsTracker(
        country_iso_code="USA",  # it wants one, for emissions that are not looked at
        output_handlers=[latest],
        output_methods=[],
        log_level="critical",
        allow_multiple_runs=True,
    )
    tracker.start()
    stack.callback(tracker.stop)

    def read() -> float:
        if tracker.flush() is None:  # its methods raise nothing
            raise RuntimeError("codecarbon gives no estimate")
        return latest.kwh * JOULES_PER_KWH

    read()
    return Meter("an estimate by codecarbon", read, estimated=True, whole_host=True)


def _since(counters: Sequence[Callable[[], float]]) -> Callable[[], float]:
    """The sum of counters, from now on."""
    before = sum(counter() for counter in counters)
    return lambda: sum(counter() for counter in counters) - before
