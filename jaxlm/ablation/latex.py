"""A report's table for a paper: a LaTeX tabular with the rules of the package booktabs."""

from __future__ import annotations

import math
import re

from jaxlm.ablation.tables import Table

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "–": "--",
    "“": "``",
    "”": "''",
    **{one: f"\\{one}" for one in "&%$#_{}"},
}


def tabular(table: Table) -> str:
    """The table, words to the left and numbers to the right; `\\usepackage{booktabs}`."""
    numeric = [
        any(isinstance(key := row[i].key, (int, float)) and not math.isnan(key) for row in table.rows)
        for i in range(len(table.headers))
    ]
    lines = [" & ".join(map(escaped, table.headers)) + r" \\", r"\midrule"]
    lines += [" & ".join(_cell(cell.text, one) for cell, one in zip(row, numeric)) + r" \\" for row in table.rows]
    columns = "".join("r" if one else "l" for one in numeric)
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escaped(text: str) -> str:
    """As LaTeX that shows this text, on one line."""
    return "".join(_ESCAPED.get(one, one) for one in " ".join(text.split()))


def _cell(text: str, number: bool) -> str:
    """With the minus signs of numbers as LaTeX sets them."""
    shown = escaped(text)
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", shown) if number else shown
