"""python -m jaxlm.export --checkpoint=C --out=DIR [--weights=ema]"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxlm.errors import exit_code
from jaxlm.training import checkpoint_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a model as a folder that transformers' from_pretrained reads; exit codes as in `jaxlm.errors`."""
    parser = checkpoint_flags.parser("export", main.__doc__)
    parser.add_argument("--out", required=True, help="a folder that is not there yet, or is empty")
    args = parser.parse_args(argv)

    def run() -> int:
        from jaxlm.training.export import export

        print(export(args.checkpoint, args.out, args.weights))
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
