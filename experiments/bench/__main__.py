"""python -m experiments.bench [--suite NAME ...] [--quick] [--out DIR]

Progress goes to stderr, the tables to stdout. A full run is stored as results/cpu.json and .md, a part of one under a
name that says so. Exit codes: 0 measured, 1 the sides don't compute the same.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.bench import machine, report

SUITES = ("step", "optimizer", "lanes", "decode", "data", "startup", "save", "load")


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
    from experiments.bench.step import Disagreement

    try:
        for name in suites:
            rows += importlib.import_module(f"experiments.bench.{name}").run(args.quick)
    except Disagreement as error:
        print(f"error: {error}. Nothing is timed that does not agree", file=sys.stderr)
        return 1
    doc = report.document(rows, facts, quick=args.quick)
    stem = "-".join(["cpu", *([] if len(suites) == len(SUITES) else suites), *(["quick"] if args.quick else [])])
    report.store(doc, args.out, stem)
    print(report.markdown(doc))
    machine.say(f"stored {args.out / stem}.json and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
