"""How a side is measured on a GPU: in as few micro-batches as fit, by blocks of steps, with the card's joules."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.bench.cases import Case
from experiments.bench.gpu_report import AGREED
from experiments.bench.machine import say
from experiments.bench.timing import spread

MICRO_BATCHES = (1, 2, 4, 8)


def fitting(measure: Callable[[Case], dict[str, Any]], case: Case, signs: Sequence[str]) -> dict[str, Any]:
    """`measure` with as few micro-batches as fit the memory."""
    for count in MICRO_BATCHES:
        if case.batch_size % count:
            continue
        try:
            return measure(case._replace(micro_batches=count)) | {"micro_batches": count}
        except Exception as error:
            if not any(sign in str(error) for sign in signs) or count == MICRO_BATCHES[-1]:
                raise
            say(f"{count} micro-batches: out of memory")
        gc.collect()
    raise RuntimeError(f"{case.name}: out of memory in any number of micro-batches")


def timed(
    run: Callable[[int, int], tuple[list[float], float]], case: Case, deadline: float, smoke: bool
) -> dict[str, Any]:
    """Blocks of steps after AGREED and a few more: milliseconds a step, and millijoules a token where the card counts.

    The first block is always run, further ones until the deadline.
    """
    block, rounds = (2, 2) if smoke else (10, 8)
    start = AGREED
    run(start, block)
    start += block
    times, energies = [], []
    for _ in range(rounds):
        with _joules() as joules:
            losses, seconds = run(start, block)
        start += block
        if not np.isfinite(losses).all():
            raise RuntimeError(f"the loss is not finite at step {start}: {losses}")
        times.append(seconds / block * 1e3)
        energies += [j / block / case.tokens_per_step * 1e3 for j in joules]
        if time.monotonic() > deadline:
            break
    ms = spread(times)
    say(f"{ms.median:.1f} ms a step, {1e3 * case.tokens_per_step / ms.median:,.0f} tokens/s")
    return {"ms": ms, "mj_per_token": spread(energies) if energies else None}


@contextlib.contextmanager
def _joules() -> Iterator[list[float]]:
    """Fills the list with the joules that the card has used meanwhile, idle power included, by NVML's counter; leaves
    it empty where there is none."""
    out: list[float] = []
    begin = _millijoules()
    yield out
    end = _millijoules()
    if begin is not None and end is not None:
        out.append((end - begin) / 1e3)


def _millijoules() -> int | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except Exception:  # no such library, no card, or one that does not count
        return None
