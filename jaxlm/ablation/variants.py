"""Variants made of points of axes, and how they are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxlm import config_json
from jaxlm.ablation.points import Axes, Overrides, check_values, combinations, sampled
from jaxlm.errors import ConfigError


def grid(axes: Axes) -> dict[str, Overrides]:
    """Variants of every combination of the values of axes: {"peak=0.001 b2=0.99": {...}, ...}."""
    return _named(combinations(axes))


def zipped(axes: Axes) -> dict[str, Overrides]:
    """Variants of the first values of all axes, of the second, ...

    Raises:
      ConfigError: axes of different lengths.
    """
    check_values(axes)
    lengths = {path: len(values) for path, values in axes.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"zipped axes have different lengths: {lengths}")
    return _named([dict(zip(axes, values)) for values in zip(*axes.values())])


def one_at_a_time(axes: Axes) -> dict[str, Overrides]:
    """Variants that each set one axis to one of its values."""
    check_values(axes)
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
