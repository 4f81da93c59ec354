"""python -m jaxlm.evaluate --checkpoint=C [--data=PATH] [--task=NAME ...] [--stride=N] [--batch_size=N] [--json]
python -m jaxlm.evaluate --checkpoint=C --harness=TASK [...] [--num_fewshot=N] [--limit=N] [--batch_size=N] [--json]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxlm.errors import ConfigError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Prints loss, perplexity by token and by word, bits per byte and accuracy over a whole text, and what tasks on its
    pairs, or those of the lm-evaluation-harness, give, with 95% intervals; exit codes as in `jaxlm.errors`."""
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
        help="perplexity, which is loss, perplexity and bits per byte and comes with each of the others; generate, "
        "classify, classify_by_length, choice or package.module:function; may be given several times",
    )
    parser.add_argument(
        "--harness",
        action="append",
        default=[],
        help="a task of lm_eval, or a YAML file of one; may be given several times. Then text is evaluated only where "
        "--data or --task is given",
    )
    parser.add_argument("--num_fewshot", type=int, help="with --harness: examples in the prompt")
    parser.add_argument("--limit", type=int, help="with --harness: so many documents of each task")
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
    if args.data == "":
        raise ConfigError("--data is empty; expected text or tokens, or no --data for the run's held-out split")

    from jaxlm import data
    from jaxlm.evals import asking, harness, perplexity, tasks
    from jaxlm.training import host
    from jaxlm.training.load import held_out, load, locate

    host.settle()
    wanted = {name: asking.find(name) for name in args.task}
    step = (located := locate(args.checkpoint)).step
    of_text = bool(args.data or args.task or not args.harness)
    if of_text and step is None and not args.data:
        raise ConfigError(f"{args.checkpoint!r} is no run, so it has no held-out text of its own; give --data=PATH")
    model, params, tokenizer, cfg = load(args.checkpoint)
    T = cfg.model.context_length
    batch_size = args.batch_size or (cfg.data.batch_size if step is not None else max(1, 4096 // T))
    shown = {"batch_size": batch_size, "context_length": T}
    facts: dict[str, Any] = {} if step is None else {"step": step}
    results = {}
    if of_text:
        if args.data:
            split = data.tokenize(args.data, tokenizer, cfg.data, progress=True)
        else:
            split = held_out(located, cfg, tokenizer)
        bar = {"progress": sys.stderr.isatty()}
        how = {"stride": args.stride, "chunks": cfg.model.loss_chunks}
        facts |= perplexity.evaluate_split(model, params, tokenizer, split, cfg.data, **how, **shown, **bar)
        subject = tasks.Subject(model, params, tokenizer, split, **shown, **bar, too_long=cfg.data.too_long)
        results = {name: function(subject) for name, function in wanted.items()}
    if args.harness:
        asked = {"num_fewshot": args.num_fewshot, "limit": args.limit}
        results["harness"] = harness.run(model, params, tokenizer, args.harness, **shown, **asked)
    print(asking.report(facts, results, args.json), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
