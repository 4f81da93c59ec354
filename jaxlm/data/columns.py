"""Columns within columns: where a table has none of a form's name, the name is a path, as translation.en or
answers.text.0, through objects by their keys and lists by their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def roots(columns: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """{column: the one of the table that holds it}, which is itself or, of a path, the part before the first dot; those
    that have none are left out."""
    names = set(known)
    held = {column: column if column in names else column.partition(".")[0] for column in columns}
    return {column: root for column, root in held.items() if root in names}


def with_paths(columns: Iterable[str], known: Iterable[str]) -> list[str]:
    """The columns of a table, and those of a form that lead into one."""
    names = list(known)
    return [*names, *(column for column in roots(columns, names) if column not in names)]


def reached(row: Mapping[str, Any], columns: Iterable[str]) -> Mapping[str, Any]:
    """The row with what paths lead to as columns of their own; those that lead nowhere are not there."""
    found = {column: _at(row, column) for column in columns if column not in row and "." in column}
    return {**row, **{column: value for column, value in found.items() if value is not None}}


def _at(value: Any, path: str) -> Any:
    """What a path leads to; None where it leads nowhere."""
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value
