"""A table for a paper."""

import math
import shutil
import subprocess

import pytest

from jaxlm.ablation import latex, tables
from jaxlm.ablation.tables import Cell, Table
from tests.ablation.test_report import study


def test_a_table_is_a_tabular_with_escaped_names():
    rows = [
        [Cell("a_b & 50% #1 {x} $y$ \\ ~^", "a"), Cell("2.1 ± 0.1", 2.1), Cell("[-0.2, +0.1]", -0.2)],
        [Cell("b-1", "b"), Cell("–", math.nan), Cell("-1.00e-10", -1e-10)],
    ]
    assert (
        latex.tabular(Table("", ("Variant", "eval/loss", "Interval"), rows))
        == r"""\begin{tabular}{lrr}
\toprule
Variant & eval/loss & Interval \\
\midrule
a\_b \& 50\% \#1 \{x\} \$y\$ \textbackslash{} \textasciitilde{}\textasciicircum{} & 2.1 $\pm$ 0.1 & [$-$0.2, +0.1] \\
b-1 & -- & $-$1.00e-10 \\
\bottomrule
\end{tabular}
"""
    )


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_latex_sets_the_ranking(tmp_path):
    body = latex.tabular(tables.tables(study())["ranking"])
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs}"
    (tmp_path / "t.tex").write_text(rf"\documentclass{{article}}{packages}\begin{{document}}{body}\end{{document}}")
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)
