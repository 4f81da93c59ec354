"""Figures as rows, rows as JSON and as a Markdown table, and the table into the README.

python -m experiments.bench.report        # puts results/*.json into README.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.timing import Spread, spread

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Limit(NamedTuple):
    """What a figure, or its ratio to the peer's, is meant to keep."""

    of: str  # "value" or "ratio"
    sign: str  # "<=" or ">="
    bound: float


class Row(NamedTuple):
    suite: str
    figure: str
    unit: str
    value: Spread
    peer: str = ""  # whose `peer_value` is
    peer_value: Spread | None = None
    limit: Limit | None = None

    @property
    def ratio(self) -> Spread | None:
        """jaxlm's over the peer's: round by round where there are as many of both."""
        if self.peer_value is None:
            return None
        ours, theirs = self.value.samples, self.peer_value.samples
        if len(ours) == len(theirs):
            return spread([a / b for a, b in zip(ours, theirs)])
        return spread([self.value.median / self.peer_value.median])

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None where there is none, or no peer to compare with."""
        found = self.value if self.limit and self.limit.of == "value" else self.ratio
        if self.limit is None or found is None:
            return None
        return found.median <= self.limit.bound if self.limit.sign == "<=" else found.median >= self.limit.bound


def single(value: float) -> Spread:
    return spread([value])


def document(rows: Sequence[Row], facts: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """All of a run, ready for JSON."""
    plain = [row._asdict() | {"ratio": row.ratio, "met": row.met} for row in rows]
    for row in plain:
        for name in ("value", "peer_value", "ratio", "limit"):
            row[name] = None if row[name] is None else row[name]._asdict()
    return {"machine": dict(facts), "rows": plain, **more}


def markdown(doc: Mapping[str, Any]) -> str:
    """Tables, one for each suite, below a line on the machine."""
    lines = [described(doc["machine"]), ""]
    for line in doc.get("notes", []):
        lines += [f"**{line}**", ""]
    rows = doc["rows"]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        lines += [f"| {suite} | jaxlm | beside | jaxlm / beside | limit |", "|---|---|---|---|---|"]
        lines += [_line(row) for row in rows if row["suite"] == suite]
        lines.append("")
    return "\n".join(lines)


def described(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    settings = "; " + ", ".join(f"{k}={v}" for k, v in machine["settings"].items()) if machine["settings"] else ""
    gpu = f"; {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{machine['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB, "
        f"{machine['system']}, load {machine['load']:g} at the start{gpu}; "
        f"Python {machine['python']}, {versions}{settings}."
    )


def _line(row: Mapping[str, Any]) -> str:
    unit = f" ({row['unit']})" if row["unit"] else ""
    peer = f"{_text(row['peer_value'])} {row['peer']}" if row["peer_value"] else ""
    ratio = _text(row["ratio"]) if row["ratio"] else ""
    limit = ""
    if row["limit"]:
        what = "ratio " if row["limit"]["of"] == "ratio" else ""
        kept = {True: ": kept", False: ": **missed**", None: ""}[row["met"]]
        limit = f"{what}{row['limit']['sign']} {_number(row['limit']['bound'])}{kept}"
    return f"| {row['figure']}{unit} | {_text(row['value'])} | {peer} | {ratio} | {limit} |"


def _text(value: Mapping[str, Any]) -> str:
    if len(value["samples"]) == 1:
        return _number(value["median"])
    return f"{_number(value['median'])} ({_number(value['low'])} to {_number(value['high'])})"


def _number(x: float) -> str:
    """Three figures, and all of those before the point."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def store(doc: Mapping[str, Any], out: Path, name: str) -> None:
    """NAME.json and NAME.md in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(doc, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(doc))


def fill(text: str, results: Path) -> str:
    """`text` with the tables of results/NAME.json between `<!-- results: NAME -->` and `<!-- end -->`."""

    def table(found: re.Match[str]) -> str:
        path = results / f"{found[1]}.json"
        body = markdown(json.loads(path.read_text())) if path.exists() else "not yet measured\n"
        return f"<!-- results: {found[1]} -->\n{body}<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(), RESULTS))
    sys.exit(0)
