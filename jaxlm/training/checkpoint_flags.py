"""The flags of the doors that begin with `load`: which model, and which of its parameters. Light, so that --help is."""

from __future__ import annotations

import argparse

WHERE = "a run directory, <run>/checkpoints/<step>, a Hugging Face directory or a hub id"


def parser(door: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m jaxlm.<door>`, with --checkpoint and --weights, which are the arguments of `load`."""
    out = argparse.ArgumentParser(prog=f"python -m jaxlm.{door}", description=description, allow_abbrev=False)
    out.add_argument("--checkpoint", required=True, help=WHERE)
    which = "ema: the average that a run with ema_of_params kept; default: the parameters that are the run's result"
    out.add_argument("--weights", default="", help=which)
    return out
