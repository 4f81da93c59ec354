"""python -m jaxlm.generate --checkpoint=C --prompt=TEXT [--prompts=FILE] [--max_tokens --temperature ... --json]"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import ConfigError, DataError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Prints continuations of prompts by a trained model; exit codes as in `jaxlm.errors`."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.generate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="a run directory, or <run>/checkpoints/<step>")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times; '' starts afresh")
    parser.add_argument("--prompts", help="a UTF-8 file with a prompt on each line")
    parser.add_argument("--max_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    parser.add_argument("--top_k", type=int, default=0, help="0: off")
    parser.add_argument("--top_p", type=float, default=1.0, help="1: off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="a JSON object with prompt, text and tokens on each line")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    check(args)
    prompts = list(args.prompt) + (lines(args.prompts) if args.prompts else [])
    if not prompts:
        raise ConfigError("nothing to continue: give --prompt=TEXT or --prompts=FILE")

    from jaxlm.model.decode import Sampling, complete
    from jaxlm.training.load import load

    loaded = load(args.checkpoint)
    tokenizer = loaded.tokenizer
    encoded = [tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text] for prompt in prompts]
    outputs = complete(
        loaded.program.model,
        loaded.state.params,
        encoded,
        max_tokens=args.max_tokens,
        context_length=loaded.config.model.context_length,
        end_of_text=tokenizer.end_of_text,
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        seed=args.seed,
    )
    for i, (prompt, ids) in enumerate(zip(prompts, outputs, strict=True)):
        text = tokenizer.decode(ids)
        if args.json:
            print(json.dumps({"prompt": prompt, "text": text, "tokens": ids}))
        else:
            print(("\n" + "-" * 40 + "\n" if i else "") + prompt + text)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError where a number makes no sense."""
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise ConfigError(f"--temperature is {args.temperature}; expected zero or more")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top_p is {args.top_p}; expected above 0 and at most 1")
    if args.top_k < 0:
        raise ConfigError(f"--top_k is {args.top_k}; expected zero or more")
    if args.max_tokens < 1:
        raise ConfigError(f"--max_tokens is {args.max_tokens}; expected at least 1")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed is {args.seed}; expected from 0 to 2**32 - 1")


def lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: byte {error.start}") from error


if __name__ == "__main__":
    sys.exit(main())
