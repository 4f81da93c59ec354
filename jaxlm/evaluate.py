"""python -m jaxlm.evaluate --checkpoint=C [--data=PATH] [--task=NAME ...] [--stride=N] [--batch_size=N] [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxlm.errors import ConfigError, DataError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Prints loss, perplexity by token and by word, bits per byte and accuracy over a whole text, and what tasks on its
    pairs give, with 95% intervals; exit codes as in `jaxlm.errors`."""
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
        "--task",
        action="append",
        default=[],
        help="generate, classify, classify_by_length, or package.module:function; may be given several times",
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
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the details of tasks included")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 0:
        raise ConfigError(f"--batch_size is {args.batch_size}; expected at least 1, or 0 for that of the training")

    from jaxlm import data
    from jaxlm.evals import asking, perplexity, tasks
    from jaxlm.training.load import load, locate

    wanted = {name: asking.find(name) for name in args.task}
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
    batch_size = args.batch_size or (cfg.data.batch_size if step is not None else max(1, 4096 // T))
    shown = {"batch_size": batch_size, "context_length": T}
    progress = sys.stderr.isatty()
    facts: dict[str, Any] = {} if step is None else {"step": step}
    facts |= perplexity.evaluate_split(
        model, params, tokenizer, split, cfg.data, stride=args.stride, progress=progress, **shown
    )
    subject = tasks.Subject(model, params, tokenizer, split, **shown)
    results = {name: function(subject) for name, function in wanted.items()}
    intervals = {f"eval/{name}": pair for result in results.values() for name, pair in result.intervals.items()}
    facts |= {f"eval/{name}": value for result in results.values() for name, value in result.metrics.items()}
    if args.json:
        details = {name: result.details for name, result in results.items()}
        print(json.dumps(facts | ({"intervals": intervals, "details": details} if results else {})))
        return 0
    width = max(20, *map(len, facts))
    for name, value in facts.items():
        interval = "  [{:,.4f}, {:,.4f}]".format(*intervals[name]) if name in intervals else ""
        print(f"{name:<{width}} " + (f"{value:,}" if isinstance(value, int) else f"{value:,.4f}") + interval)
    for result in results.values():
        print(result.text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
