"""Medians and spreads, and blocks of two sides in turn, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    def map(self, f: Callable[[float], float]) -> Spread:
        """The spread of f(sample)."""
        return spread([f(x) for x in self.samples])


def spread(samples: Sequence[float]) -> Spread:
    """Of one sample, all three are it."""
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0], tuple(samples))
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high, tuple(samples))


def interleave(blocks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Spread]:
    """Runs each block once a round, in an order that turns around every round; spreads of what they return."""
    found: dict[str, list[float]] = {name: [] for name in blocks}
    for r in range(rounds):
        for name in list(blocks)[:: 1 if r % 2 == 0 else -1]:
            found[name].append(blocks[name]())
    return {name: spread(samples) for name, samples in found.items()}
