"""Values to try: the axes along which configs differ, and the points and variants that are made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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
        if not (self.low < self.high and (self.low > 0 or not self.log)):
            raise ConfigError(f"{self}; expected low < high and, on a logarithmic scale, low above 0 (or log=False)")
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return float(self.low + (self.high - self.low) * share)


Axes = Mapping[str, Sequence[Any] | Range]
"""{config field: the values to try}."""


def log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    """So many values from low to high, each the same factor above the one before, to three digits."""
    return tuple(float(f"{Range(low, high).at(i / max(1, count - 1)):.3g}") for i in range(count))


# Points


def combinations(axes: Axes) -> list[Overrides]:
    """Every combination of the values of axes.

    Raises:
      ConfigError: an axis is a `Range`.
    """
    _check_values(axes)
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def sampled(axes: Axes, count: int, search: str, seed: int = 0) -> list[Overrides]:
    """So many points of axes, no two alike.

    Args:
      search: "random", drawn independently, or "halton", of a scrambled Halton sequence.

    Raises:
      ConfigError: the axes have fewer points.
    """
    from scipy.stats import qmc  # takes a while to import

    if not any(isinstance(values, Range) for values in axes.values()):
        there_are = math.prod(
            sum(value not in values[:i] for i, value in enumerate(values)) for values in axes.values()
        )
        if count > there_are:
            raise ConfigError(
                f"{count} points of {', '.join(map(repr, axes))}, which have {there_are} combinations; "
                "expected as many at most, or an axis that is a Range"
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
    while len(points) < count:
        for row in draw(count - len(points)):
            point = {path: value(axes[path], float(share)) for path, share in zip(axes, row)}
            if point not in points:
                points.append(point)
    return points


def _check_values(axes: Axes) -> None:
    for path, values in axes.items():
        if isinstance(values, Range):
            raise ConfigError(f"axis {path!r} is a range, of which there are no single values; give these")
        if isinstance(values, str):
            raise ConfigError(f"axis {path!r} is {values!r}; expected a sequence of values, such as ({values!r},)")


# Variants


def grid(axes: Axes) -> dict[str, Overrides]:
    """Variants of every combination of the values of axes: {"peak=0.001 b2=0.99": {...}, ...}."""
    return _named(combinations(axes))


def zipped(axes: Axes) -> dict[str, Overrides]:
    """Variants of the first values of all axes, of the second, ...

    Raises:
      ConfigError: axes of different lengths.
    """
    _check_values(axes)
    lengths = {path: len(values) for path, values in axes.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"zipped axes have different lengths: {lengths}")
    return _named([dict(zip(axes, values)) for values in zip(*axes.values())])


def one_at_a_time(axes: Axes) -> dict[str, Overrides]:
    """Variants that each set one axis to one of its values."""
    _check_values(axes)
    return _named([{path: value} for path, values in axes.items() for value in values])


def leave_one_out(parts: Mapping[str, Overrides], full: str = "full") -> dict[str, Overrides]:
    """A variant with all parts of a recipe, which changes nothing, and one without each.

    Args:
      parts: name -> the overrides that take the part away.
    """
    return {full: {}} | {f"without {name}": overrides for name, overrides in parts.items()}


def random(axes: Axes, count: int, seed: int = 0) -> dict[str, Overrides]:
    """Variants at independent random points of axes."""
    return _named(sampled(axes, count, "random", seed))


def halton(axes: Axes, count: int, seed: int = 0) -> dict[str, Overrides]:
    """Variants at points that fill the space of axes evenly (Halton 1960, scrambled)."""
    return _named(sampled(axes, count, "halton", seed))


def _named(points: Sequence[Overrides]) -> dict[str, Overrides]:
    """Each point under a name of its values, with as much of each path as tells them apart."""
    paths = {path for point in points for path in point}
    short = {path: path.rpartition(".")[2] for path in paths}
    doubled = {name for name in short.values() if list(short.values()).count(name) > 1}
    label: Callable[[str], str] = lambda path: path if short[path] in doubled else short[path]  # noqa: E731

    def named(shown: Callable[[Any], str]) -> dict[str, Overrides]:
        return {" ".join(f"{label(path)}={shown(value)}" for path, value in point.items()): point for point in points}

    names = named(shown)
    return names if all(point in names.values() for point in points) else named(repr)


def shown(value: Any) -> str:
    """A value in the name of a variant or trial."""
    return f"{value:.4g}" if type(value) is float else str(value)
