"""Edits of a spec, and specs as text. Each edit returns a new spec, of plain dicts, and leaves its argument alone.

The stage that an edit names may stand in the chain, or in that of a partition's group.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable
from typing import Any

from jaxlm.config import plain, stage_names
from jaxlm.errors import ConfigError, nearest
from jaxlm.optim.stages import Spec, Stage, is_named, names, stages

New = str | Callable[..., Any]
"""A stage by its name, with `transform` among its arguments where it is named freely; or a function, such as
`optax.scale_by_lion`, whose own name the stage gets."""


def replace(spec: Spec, stage: str, by: New, **arguments: Any) -> dict[str, Any]:
    """`by`, with its own arguments, in the place of a stage."""
    name, table = _named(by, arguments)
    return _edited(spec, stage, lambda chain, i: (*chain[:i], name, *chain[i + 1 :]), {name: table})


def insert_before(spec: Spec, stage: str, new: New, **arguments: Any) -> dict[str, Any]:
    """A new stage right before another."""
    name, table = _named(new, arguments)
    return _edited(spec, stage, lambda chain, i: (*chain[:i], name, *chain[i:]), {name: table})


def insert_after(spec: Spec, stage: str, new: New, **arguments: Any) -> dict[str, Any]:
    """A new stage right after another."""
    name, table = _named(new, arguments)
    return _edited(spec, stage, lambda chain, i: (*chain[: i + 1], name, *chain[i + 1 :]), {name: table})


def _named(new: New, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(new, str):
        return new, arguments
    name = getattr(new, "__name__", "")
    if not name.isidentifier():  # what a function returned, a lambda, a partial
        raise ConfigError(f"{new!r} has no name for its stage; give one: replace(spec, stage, 'mine', transform=...)")
    if is_named(new):
        return name, arguments
    return name, {"transform": new} | arguments


def drop(spec: Spec, stage: str) -> dict[str, Any]:
    """The spec without a stage.

    Raises:
      ConfigError: as all edits; also where it is the only one of a partition's group, which would then be frozen.
    """

    def without(chain: tuple[str, ...], i: int) -> tuple[str, ...]:
        if len(chain) == 1:
            raise ConfigError(
                f"{stage!r} is the only stage of its chain, and a group without stages is frozen: replace it"
            )
        return (*chain[:i], *chain[i + 1 :])

    return _edited(spec, stage, without, {})


def with_args(spec: Spec, stage: str, **arguments: Any) -> dict[str, Any]:
    """The spec with some arguments of a stage set, the others as they were."""
    table = dict(plain(spec).get(stage) or {})
    return _edited(spec, stage, lambda chain, i: chain, {stage: table | arguments})


def _edited(
    spec: Spec, stage: str, edit: Callable[[tuple[str, ...], int], tuple[str, ...]], tables: dict[str, Any]
) -> dict[str, Any]:
    out = plain(spec)
    if "chain" not in out:
        stages(out)  # says what is expected
    if stage not in (known := names(out)):
        raise ConfigError(f"no stage {stage!r} in optimizer.chain: {nearest(stage, known)}")
    for holder in _with_chains(out):
        chain = stage_names("chain", holder["chain"])
        if stage in chain:
            holder["chain"] = edit(chain, chain.index(stage))
    if len(set(names(out))) < len(names(out)):
        raise ConfigError(f"{next(iter(tables))!r} is in optimizer.chain already; name one freely, with a 'transform'")
    out |= {name: table for name, table in tables.items() if table or name in out}
    for name in set(names(spec)) - set(names(out)):  # with the stages of a partition's groups
        out.pop(name, None)
    stages(out)
    return out


def _with_chains(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What holds a chain: a spec, and the groups of its partitions."""
    tables = [table for table in spec.values() if isinstance(table, dict)]
    groups = [group for table in tables for group in table.values() if isinstance(group, dict) and "chain" in group]
    return [spec, *groups]


def to_json(spec: Spec) -> str:
    """A spec as JSON; `from_json` gives it back equal.

    Raises:
      ConfigError: a stage is a Python object, which JSON can't hold.
    """

    def refuse(value: Any) -> Any:
        raise ConfigError(
            f"an optimizer stage is a Python object, {value!r}, which JSON can't hold; name it module:function"
        )

    return json.dumps(plain(spec), indent=2, default=refuse)


def from_json(text: str) -> dict[str, Any]:
    """The spec that `to_json` wrote.

    Raises:
      ConfigError: the text is no JSON.
    """
    try:
        found: dict[str, Any] = plain(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"not a spec: {error}") from error
    return found


def lines(spec: Spec, numbered: bool = False, exact: bool = False) -> list[str]:
    """One line a stage, name(argument=value, ...), and one for each group of a partition before its own.

    Args:
      exact: Python objects that aren't the same read differently, by their places in memory.
    """
    numbers = itertools.count(1)

    def line(stage: Stage, depth: int) -> list[str]:
        shown = dict(stage.arguments) | ({"where": stage.where} if stage.where else {})
        transform = (dict(spec.get(stage.name) or {})).get("transform")
        if transform is not None and not isinstance(transform, str):
            transform = repr(getattr(transform, "update", transform)) if exact else "Python"
        head = f"{stage.name}: {transform}" if transform else stage.name
        number = f"{next(numbers)}. " if numbered else ""
        out = ["  " * depth + f"{number}{head}({', '.join(f'{key}={value!r}' for key, value in shown.items())})"]
        for name, group in stage.groups.items():
            out.append("  " * (depth + 1) + f"{name}, where={group.where!r}" + ("" if group.stages else ": frozen"))
            out += [text for inner in group.stages for text in line(inner, depth + 2)]
        return out

    return [text for stage in stages(spec) for text in line(stage, 0)]


def diff(old: Spec, new: Spec) -> str:
    """How two specs differ, a line a stage: "- " gone, "+ " new, "  " in both; "" where they are equal."""
    a, b = lines(old, exact=True), lines(new, exact=True)
    return "" if a == b else "\n".join(line for line in difflib.ndiff(a, b) if not line.startswith("?"))
