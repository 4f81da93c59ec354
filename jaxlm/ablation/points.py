"""Points to try: the axes along which configs differ, and how points of them are chosen."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import ConfigError

Overrides = Mapping[str, Any]
"""{"steps": 100, "optimizer.scale_by_adam.b2": 0.99}. "optimizer" takes a whole spec, or a function that makes one
of the base's, such as `lambda spec: optim.drop(spec, "clip_by_global_norm")`."""


class Range(NamedTuple):
    """The values of an axis between two bounds, on a logarithmic scale unless `log` is False."""

    low: float
    high: float
    log: bool = True

    def at(self, share: float) -> float:
        """The value at a share in [0, 1] of the way.

        Raises:
          ConfigError: the bounds are none.
        """
        if (
            not (self.low < self.high and (self.low > 0 or not self.log))
            or (self.high / self.low if self.log else self.high - self.low) == math.inf
        ):
            raise ConfigError(
                f"{self}; expected low < high and, on a logarithmic scale, low above 0 (or log=False), no further "
                "apart than a float64 can tell"
            )
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return float(self.low + (self.high - self.low) * share)


Axes = Mapping[str, Sequence[Any] | Range]
"""{config field: the values to try}."""


def log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    """So many values from low to high, each the same factor above the one before, to three digits."""
    return tuple(float(f"{Range(low, high).at(i / max(1, count - 1)):.3g}") for i in range(count))


def combinations(axes: Axes) -> list[Overrides]:
    """Every combination of the values of axes.

    Raises:
      ConfigError: an axis is a `Range`.
    """
    check_values(axes)
    return [dict(zip(axes, values)) for values in itertools.product(*_distinct(axes).values())]


def spread(axes: Axes, count: int) -> list[Overrides]:
    """So many combinations of the values of axes, or all, in which each axis takes as many of its values as it can, and
    as evenly: a Latin hypercube (McKay et al. 1979) over the values. Of one axis they are evenly spaced.

    Where two points of the hypercube are one combination, that of the values that are used least takes the place.

    Raises:
      ConfigError: an axis is a `Range`.
    """
    points = combinations(axes)
    sizes = [len(values) for values in _distinct(axes).values()]
    if count >= len(points):
        return points
    generator = np.random.default_rng(0)
    orders = [np.arange(count), *(generator.permutation(count) for _ in sizes[1:])]
    chosen = {
        tuple((2 * int(place) + 1) * size // (2 * count) for place, size in zip(places, sizes))
        for places in zip(*orders)
    }
    rows = list(itertools.product(*map(range, sizes)))
    while len(chosen) < count:
        uses = [Counter(values) for values in zip(*chosen)]
        shares = {
            row: sum(use[i] * size for use, i, size in zip(uses, row, sizes)) for row in rows if row not in chosen
        }
        chosen.add(min(shares, key=shares.__getitem__))
    return [point for point, row in zip(points, rows) if row in chosen]


def crossing(axes: Axes) -> list[Overrides]:
    """Points along one axis after the other, from the first values of all: each value once, and one of a `Range`."""
    values = {path: [of.at(0.5)] if isinstance(of, Range) else of for path, of in _distinct(axes).items()}
    first = {path: of[0] for path, of in values.items()}
    return [first, *({**first, path: value} for path, of in values.items() for value in of[1:])]


def size(axes: Axes) -> float:
    """How many combinations of the values of axes there are; inf where one is a `Range`."""
    counts = (math.inf if isinstance(values, Range) else len(values) for values in _distinct(axes).values())
    return math.prod(counts)


def sampled(axes: Axes, count: int, search: str, seed: int = 0) -> list[Overrides]:
    """So many points of axes, no two alike.

    Args:
      search: "random", drawn independently, or "halton", of a scrambled Halton sequence.

    Raises:
      ConfigError: the axes have fewer points.
    """
    from scipy.stats import qmc  # takes a while to import

    axes = _distinct(axes)
    asked = f"{count} points of {', '.join(map(repr, axes))}"
    if count > size(axes):
        raise ConfigError(
            f"{asked}, which have {size(axes)} combinations; expected as many at most, or an axis that is a Range"
        )
    draw: Callable[[int], np.ndarray]
    if search == "halton":
        draw = qmc.Halton(len(axes), seed=seed).random
    else:
        generator = np.random.default_rng(seed)
        draw = lambda rows: generator.random((rows, len(axes)))  # noqa: E731

    def value(values: Sequence[Any] | Range, share: float) -> Any:
        return values.at(share) if isinstance(values, Range) else values[min(int(share * len(values)), len(values) - 1)]

    points: list[Overrides] = []
    in_vain = 0
    while len(points) < count:
        for row in draw(count - len(points)):
            point = {path: value(axes[path], float(share)) for path, share in zip(axes, row)}
            in_vain += 1
            if point not in points:
                points.append(point)
                in_vain = 0
        if in_vain > 100 * count:  # no chance but where a Range is so narrow that it has fewer numbers
            raise ConfigError(f"{asked}, whose ranges gave only {len(points)} different ones; widen them")
    return points


def _distinct(axes: Axes) -> Axes:
    """Each value of an axis once, where it comes first."""

    def once(values: Iterable[Any]) -> list[Any]:
        listed = list(values)
        return [value for i, value in enumerate(listed) if value not in listed[:i]]

    return {path: values if isinstance(values, Range) else once(values) for path, values in axes.items()}


def check_values(axes: Axes) -> None:
    for path, values in axes.items():
        if isinstance(values, Range):
            raise ConfigError(f"axis {path!r} is a range, of which there are no single values; give these")
        if isinstance(values, str):
            raise ConfigError(f"axis {path!r} is {values!r}; expected a sequence of values, such as ({values!r},)")
