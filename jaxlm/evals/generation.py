"""Texts that follow prompts, by a model and its tokenizer: several samples, stop strings, text as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data import special
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import ConfigError
from jaxlm.model.decode import EVERY, ROWS, complete
from jaxlm.model.gpt2 import Model, PyTree
from jaxlm.model.sampling import Sampling
from jaxlm.telemetry.progress import tracked

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Request(NamedTuple):
    """What is asked for each prompt. The numbers in between are those of `sampling.Sampling`."""

    max_tokens: int
    num_samples: int = 1
    seed: int = 0  # of the first sample; sample n has seed + n, and depends on nothing else that is asked for
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()  # a text ends before the first of these strings
    beyond: str = "slide"  # or "stop", where the context is full: see `decode.complete`


class Sample(NamedTuple):
    prompt: str
    text: str  # what follows it
    tokens: list[int]  # of the text; the last one may spell more, where a stop string begins within it
    logprobs: list[float]  # of the tokens, under the model's own softmax, whatever they were drawn from
    finish_reason: str  # "length" "end_of_text" "stop"
    seed: int


def check(request: Request, prefix: str = "") -> None:
    """Raises ConfigError where a number makes no sense; `prefix` goes before its name, as "--" where it was a flag."""
    r = request
    rules = {
        "max_tokens": (r.max_tokens >= 1, "at least 1"),
        "num_samples": (1 <= r.num_samples <= 10**6, "from 1 to 1,000,000"),
        "seed": (0 <= r.seed <= 2**32 - r.num_samples, "from 0 to 2**32 - num_samples"),
        "temperature": (0 <= r.temperature <= LARGEST, "zero or more"),
        "top_k": (0 <= r.top_k < 2**31, "from 0, which is off, to 2**31 - 1"),
        "top_p": (0 < r.top_p <= 1, "above 0 and at most 1"),
        "repetition_penalty": (SMALLEST <= r.repetition_penalty <= LARGEST, "above 0; 1 is off"),
        "stop": (strings(r.stop) and all(r.stop), "a list of strings that are not empty"),
        "beyond": (r.beyond in ("slide", "stop"), "'slide' or 'stop'"),
    }
    for name, (kept, expected) in rules.items():
        if not kept:
            raise ConfigError(f"{prefix}{name} is {getattr(r, name)!r}; expected {expected}")


def strings(given: object) -> bool:
    """Whether it is a sequence of strings, and not a string, which is one of its letters."""
    return isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(x, str) for x in given)


def samples(
    model: Model,
    params: PyTree,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    request: Request,
    context_length: int,
    show: Callable[[str], None] | None = None,
) -> list[Sample]:
    """The samples of each prompt, in the order of prompts. An empty prompt begins with the end of text.

    Args:
      show: for one prompt and one sample: is given its text as it comes, in pieces that joined are `text`.

    Raises:
      ConfigError: `request` makes no sense, `prompts` are no list of strings, or the context is longer than the
        model's.
      DataError: a prompt has characters that the tokenizer doesn't know.
    """
    check(request)  # before there are as many rows as it asks for
    if not strings(prompts):
        raise ConfigError(f"prompts is {prompts!r}; expected a list of strings")
    rows = [(prompt, request.seed + n) for prompt in prompts for n in range(request.num_samples)]
    found = continued(
        model,
        params,
        tokenizer,
        [encode(tokenizer, prompt) for prompt, _ in rows],
        [seed for _, seed in rows],
        request,
        context_length,
        show,
        joined=True,
    )
    return [Sample(prompt, *text, seed) for (prompt, seed), text in zip(rows, found, strict=True)]


class Continuation(NamedTuple):
    """See `Sample`."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


def continued(
    model: Model,
    params: PyTree,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    request: Request,
    context_length: int,
    show: Callable[[str], None] | None = None,
    progress: bool = False,
    joined: bool = False,
    rows: int = ROWS,
) -> list[Continuation]:
    """What follows each prompt of ids, none of which is empty; otherwise as `samples`.

    Args:
      progress: show a bar on stderr.
      joined: a text is to stand right after its prompt, and keeps the space at its start; else, where the tokenizer
        has it so, it is a text of its own and has none.
      rows: at most so many prompts at a time, and never more than `decode.ROWS`.
    """
    check(request)
    stop, shown = request.stop, 0

    def spelled(prompt: list[int], tokens: list[int]) -> str:
        fresh = not joined or prompt[-1] == tokenizer.end_of_text
        return tokenizer.decode(tokens) if fresh else tokenizer.decode_on(tokens)

    def over(row: int, tokens: list[int]) -> bool:
        nonlocal shown
        text = spelled(prompts[first + row], tokens)
        cut = before(text, stop)
        if show:
            certain = cut if len(cut) < len(text) else settled(text, stop)
            show(certain[shown:])
            shown = max(shown, len(certain))
        return len(cut) < len(text)

    rows = 1 << (min(rows, ROWS).bit_length() - 1)  # `complete` fills up to a power of two
    unstacked, completions = model.unstack(params), []
    for first in tracked(range(0, len(prompts), rows), "writing", progress):
        completions += complete(
            model,
            unstacked,
            prompts[first : first + rows],
            seeds[first : first + rows],
            max_tokens=request.max_tokens,
            context_length=context_length,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            sampling=Sampling(*(getattr(request, name) for name in Sampling._fields)),
            beyond=request.beyond,
            over=over if stop or show else None,
            every=1 if show else EVERY,
        )
    out = []
    for prompt, (tokens, logprobs, finish) in zip(prompts, completions, strict=True):
        text = before(spelled(prompt, tokens), stop)
        n = len(tokens)
        while finish == "stop" and n and spelled(prompt, tokens[: n - 1]).startswith(text):
            n -= 1
        out.append(Continuation(text, tokens[:n], logprobs[:n], finish))
    if show:
        show(out[0].text[shown:])
    return out


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt that an operator writes: what special tokens it spells out are tokens."""
    return special.encode(tokenizer, prompt) or [tokenizer.end_of_text]


def before(text: str, stop: Sequence[str]) -> str:
    """The text up to the stop string that is complete first: then what follows doesn't matter."""
    found = [(at + len(string), at) for string in stop if (at := text.find(string)) >= 0]
    return text[: min(found)[1]] if found else text


def settled(text: str, stop: Sequence[str]) -> str:
    """What stays of a text whatever follows: not a character that lacks bytes, nor the beginning of a stop string."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    begun = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
    return text[: len(text) - max(begun, default=0)]
