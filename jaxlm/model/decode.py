"""Sampling with a key-value cache: one prefill, then a loop of single tokens, all in one compiled program.

Shape letters: B batch, P prompt length after left padding, N new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlm.model.gpt2 import Model, PyTree


class Sampling(NamedTuple):
    """How a token is drawn from logits. Structure: each distinct value is a program of its own.

    temperature 0 is greedy. top_k 0 and top_p 1 are off; with both, top_k goes first.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def pad_left(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal length as (tokens int32[B, P], start int32[B]): row b's prompt is tokens[b, start[b]:].

    Raises:
      ValueError: an empty prompt.
    """
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), pad, np.int32)
    start = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    for row, first, prompt in zip(tokens, start, prompts, strict=True):
        if len(prompt) == 0:
            raise ValueError("a prompt is empty; begin with the end-of-text token")
        row[first:] = prompt
    return tokens, start


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Scaled by temperature; all but the top k, and what lies outside the smallest set whose probability reaches
    top p (Holtzman et al. 2020, arXiv:1904.09751), at minus infinity."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits_BV, axis=-1)
        probability = jax.nn.softmax(jnp.take_along_axis(logits_BV, order, axis=-1), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # so the token that crosses top p stays
        keep = jnp.put_along_axis(jnp.zeros_like(logits_BV, bool), order, before < sampling.top_p, -1, inplace=False)
        logits_BV = jnp.where(keep, logits_BV, -jnp.inf)
    return logits_BV


def generate(
    model: Model,
    params: PyTree,
    tokens_BP: Int[Array, "B P"],
    start_B: Int[Array, "B"],
    keys_B: Key[Array, "B"],
    drawn: Int[Array, ""] | int = 0,
    *,
    max_tokens: int,
    end_of_text: int,
    sampling: Sampling,
) -> Int[Array, "B N"]:
    """`max_tokens` more ids for each row; a row that drew `end_of_text` repeats it. Pure: jit it from outside.

    Args:
      tokens_BP, start_B: prompts, padded on the left; see `pad_left`. P + max_tokens is at most the context length.
      keys_B: one key a row; token n of a row depends on its key, its prompt and n alone.
      drawn: tokens that were drawn with these keys before: n starts there.
    """

    def draw(logits_BV, n):
        if sampling.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, n)
        return jax.vmap(jax.random.categorical)(keys, filter_logits(logits_BV, sampling)).astype(jnp.int32)

    def advance(carry, n):
        logits_BV, cache, ended_B = carry
        token_B = jnp.where(ended_B, end_of_text, draw(logits_BV, n))
        logits_BV, cache = model.decode(params, token_B[:, None], cache)
        return (logits_BV, cache, ended_B | (token_B == end_of_text)), token_B

    cache = model.cache(start_B, tokens_BP.shape[1] + max_tokens)
    logits_BV, cache = model.decode(params, tokens_BP, cache)
    carry = (logits_BV, cache, jnp.zeros(tokens_BP.shape[0], bool))
    _, tokens_NB = jax.lax.scan(advance, carry, drawn + jnp.arange(max_tokens))
    return tokens_NB.T


def complete(
    model: Model,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    context_length: int,
    end_of_text: int,
    sampling: Sampling,
    seed: int = 0,
) -> list[list[int]]:
    """Up to `max_tokens` new ids for each prompt, without the end of text that may have ended it.

    Where prompt and new tokens pass the context, the last half of the window is read again and generation goes on
    from there. Of a prompt that fills the context, too, only that half is read.

    Args:
      prompts: not empty; of unequal length as they come.
      seed: of the draws; row b uses fold_in(key(seed), b).
    """
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
    run = jax.jit(
        functools.partial(generate, model, end_of_text=end_of_text, sampling=sampling), static_argnames="max_tokens"
    )
    seen = [list(prompt) for prompt in prompts]
    drawn = 0
    while drawn < max_tokens:
        longest = max(map(len, seen))
        keep = longest if longest < context_length else max(context_length // 2, 1)
        tokens, start = pad_left([row[-keep:] for row in seen])
        count = min(max_tokens - drawn, context_length - keep or 1)
        new = np.asarray(run(params, tokens, start, keys_B, drawn, max_tokens=count))
        for row, ids in zip(seen, new.tolist(), strict=True):
            row.extend(ids)
        drawn += count
    out = []
    for row, prompt in zip(seen, prompts, strict=True):
        ids = row[len(prompt) :]
        out.append(ids[: ids.index(end_of_text)] if end_of_text in ids else ids)
    return out
