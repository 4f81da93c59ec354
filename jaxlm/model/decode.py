"""Generation with a key-value cache: prompts are read at once, then tokens come one by one, several to a call.

Shape letters: B batch, P prompt length after padding, N new tokens, V vocabulary.

Compiled for buckets: rows are filled up to a power of two of at most `ROWS`; prompts, on the left, to a power of two of
at least `SHORTEST`; and the cache has slots for the power of two at or above `max_tokens`, or for what the context can
take of the longest row; where they are full, rows are read again. A row whose context is full waits for that, or until
all are: so most are full at the same time from there on. A row never looks at what fills. So its tokens are those of
its prompt and seed, up to rounding: products of more rows, and sums over more slots, are taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import ConfigError
from jaxlm.model.gpt2 import Cache, Model, PyTree
from jaxlm.model.sampling import Draws, Sampling, draw

ROWS = 32
"""At a time. Of GPT-2 124M's cache, 1,024 slots of a row take 75 MB in float32."""

SHORTEST = 16

EVERY = 16
"""Tokens a call. On the CPU one a call was as fast; on a GPU the host's look at them would show."""


class State(NamedTuple):
    """Rows between two tokens."""

    token_B: jax.Array  # int32: drawn, and not in the cache yet
    logprob_B: jax.Array  # float32: of that token
    drawn_B: jax.Array  # int32: tokens drawn so far
    seen_BV: jax.Array  # bool: the ids in the row but for that token, for the repetition penalty
    cache: Cache


class Completion(NamedTuple):
    tokens: list[int]  # without the end of text
    logprobs: list[float]  # of these under the model's own softmax, whatever they were drawn from
    finish: str  # "end_of_text"; "stop" by `over`; "length", of max_tokens or of the context


