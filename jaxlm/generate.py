"""python -m jaxlm.generate --checkpoint=C --prompt=TEXT [--prompts=FILE] [--max_tokens --temperature ... --json]"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import ConfigError, DataError, exit_code
from jaxlm.training import checkpoint_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Prints continuations of prompts by a trained model; exit codes as in `jaxlm.errors`."""
    parser = checkpoint_flags.parser("generate", main.__doc__)
    flag = parser.add_argument
    flag("--prompt", action="append", default=[], help="may be given several times; '' starts afresh")
    flag("--prompts", help="a UTF-8 file with a prompt on each line")
    flag("--num_samples", type=int, default=1, help="texts for each prompt, with seeds seed, seed + 1, ...")
    flag("--max_tokens", type=int, default=200)
    flag("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    flag("--top_k", type=int, default=0, help="0: off")
    flag("--top_p", type=float, default=1.0, help="1: off")
    flag("--repetition_penalty", type=float, default=1.0, help="1: off; above 1, ids seen before get rarer")
    flag("--stop", action="append", default=[], help="a text ends before this; may be given several times")
    flag("--beyond", choices=("slide", "stop"), default="slide", help="once the context is full: go on from half of it")
    flag("--seed", type=int, default=0)
    flag("--stream", action=argparse.BooleanOptionalAction, help="print as tokens come, as one text on a terminal is")
    flag("--json", action="store_true", help="a line each: prompt text tokens logprobs finish_reason seed")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    from jaxlm.evals import generation, memory
    from jaxlm.telemetry.writers import json_line
    from jaxlm.training import host
    from jaxlm.training.load import load

    request = generation.Request(**{name: getattr(args, name) for name in generation.Request._fields})
    generation.check(request, prefix="--")
    prompts = [("--prompt", text) for text in args.prompt] + (lines(args.prompts) if args.prompts is not None else [])
    single = len(prompts) * args.num_samples == 1 and not args.json
    check(args, len(prompts), single)

    host.settle()
    model, params, tokenizer, config = load(args.checkpoint, args.weights)
    context = config.model.context_length
    for where, text in prompts:
        size = len(generation.encode(tokenizer, text))
        if size >= context:
            what = f"{where} {text[:20]!r}... has {size:,} tokens, and the model's context is {context:,}"
            if args.beyond == "stop":
                raise (ConfigError if where == "--prompt" else DataError)(f"{what}; --beyond=slide reads its end")
            print(f"{what}: its last {context // 2:,} are read", file=sys.stderr)
    stream = single and (sys.stdout.isatty() if args.stream is None else args.stream)
    show = functools.partial(print, end="", flush=True) if stream else None
    if show:
        show(prompts[0][1])
    rows = min(generation.ROWS, len(prompts) * args.num_samples)
    with memory.explained(rows, f"give fewer than {rows} texts at a time, or --max_tokens"):
        samples = generation.samples(model, params, tokenizer, [text for _, text in prompts], request, context, show)
    if show:
        print()
    for i, sample in enumerate([] if show else samples):
        between = ("\n" + "-" * 40 + "\n") if i else ""
        text = between + sample.prompt + sample.text + "\n"
        print(json_line(sample._asdict()) if args.json else text, end="")
    return 0


def check(args: argparse.Namespace, prompts: int, single: bool) -> None:
    """Raises ConfigError where flags make no sense together, or are no text."""
    for text in args.prompt + args.stop:
        if any("\ud800" <= character <= "\udfff" for character in text):  # so Python writes what is not UTF-8
            raise ConfigError(f"{text!r} on the command line is not UTF-8")
    if not prompts:
        raise ConfigError("nothing to continue: give --prompt=TEXT or --prompts=FILE")
    if args.stream and not single:
        raise ConfigError(
            f"--stream prints one text, without --json; {prompts} prompts, {args.num_samples} samples each"
        )


def lines(file: str) -> list[tuple[str, str]]:
    """(where it is, text) of each line."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig") if file else ""
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: byte {error.start}") from error
    if not text:
        raise DataError(f"--prompts={file} is empty; expected a file with a prompt on each line")
    return [(f"{file}:{n}", line) for n, line in enumerate(text.removesuffix("\n").split("\n"), 1)]


if __name__ == "__main__":
    sys.exit(main())
