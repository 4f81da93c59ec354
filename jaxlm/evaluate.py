"""python -m jaxlm.evaluate --checkpoint=C [--data=PATH] [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from jaxlm.errors import DataError, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Prints loss, perplexity, bits per byte and accuracy over a whole split; exit codes as in `jaxlm.errors`."""
    parser = argparse.ArgumentParser(prog="python -m jaxlm.evaluate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="a run directory, or <run>/checkpoints/<step>")
    parser.add_argument(
        "--data", help="text or tokens to evaluate on, as data.source; default: the run's held-out split"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    import jax

    from jaxlm import data
    from jaxlm.evals import perplexity
    from jaxlm.training.load import load

    loaded = load(args.checkpoint)
    section, model = loaded.config.data, loaded.config.model
    split = data.tokenize(args.data, loaded.tokenizer, section) if args.data else data.open(section).validation
    if split is None:
        raise DataError("the run held out no validation data; give --data=PATH")
    eval_step = jax.jit(loaded.program.eval_step)
    metrics = perplexity.evaluate(
        lambda batch: eval_step(loaded.state, batch),
        data.evaluation(split.tokens, section.batch_size, model.context_length),
        bytes_per_token=split.num_bytes / split.num_tokens,
    )
    facts = {"step": int(loaded.state.step), "tokens": split.num_tokens - 1} | metrics
    if args.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<20} {value:,}" if isinstance(value, int) else f"{name:<20} {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
