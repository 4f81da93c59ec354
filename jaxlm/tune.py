"""python -m jaxlm.tune lr --config=configs/x.py[:arg] --workdir=DIR [--low --high --peaks --seeds --steps --field]
python -m jaxlm.tune throughput --config=configs/x.py[:arg] [--workdir=DIR --seconds --again]"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

from jaxlm import config, config_file, files
from jaxlm.errors import exit_code
from jaxlm.main import name, overrides
from jaxlm.training import lock

_SEED = 100  # and those after it: not 0, 1, ..., on which a study then compares what is found here


def main(argv: Sequence[str] | None = None) -> int:
    """Looks for a good peak learning rate, or for the fastest way to compute a step. Exit codes as in
    `jaxlm.errors`."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.tune", description=main.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[..., argparse.Action]:
        about = " ".join((run.__doc__ or "").split())
        added = commands.add_parser(name, description=about, help=about, allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument("--config", required=True, help="a Python file with get_config(arg), as path[:arg]")
        return added.add_argument

    flag = command("lr", rate)
    flag("--workdir", help="of the runs; default runs/<config name>-lr")
    flag("--low", type=float, default=1e-5, help="the lowest peak")
    flag("--high", type=float, default=1.0, help="the highest peak")
    flag("--peaks", type=int, default=16, help="how many, each the same factor above the one before")
    flag("--seeds", type=int, default=3, help="runs at each peak; seeds 100, 101, ...")
    flag("--steps", type=int, default=100, help="of each run; the whole schedule passes in them")
    flag("--field", default="", help="the config field that is varied; default: the chain's peak")
    flag = command("throughput", throughput)
    flag("--workdir", help="of flags.txt; default runs/<config name>-throughput")
    flag("--seconds", type=float, default=600, help="no other way is tried after that")
    flag("--again", action="store_true", help="also where the fastest way was found before")
    args, rest = parser.parse_known_args(argv)

    def run() -> int:
        args.rest, args.workdir = rest, files.workdir(args.workdir, f"runs/{name(args.config)}-{args.what}")
        ended: int = args.run(args)
        return ended

    return exit_code(run)


def rate(args: argparse.Namespace) -> int:
    """Looks for a good peak learning rate, by short runs over many peaks and some seeds."""
    lock.check(args.workdir)  # before anything slow
    cfg = config.override(config_file.load(args.config), overrides(args.rest))

    from jaxlm.ablation import rates
    from jaxlm.training import host

    host.settle()
    bounds = {"low": args.low, "high": args.high, "count": args.peaks}
    seeds = range(_SEED, _SEED + args.seeds)
    found = rates.range_test(cfg, args.workdir, **bounds, seeds=seeds, steps=args.steps, field=args.field)
    print(rates.describe(found, args.steps))
    if (picture := args.workdir / "lr.png").exists():
        print(picture)
    return 0


def throughput(args: argparse.Namespace) -> int:
    """Looks for the fastest way to compute a step that fits the memory."""
    cfg = config.override(config_file.load(args.config), overrides(args.rest))

    from jaxlm.telemetry import progress
    from jaxlm.training import host, throughput

    host.settle()
    say = functools.partial(progress.say, None)
    found = throughput.search(cfg, seconds=args.seconds, again=args.again, say=say)
    print(throughput.describe(found))
    args.workdir.mkdir(parents=True, exist_ok=True)
    with files.atomic(args.workdir / "flags.txt") as file:  # for $(cat flags.txt)
        file.write(f"{throughput.flags(found)}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
