"""python -m jaxlm.evaluate --checkpoint=C [--data=PATH] [--task=NAME ...] [--stride=N] [--batch_size=N] [--json]
python -m jaxlm.evaluate --checkpoint=C --harness=TASK [...] [--num_fewshot=N] [--limit=N] [--batch_size=N] [--json]
Both take --weights=ema too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxlm.errors import ConfigError, exit_code
from jaxlm.training import checkpoint_flags

FORM = ("format", "prompt", "completion", "text_field")  # of rows


def main(argv: Sequence[str] | None = None) -> int:
    """Prints loss, perplexity by token and by word, bits per byte and accuracy over a whole text, and what tasks on its
    pairs, or those of the lm-evaluation-harness, give, with 95% intervals; exit codes as in `jaxlm.errors`."""
    parser = checkpoint_flags.parser("evaluate", main.__doc__)
    flag = parser.add_argument
    flag("--data", help="text or tokens to evaluate on, as data.source; default: the run's held-out split")
    for name in FORM:
        flag(f"--{name}", help=f"of --data, as data.{name}; default: the run's")
    tasks = "generate, classify, classify_by_length, choice or package.module:function; may be given several times"
    flag("--task", action="append", default=[], help=f"perplexity, which comes with each of the others; {tasks}")
    harness = "a task of lm_eval, or a YAML file of one; may be given several times. Then text is evaluated only where "
    flag("--harness", action="append", default=[], help=f"{harness}--data or --task is given")
    flag("--num_fewshot", type=int, help="with --harness: examples in the prompt")
    flag("--limit", type=int, help="with --harness: so many documents of each task")
    stride = "tokens from one window of the context to the next: the fewer, the more context each token has and the "
    flag("--stride", type=int, default=0, help=f"{stride}longer it takes; 0: windows don't overlap")
    size = "windows or prompts at once; 0: as the run trained with at once, or about 4096 tokens"
    flag("--batch_size", type=int, default=0, help=size)
    flag("--json", action="store_true", help="one JSON object on stdout, the details of tasks included")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    of_text = bool(args.data or args.task or not args.harness)
    check(args, of_text)

    from jaxlm.data import tokenize
    from jaxlm.evals import asking, harness, memory, perplexity, results, tasks
    from jaxlm.training import host
    from jaxlm.training.load import held_out, load_located

    host.settle()
    wanted = {name: asking.find(name) for name in args.task}
    known = harness.find(args.harness) if args.harness else None
    located, (model, params, tokenizer, cfg) = load_located(args.checkpoint, args.weights)
    step = located.step
    if of_text and step is None and not args.data:
        raise ConfigError(f"{args.checkpoint!r} is no run, so it has no held-out text of its own; give --data=PATH")
    cfg = asking.formed(cfg, args.data, {name: getattr(args, name) for name in FORM}, wanted if step is None else ())
    asking.check_format(wanted, cfg.data, f"{args.checkpoint!r}")
    T = cfg.model.context_length
    alike = cfg.data.batch_size // cfg.data.micro_batches if step is not None else max(1, 4096 // T)
    sizes = {"batch_size": args.batch_size or alike, "context_length": T, "chunks": cfg.model.loss_chunks}
    facts: dict[str, Any] = {} if step is None else {"step": step}
    found = {}
    if of_text:
        split = tokenize(args.data, tokenizer, cfg.data, True) if args.data else held_out(located, cfg, tokenizer)
        bar = {"progress": sys.stderr.isatty()}
        subject = tasks.Subject(model, params, tokenizer, split, **sizes, **bar, too_long=cfg.data.too_long)
        asking.check(wanted, subject)
    with memory.explained(sizes["batch_size"], f"give --batch_size below {sizes['batch_size']:,}"):
        if of_text:
            how = {"stride": args.stride, **sizes, **bar}
            facts |= perplexity.evaluate_split(model, params, tokenizer, split, cfg.data, **how)
            found = {name: function(subject) for name, function in wanted.items()}
        if args.harness:
            asked = {"num_fewshot": args.num_fewshot, "limit": args.limit}
            of_harness = harness.run(model, params, tokenizer, args.harness, known, **sizes, **asked)
            found["harness"] = results.plain("harness", of_harness)
    print(results.report(facts, found, args.json), end="")
    return 0


def check(args: argparse.Namespace, of_text: bool) -> None:
    """Raises ConfigError where a flag makes no sense, or stands without the one that it is for."""
    if not 0 <= args.batch_size < 2**31:
        what = f"--batch_size is {args.batch_size}; expected at least 1 and below 2**31"
        raise ConfigError(f"{what}, or 0 for that of the training")
    if args.data == "":
        raise ConfigError("--data is empty; expected text or tokens, or no --data for the run's held-out split")
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        if (given := getattr(args, name)) is not None and not args.harness:
            raise ConfigError(f"--{name}={given} is for tasks of the harness; give --harness=TASK too")
        if given is not None and given < least:
            raise ConfigError(f"--{name} is {given}; expected at least {least}")
    if args.stride and not of_text:
        raise ConfigError(f"--stride={args.stride} is for text; give --data=PATH or --task=NAME too")


if __name__ == "__main__":
    sys.exit(main())
