"""python -m jaxlm.tune lr --config=configs/x.py[:arg] --workdir=DIR [--low --high --peaks --seeds --steps --field]
python -m jaxlm.tune throughput --config=configs/x.py[:arg] [--workdir=DIR --seconds --again]"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm import config, config_file, files
from jaxlm.errors import exit_code
from jaxlm.main import name, overrides
from jaxlm.training import lock


def main(argv: Sequence[str] | None = None) -> int:
    """Looks for a good peak learning rate, by short runs over many peaks and some seeds; or for the fastest way to
    compute a step that fits the memory. Exit codes as in `jaxlm.errors`."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.tune", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=("lr", "throughput"), help="what to tune")
    parser.add_argument("--config", required=True, help="a Python file with get_config(arg), as path[:arg]")
    parser.add_argument("--workdir", help="of the runs, or of flags.txt; default runs/<config name>-<what>")
    parser.add_argument("--low", type=float, default=1e-5, help="the lowest peak")
    parser.add_argument("--high", type=float, default=1.0, help="the highest peak")
    parser.add_argument("--peaks", type=int, default=16, help="how many, each the same factor above the one before")
    parser.add_argument("--seeds", type=int, default=3, help="runs at each peak")
    parser.add_argument("--steps", type=int, default=100, help="of each run; the whole schedule passes in them")
    parser.add_argument("--field", default="", help="the config field that is varied; default: the chain's peak")
    parser.add_argument("--seconds", type=float, default=600, help="of throughput: no other way is tried after that")
    parser.add_argument("--again", action="store_true", help="throughput: also where it was found before")
    args, rest = parser.parse_known_args(argv)

    workdir = Path(args.workdir or f"runs/{name(args.config)}-{args.what}")

    def throughput() -> int:
        cfg = config.override(config_file.load(args.config), overrides(rest))

        from jaxlm.training import host, throughput

        host.settle()
        say = functools.partial(print, file=sys.stderr, flush=True)
        found = throughput.search(cfg, seconds=args.seconds, again=args.again, say=say)
        print(throughput.describe(found))
        workdir.mkdir(parents=True, exist_ok=True)
        with files.atomic(workdir / "flags.txt") as file:  # for $(cat flags.txt)
            file.write(f"{throughput.flags(found)}\n".encode())
        return 0

    def rate() -> int:
        lock.check(workdir)  # before anything slow
        cfg = config.override(config_file.load(args.config), overrides(rest))

        from jaxlm.ablation import rates
        from jaxlm.training import host

        host.settle()
        bounds = {"low": args.low, "high": args.high, "count": args.peaks}
        found = rates.range_test(cfg, workdir, **bounds, seeds=range(args.seeds), steps=args.steps, field=args.field)
        print(rates.describe(found, args.steps))
        if (picture := workdir / "lr.png").exists():
            print(picture)
        return 0

    return exit_code(throughput if args.what == "throughput" else rate)


if __name__ == "__main__":
    sys.exit(main())
