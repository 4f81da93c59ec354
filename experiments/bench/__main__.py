"""python -m experiments.bench [--suite NAME ...] [--quick] [--out DIR]

Progress goes to stderr, the tables to stdout. A full run is stored as results/cpu.json and .md, a part of one under a
name that says so. Exit codes: 0 measured, 1 the sides of a suite don't compute the same, or a suite broke: the others'
figures are stored, with a note.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from experiments.bench import machine, report

SUITES = ("step", "switches", "optimizer", "energy", "lanes", "decode", "data", "startup", "host", "checkpoint", "load")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="less of everything: to see that it works")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON and Markdown files")
    args = parser.parse_args(argv)
    suites = [name for name in SUITES if name in args.suite]
    os.environ["JAX_PLATFORMS"] = "cpu"  # GPUs have gpu.sh

    facts = machine.facts()
    rows: list[report.Row] = []
    notes: list[str] = []
    for name in suites:
        try:
            rows += importlib.import_module(f"experiments.bench.{name}").run(args.quick)
        except Exception as error:  # a Disagreement, or a suite that broke
            traceback.print_exc()
            notes.append(f"Suite {name} failed: {type(error).__name__}: {error}.")
    doc = report.document(rows, facts, quick=args.quick, notes=notes)
    stem = "-".join(["cpu", *([] if len(suites) == len(SUITES) else suites), *(["quick"] if args.quick else [])])
    report.store(doc, args.out, stem)
    print(report.markdown(doc))
    machine.say(f"stored {args.out / stem}.json and .md")
    return 1 if notes else 0


if __name__ == "__main__":
    sys.exit(main())
