"""python -m jaxlm.evaluate --checkpoint=C [--data=PATH] [--stride=N] [--batch_size=N] [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from jaxlm.errors import ConfigError, DataError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Prints loss, perplexity by token and by word, bits per byte and accuracy over a whole text; exit codes as in
    `jaxlm.errors`."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.evaluate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run directory, <run>/checkpoints/<step>, a Hugging Face directory or a hub id",
    )
    parser.add_argument(
        "--data", help="text or tokens to evaluate on, as data.source; default: the run's held-out split"
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        help="tokens from one window of the context to the next: the fewer, the more context each token has and the "
        "longer it takes; 0: windows don't overlap",
    )
    parser.add_argument(
        "--batch_size", type=int, default=0, help="windows at once; 0: as the run trained with, or about 4096 tokens"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 0:
        raise ConfigError(f"--batch_size is {args.batch_size}; expected at least 1, or 0 for that of the training")

    from jaxlm import data
    from jaxlm.evals import perplexity
    from jaxlm.training.load import load, locate

    step = locate(args.checkpoint).step
    if step is None and not args.data:
        raise ConfigError(f"{args.checkpoint!r} is no run, so it has no held-out text of its own; give --data=PATH")
    model, params, tokenizer, cfg = load(args.checkpoint)
    T = cfg.model.context_length
    if args.data:
        split = data.tokenize(args.data, tokenizer, cfg.data, progress=True)
    else:
        opened = data.open(cfg.data, progress=True)
        if opened.tokenizer.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"data.source={cfg.data.source!r} has changed since the run, and its tokenizer; give --data"
            )
        if opened.validation is None:
            raise ConfigError("the run held out no text; give --data=PATH")
        split = opened.validation
    metrics = perplexity.evaluate_split(
        model,
        params,
        tokenizer,
        split,
        cfg.data,
        batch_size=args.batch_size or (cfg.data.batch_size if step is not None else max(1, 4096 // T)),
        context_length=T,
        stride=args.stride,
        progress=sys.stderr.isatty(),
    )
    facts = ({} if step is None else {"step": step}) | metrics
    if args.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<20} {value:,}" if isinstance(value, int) else f"{name:<20} {value:,.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
