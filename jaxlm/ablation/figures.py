"""How numbers of any size are written in reports."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


def two_digits(sizes: Iterable[float]) -> int:
    """Decimals that show two digits of the median of some sizes, of those above 0; 4 where there are none."""
    known = [size for size in sizes if 0 < size < math.inf]
    return max(1 - math.floor(math.log10(np.median(known))), 0) if known else 4


def form(places: int, *values: float) -> str:
    """The format of numbers with so many decimals; four digits and an exponent where these are many, or would be."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return ".4g" if largest >= 1e9 or (places > 8 and largest < 1e-6) else f".{min(places, 8)}f"


def number(value: float, places: int, sign: str = "") -> str:
    """A number in its own `form`."""
    return format(value, sign + form(places, value))


def decimals(deviation: float, interval: tuple[float, float], places: int) -> int:
    """Of a difference: two digits of its own spread over the seeds, or `places` where there is none; more where an
    interval that leaves out 0 would not be seen to."""
    own = two_digits([deviation]) if deviation > 0 else places
    nearest = max(interval[0], -interval[1])  # to 0, if above it
    return max(own, -math.floor(math.log10(nearest))) if nearest > 0 else own
