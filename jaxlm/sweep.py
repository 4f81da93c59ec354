"""python -m jaxlm.sweep --experiment=experiments/NNN_slug.py --workdir=DIR [--dry_run] [--executor=local|ray]"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm import files
from jaxlm.errors import ConfigError, exit_code
from jaxlm.training import lock


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study, or goes on with it, and writes its report; exit codes as in `jaxlm.errors`."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.sweep", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--experiment", required=True, help="a Python file with study()")
    parser.add_argument("--workdir", help="the study's directory; default runs/<name of the file>")
    parser.add_argument("--dry_run", action="store_true", help="print trials, lanes, FLOPs and time, and exit")
    parser.add_argument("--executor", default="local", choices=("local", "ray"), help="where trials are trained")
    parser.add_argument("--address", default="", help="of a Ray cluster; default: one of this machine, for this study")
    args = parser.parse_args(argv)

    def run() -> int:
        if args.address and args.executor != "ray":
            raise ConfigError(f"--address={args.address} is of a Ray cluster; give --executor=ray too")
        name = Path(args.experiment).stem
        workdir = files.workdir(args.workdir, f"runs/{name}")
        if not args.dry_run:
            lock.check(workdir)  # before anything slow

        from jaxlm.ablation import preview, runner, study
        from jaxlm.training import host

        found = study.load(args.experiment)
        host.settle()
        if args.dry_run:
            print(preview.describe(found, runner.say))
            return 0
        execute: runner.Execute = runner.local
        if args.executor == "ray":
            from jaxlm.ablation import cluster

            execute = cluster.on_ray(args.address)
        given = {"experiment": args.experiment, "workdir": args.workdir, "address": args.address}
        given |= {"executor": args.executor if args.executor != "local" else ""}
        flags = [f"--{flag}={value}" for flag, value in given.items() if value]
        command = shlex.join(["python", "-m", "jaxlm.sweep", *flags])
        runner.run(found, workdir, name=name, command=command, execute=execute)
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
