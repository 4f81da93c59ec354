"""A study's numbers as files for other programs: results.csv, results.parquet and curves.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm import files
from jaxlm.ablation import plan, variants
from jaxlm.ablation.findings import Findings
from jaxlm.ablation.outcomes import Outcome

_BEFORE = ("trial", "variant", "seed", "tuning")
_AFTER = ("status", "value", "gap", "tokens", "flops", "seconds", "joules")


def write(findings: Findings, folder: Path) -> list[Path]:
    """Writes one row a trial, and one row a measurement of the metric, each file atomically; none without trials.

    Returns:
      The files; without pyarrow there is no results.parquet among them.
    """
    if not findings.outcomes:
        return []
    rows = results(findings)
    written = [_table(folder / "results.csv", rows)]
    written += _parquet(folder / "results.parquet", rows)
    measured = curves(findings)
    return [*written, *([_table(folder / "curves.csv", measured)] if measured else [])]


def results(findings: Findings) -> list[dict[str, Any]]:
    """One row a trial: with a column of each tuning axis, "point.<field>", and of each other config field that differs
    between trials but for the seed, "config.<field>"."""
    axes = list(dict.fromkeys(axis for one in findings.outcomes for axis in one.point))
    changed = _changed(findings)
    own: dict[str, Any] = {}  # config field -> the baseline's value
    for fields in changed:
        own |= {name: was for name, (was, _) in fields.items()}
    own = {name: was for name, was in own.items() if not all(name in one.point for one in findings.outcomes)}

    def row(one: Outcome, fields: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
        values = one._asdict()
        point = {f"point.{axis}": variants.written(one.point.get(axis)) for axis in axes}
        settings = {f"config.{name}": fields[name][1] if name in fields else was for name, was in own.items()}
        return {name: values[name] for name in _BEFORE} | point | settings | {name: values[name] for name in _AFTER}

    return [row(one, fields) for one, fields in zip(findings.outcomes, changed)]


def curves(findings: Findings) -> list[dict[str, Any]]:
    """One row a measurement of the metric: where in the run it was taken, and its value."""
    once = {(one.trial, one.variant, one.seed): one for one in findings.outcomes}
    return [
        {"trial": one.trial, "variant": one.variant, "seed": one.seed}
        | {"step": step, "tokens": tokens, "flops": flops, "seconds": seconds, "value": value}
        for one in once.values()
        for step, tokens, flops, seconds, value in zip(*(column.tolist() for column in one.curve[:5]))
    ]


def _changed(findings: Findings) -> list[Mapping[str, tuple[Any, Any]]]:
    """Of each trial how its config differs from the baseline's but for the seed: {field: (the baseline's, its own)}."""
    of_baseline = [one for one in findings.outcomes if one.variant == findings.baseline and not one.tuning]
    base = next((one.config for one in of_baseline if one.config is not None), None)
    known: dict[tuple[str, str, bool], Mapping[str, tuple[Any, Any]]] = {}
    out = []
    for one in findings.outcomes:
        key = one.variant, repr(one.point), one.tuning
        if key not in known:
            found = plan.changes(base, one.config) if base is not None and one.config is not None else {}
            known[key] = {name: pair for name, pair in found.items() if name != "seed"}
        out.append(known[key])
    return out


def _table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with files.atomic(path) as file:
        file.write(text.getvalue().encode())
    return path


def _parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return []
    columns = {}
    for name in rows[0]:
        values = [one[name] for one in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):  # mixed: as text
            columns[name] = pyarrow.array([None if value is None else str(value) for value in values])
    with files.atomic(path) as file:
        parquet.write_table(pyarrow.table(columns), file)
    return [path]
