"""Values to try: the axes along which configs differ, and the points and variants that are made of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxlm import config_json
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


# Points


def combinations(axes: Axes) -> list[Overrides]:
    """Every combination of the values of axes.

    Raises:
      ConfigError: an axis is a `Range`.
    """
    _check_values(axes)
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
    label = labels({path for point in points for path in point})

    def named(shown: Callable[[Any], str]) -> dict[str, Overrides]:
        return {" ".join(f"{label[path]}={shown(value)}" for path, value in point.items()): point for point in points}

    names = named(shown)
    return names if all(point in names.values() for point in points) else named(repr)


def labels(paths: Collection[str]) -> dict[str, str]:
    """Of each path its last parts, as few as no other ends with: {"optimizer.slow.peak": "slow.peak", ...}."""

    def ends(path: str) -> Iterator[str]:
        parts = path.split(".")
        return (".".join(parts[i:]) for i in reversed(range(len(parts))))

    counts = Counter(end for path in paths for end in ends(path))
    return {path: next((end for end in ends(path) if counts[end] == 1), path) for path in paths}


def shown(value: Any) -> str:
    """A value in the name of a variant or trial."""
    return f"{value:.4g}" if type(value) is float else str(written(value))


def written(value: Any) -> Any:
    """A value as a file can hold it: with the names of functions and transforms, inside of a spec too."""
    if isinstance(value, (Mapping, ConfigDict)):
        return {key: written(one) for key, one in value.items()}
    if callable(value) or hasattr(value, "update"):
        return config_json.object_name(value)
    return type(value)(map(written, value)) if type(value) in (list, tuple) else value
