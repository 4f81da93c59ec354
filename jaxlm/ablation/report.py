"""A study's findings as files: report.md, report.html, ranking.tex, results and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm import files
from jaxlm.ablation import latex, page, pictures, results, tables
from jaxlm.ablation.findings import Findings
from jaxlm.ablation.tables import Table


def write(findings: Findings, folder: Path) -> list[Path]:
    """Writes the report into `folder`, each file atomically.

    Returns:
      The files, report.md first. Without matplotlib no pictures, without Plotly or Jinja2 no page, without pyarrow no
      results.parquet are among them.

    Raises:
      OSError: a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(findings, folder)
    shown, words = tables.tables(findings), tables.words(findings)
    written = [_text(folder / "report.md", _markdown(findings, shown, words, [path.name for path in drawn]))]
    html = page.render(findings, shown, words)
    if html is not None:
        written.append(_text(folder / "report.html", html))
    written.append(_text(folder / "ranking.tex", latex.tabular(shown["ranking"])))
    return written + results.write(findings, folder) + drawn


def _markdown(findings: Findings, tables: Mapping[str, Table], words: Mapping[str, Any], drawn: list[str]) -> str:
    def lines(table: Table) -> str:
        rows = [table.headers, *([cell.text for cell in row] for row in table.rows)]
        head, *body = (f"| {' | '.join(map(_escaped, row))} |" for row in rows)
        return "\n".join([head, "|" + " --- |" * len(table.headers), *body])

    parts = [f"# {_escaped(findings.question)}", f"**{_escaped(findings.verdict)}**"]
    parts.append("\n".join(f"- {_escaped(fact)}" for fact in words["facts"]))
    if findings.warnings:
        parts += ["## Warnings", "\n".join(f"- {_escaped(warning)}" for warning in findings.warnings)]
    parts += ["## Ranking", lines(tables["ranking"]), f"{tables['ranking'].title}."]
    for name, about in (("ranking", "forest"), ("curves", "curves"), ("sensitivity", "sensitivity")):
        if f"{name}.png" in drawn:
            parts += [f"![{name}]({name}.png)", words[about]]
    if findings.setup:
        parts += ["## Setup", "\n".join(f"- **{name}**: {_escaped(line)}." for name, line in findings.setup.items())]
    titles = ("Effects", "Tuned values", "What the variants change", "Costs", "Statistics")
    for name, title in zip(("effects", "tuning", "changes", "costs", "statistics"), titles):
        if tables[name].rows:
            parts += [f"## {title}", lines(tables[name]), f"{tables[name].title}."]
    parts += [f"**{name}.** {note}" for name, note in words["notes"]]
    parts += [
        "## To run it again",
        f"```\n{findings.command}\n```",
        "Beside this file: every trial in results.csv, every measurement in curves.csv.",
    ]
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """As Markdown that shows this text, on one line."""
    text = re.sub(r"([\\`*|<$]|~(?=~)|&(?=#?\w+;)|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    return " ".join(text.split())


def _text(path: Path, text: str) -> Path:
    with files.atomic(path) as file:
        file.write(text.encode())
    return path