def pad_left(prompts: Sequence[Sequence[int]], length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal length as (tokens int32[B, P], start int32[B]): row b's prompt is tokens[b, start[b]:].

    Args:
      length: P, if that is longer than the longest prompt.

    Raises:
      ValueError: an empty prompt.
    """
    longest = max(length, *map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int32)
    start = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    for row, first, prompt in zip(tokens, start, prompts, strict=True):
        if len(prompt) == 0:
            raise ValueError("a prompt is empty; begin with the end-of-text token")
        row[first:] = prompt
    return tokens, start


def begin(
    model: Model,
    unstacked: PyTree,
    tokens_BP: Int[Array, "B P"],
    start_B: Int[Array, "B"],
    seen_BV: Bool[Array, "B V"],
    drawn_B: Int[Array, "B"],
    draws: Draws,
    *,
    slots: int,
    kind: str,
) -> State:
    """Reads prompts, padded on the left, and draws a token for each. Pure; `model`, `slots` and `kind` are static.

    Args:
      seen_BV: the ids in each row's text. Of the model's ids, only V are drawn.
      drawn_B: tokens that the rows drew before.
    """
    logits_BV, cache = model.prefill(unstacked, tokens_BP, start_B, slots)
    token_B, logprob_B = draw(logits_BV, seen_BV, drawn_B, draws, kind)
    return State(token_B, logprob_B, drawn_B + 1, seen_BV, cache)


def advance(
    model: Model,
    unstacked: PyTree,
    state: State,
    ended_B: Bool[Array, "B"],
    steps: int,
    draws: Draws,
    *,
    every: int,
    kind: str,
) -> tuple[State, Int[Array, "N B"], Float[Array, "N B"]]:
    """`steps` more tokens for each row and their log-probabilities, of which there are less if all rows end before.

    Pure; `model`, `every` (N, at least `steps`) and `kind` are static, and `state` may be donated.
    """

    def step(carry):
        n, ended_B, state, tokens_NB, logprobs_NB = carry
        seen_BV = state.seen_BV.at[jnp.arange(len(ended_B)), state.token_B].set(True)
        logits_BV, cache = model.decode(unstacked, state.token_B, state.cache)
        token_B, logprob_B = draw(logits_BV, seen_BV, state.drawn_B, draws, kind)
        state = State(token_B, logprob_B, state.drawn_B + 1, seen_BV, cache)
        out = tokens_NB.at[n].set(token_B), logprobs_NB.at[n].set(logprob_B)
        return n + 1, ended_B | (token_B == draws.end_of_text), state, *out

    empty = jnp.zeros((every, len(ended_B)))
    carry = jnp.int32(0), ended_B, state, empty.astype(jnp.int32), empty
    _, _, state, tokens_NB, logprobs_NB = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[1].all(), step, carry)
    return state, tokens_NB, logprobs_NB


_begin = jax.jit(begin, static_argnames=("model", "slots", "kind"))
_advance = jax.jit(advance, static_argnames=("model", "every", "kind"), donate_argnames="state")


@dataclass
class _Row:
    number: int
    text: list[int]  # the prompt, and what was drawn
    seed: int
    window: int  # how many of these, the last ones, the model looks at
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""

    @property
    def tokens(self) -> list[int]:
        return self.text[len(self.text) - len(self.logprobs) :]


def complete(
    model: Model,
    unstacked: PyTree,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_tokens: int,
    context_length: int,
    vocab_size: int,
    end_of_text: int,
    sampling: Sampling,
    beyond: str = "slide",
    over: Callable[[int, list[int]], bool] | None = None,
    every: int = EVERY,
) -> list[Completion]:
    """Up to `max_tokens` new ids for each prompt.

    Args:
      unstacked: `model.unstack(params)`.
      prompts: not empty; of unequal length as they come.
      seeds: in [0, 2**32), one for each prompt.
      vocab_size: only ids below are drawn.
      beyond: what follows once a row's prompt and new tokens fill the context. "slide": the last half of them is read
        again, and the row goes on from there; "stop": it ends. Of a prompt that fills the context, too, half is read.
      over: called with the number and the new ids of each prompt that goes on, after its first token and then after
        `every` more at the most; True ends it.

    Raises:
      ConfigError: the context is longer than the model's.
    """
    if context_length > model.context_length:
        raise ConfigError(f"context_length is {context_length:,}; the model has positions for {model.context_length:,}")
    half = max(context_length // 2, 1)

    def take(row: _Row, tokens: list[int], logprobs: list[float]) -> None:
        end = tokens.index(end_of_text) if end_of_text in tokens else len(tokens)
        row.text += tokens[:end]
        row.logprobs += logprobs[:end]
        row.window += end
        if over and over(row.number, row.tokens):
            row.finish = "stop"
        elif end < len(tokens):
            row.finish = "end_of_text"
        elif len(row.logprobs) == max_tokens or (beyond == "stop" and row.window >= context_length):
            row.finish = "length"

    def waits(row: _Row) -> bool:
        """It has ended, or its context is full."""
        return bool(row.finish) or row.window >= context_length

    def run(rows: list[_Row]) -> None:
        """Gives each row its tokens."""
        filled = rows + [_Row(-1, [0], 0, 1, finish="length")] * (bucket(len(rows)) - len(rows))
        draws = Draws(np.array([row.seed for row in filled], np.uint32), sampling, end_of_text)
        left = 0  # slots of the cache: those are sized for the longest row, and a shorter one may outlive it
        while live := [b for b, row in enumerate(rows) if not row.finish]:
            going = [b for b in live if not waits(rows[b])]
            if not going or not left:
                state, left = read(filled, draws)
                steps, going, new = 1, live, (state.token_B[None], state.logprob_B[None])
            else:
                rooms = [min(max_tokens - len(rows[b].logprobs), context_length - rows[b].window) for b in going]
                steps = min(every, left, *rooms)
                ended_B = np.array([waits(row) for row in filled])
                state, *new = _advance(model, unstacked, state, ended_B, steps, draws, every=every, kind=sampling.kind)
                left -= steps
            tokens_BN, logprobs_BN = (np.asarray(x)[:steps].T.tolist() for x in new)
            for b in going:
                take(rows[b], tokens_BN[b], logprobs_BN[b])

    def read(rows: list[_Row], draws: Draws) -> tuple[State, int]:
        """Begins with each row's window, with half of one that is full; and the number of slots after it."""
        live = [row for row in rows if not row.finish]
        for row in live:
            row.window = row.window if row.window < context_length else half
        longest = max(row.window for row in live)
        length = min(bucket(longest, SHORTEST), context_length)
        new = min(bucket(max_tokens), context_length - (length // 2 if length > SHORTEST else 0))
        seen_BV = np.zeros((len(rows), vocab_size), bool)
        for seen, row in zip(seen_BV, rows):
            seen[row.text] = True
        windows = pad_left([[0] if row.finish else row.text[-row.window :] for row in rows], length)
        drawn_B = np.array([len(row.logprobs) for row in rows], np.int32)
        state = _begin(model, unstacked, *windows, seen_BV, drawn_B, draws, slots=length + new, kind=sampling.kind)
        return state, new

    rows = [
        _Row(b, list(prompt), seed, len(prompt)) for b, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    for first in range(0, len(rows), ROWS):
        run(rows[first : first + ROWS])
    return [Completion(row.tokens, row.logprobs, row.finish) for row in rows]


def bucket(n: int, least: int = 1) -> int:
    """The power of two at or above n."""
    return max(least, 1 << (n - 1).bit_length())
