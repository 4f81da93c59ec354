"""python -m jaxlm.main --config=configs/x.py[:arg] --workdir=DIR [--config.a.b=v ...] [--explain]"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm import config, config_file, files
from jaxlm.errors import ConfigError, exit_code
from jaxlm.training import lock, meeting


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a config, or resumes it; exit codes as in `jaxlm.errors`."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.main", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a Python file with get_config(arg), as path[:arg]")
    parser.add_argument("--workdir", help="run directory; default runs/<config name>")
    parser.add_argument(
        "--explain", action="store_true", help="print what the config means, draw its schedule.png, and exit"
    )
    parser.add_argument(
        "--verify_resume",
        nargs="?",
        type=int,
        const=20,
        metavar="STEPS",
        help="train STEPS steps (20) straight, and again with kills on the way, and compare all bits; no workdir",
    )
    parser.add_argument("--coordinator_address", help="HOST:PORT of process 0, where several processes train together")
    parser.add_argument("--num_processes", type=int, help="how many there are; Slurm and Open MPI say so themselves")
    parser.add_argument("--process_id", type=int, help="the number of this one, from 0")
    args, rest = parser.parse_known_args(argv)

    def run() -> int:
        workdir = files.workdir(args.workdir, f"runs/{name(args.config)}")
        together = meeting.asked(args.coordinator_address, args.num_processes, args.process_id)
        if not args.explain and args.verify_resume is None and not together:
            lock.check(workdir)  # before anything slow
        cfg = config.override(config_file.load(args.config), overrides(rest))
        if args.explain:
            from jaxlm.training.explain import explain

            print(explain(cfg, workdir))
            return 0
        if args.verify_resume is not None:
            from jaxlm.training.verify import verify_resume

            print(verify_resume(cfg, args.verify_resume))
            return 0
        from jaxlm.training import host, loop, processes

        host.settle()
        with processes.joined(together) if together else contextlib.nullcontext():
            return loop.train(cfg, workdir).exit_code

    return exit_code(run)


def overrides(rest: Sequence[str]) -> dict[str, str]:
    """{"a.b": "v"} of `--config.a.b=v` and `--config.a.b v`.

    Raises:
      ConfigError: something else is on the command line.
    """
    out: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        match = re.fullmatch(r"--config\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
        if not match:
            raise ConfigError(f"unknown flag {word!r}; fields of the config are set as --config.steps=100")
        value = match[2] if match[2] is not None else next(words, None)
        if value is None:
            raise ConfigError(f"{word} lacks its value")
        out[match[1]] = value
    return out


def name(spec: str) -> str:
    """The run's name: configs/x.py:arg -> x-arg."""
    file, _, arg = spec.partition(":")
    return "-".join(filter(None, [Path(file).stem, re.sub(r"[^\w.]+", "-", arg)]))


if __name__ == "__main__":
    sys.exit(main())
