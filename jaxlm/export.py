"""python -m jaxlm.export --checkpoint=C --out=DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxlm.errors import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a model as a folder that transformers' from_pretrained reads; exit codes as in `jaxlm.errors`."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.export", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run directory, <run>/checkpoints/<step>, a Hugging Face directory or a hub id",
    )
    parser.add_argument("--out", required=True, help="a folder that is not there yet, or is empty")
    args = parser.parse_args(argv)

    def run() -> int:
        from jaxlm.training.export import export

        print(export(args.checkpoint, args.out))
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
