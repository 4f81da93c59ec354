"""How well a text is predicted: loss, perplexity by token and by word, bits per byte, accuracy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data import HeldOut, TokenFile, Tokenizer, evaluation, examples, held_out
from jaxlm.data.section import Section
from jaxlm.errors import ConfigError
from jaxlm.model import losses
from jaxlm.model.gpt2 import Model
from jaxlm.model.losses import TokenSums
from jaxlm.telemetry.progress import tracked

PyTree = Any

_CHUNK = 2**20  # tokens decoded at once


def token_sums(model: Model, params: PyTree, batch: Any, chunks: int = 1) -> TokenSums:
    """The weighted sums of a batch of int32[B, T], without dropout. Pure; how it is compiled is the caller's affair.

    Args:
      chunks: parts of T, one after another, whose logits are in memory at a time, as `model.loss_chunks`; 0 is 1.

    Raises:
      ValueError: T does not divide into the chunks.
    """
    if chunks < 2:
        return losses.token_sums(model.apply(params, batch), batch["targets"], batch["weights"])

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> TokenSums:
        hidden_BTD, *wanted = part
        return losses.token_sums(model.logits(params, hidden_BTD), *wanted)

    arrays = (model.hidden(params, batch), batch["targets"], batch["weights"])
    sums = jax.lax.map(one, losses.chunked(arrays, chunks))
    return jax.tree.map(functools.partial(jnp.sum, axis=0), sums)


def sums(eval_step: Callable[[Any], TokenSums], batches: Iterable[Any]) -> TokenSums:
    """Weighted sums over batches, added in float64.

    Args:
      eval_step: batch -> weighted sums, each a number, or one of each lane.
    """
    total: Any = 0.0
    waiting: TokenSums | None = None
    for batch in batches:  # fetch the sums of one batch while the next is computed
        running = eval_step(batch)
        if waiting is not None:
            total += np.array(jax.device_get(waiting), np.float64)
        waiting = running
    return TokenSums(*(total + np.array(jax.device_get(waiting), np.float64)))


def metrics(sums: TokenSums, bytes_per_token: float) -> dict[str, float]:
    """What the sums of one model mean.

    Args:
      bytes_per_token: UTF-8 bytes of text over predicted tokens. Bits per byte are the nats per token over
        ln 2 and this: they compare across tokenizers, which perplexity does not. nan where it can't be told.

    Returns:
      eval/loss (nats per token), eval/perplexity (its exponential), eval/bits_per_byte unless `bytes_per_token` is nan,
      eval/accuracy.
    """
    loss = float(sums.nll / sums.weight)
    bits = {} if math.isnan(bytes_per_token) else {"eval/bits_per_byte": loss / math.log(2) / bytes_per_token}
    accuracy = float(sums.correct / sums.weight)
    return {"eval/loss": loss, "eval/perplexity": _exp(loss), **bits, "eval/accuracy": accuracy}


def of_all(sums: Mapping[str, TokenSums], bytes_per_token: float) -> dict[str, float]:
    """`metrics` of parameters by their names: eval/loss, ... of "", and eval/ema_loss, ... of "ema"."""
    out: dict[str, float] = {}
    for name, found in sums.items():
        out |= {named(key, name): value for key, value in metrics(found, bytes_per_token).items()}
    return out


def named(metric: str, params: str) -> str:
    """What a metric is called of the parameters of such a name: eval/loss of "ema" is eval/ema_loss."""
    return metric.replace("/", f"/{params}_") if params else metric


def evaluate_split(
    model: Model,
    params: PyTree,
    tokenizer: Tokenizer,
    split: TokenFile,
    section: Section,
    *,
    batch_size: int,
    context_length: int,
    stride: int = 0,
    chunks: int = 1,
    progress: bool = False,
) -> dict[str, float]:
    """Metrics over a whole split, whose documents or pairs are in the context as they are in training.

    Args:
      section: `cfg.data`, for what a row is made of.
      batch_size: at most so many rows at once.
      stride: as `jaxlm.data.evaluation` takes it: below context_length, windows overlap and tokens have more context.
      chunks: as `token_sums` takes it.
      progress: show a bar on stderr.

    Returns:
      what `metrics` returns, and tokens: how many are predicted. Of running text also eval/word_perplexity: the
      exponential of all nats, those of end-of-text tokens included, over the words of the text (absent where it has
      none); and words, bytes: how many there are.

    Raises:
      ConfigError: a stride for pairs or packed documents, which have rows of their own.
    """
    running = examples.running(section)
    if stride and not running:
        raise ConfigError(f"stride is {stride}, but pairs and packed documents have rows of their own; leave it out")

    def cut(size: int) -> HeldOut:
        found = held_out(section, tokenizer, split, context_length, size)
        return (
            found._replace(batches=evaluation(split.tokens, size, context_length, stride=stride)) if stride else found
        )

    batches, bytes_per_token = cut(batch_size)
    if len(batches) == 1:  # made no larger than it has rows, of which there is one in each batch of one
        batches, _ = cut(len(cut(1).batches))
    shown = tracked(batches, "evaluating", progress)
    compiled = jax.jit(functools.partial(token_sums, model, chunks=chunks))
    eval_step = functools.partial(compiled, jax.device_put(params))
    total = sums(eval_step, shown)
    found, tokens = metrics(total, bytes_per_token), round(float(total.weight))
    if not running:
        return found | {"tokens": tokens}
    words = count_words(split.tokens, tokenizer)
    if words:
        found["eval/word_perplexity"] = _exp(found["eval/loss"] * tokens / words)
    return found | {"tokens": tokens, "words": words, "bytes": split.num_bytes}


def count_words(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """Words between white space in the documents of ids [N], each of which ends in end of text.

    Decoded in parts, cut after a token that is ASCII: its bytes belong to no character of another token.
    """
    words, start, inside = 0, 0, False  # inside: the part before this one ends within a word
    while start < len(tokens):
        stop = min(start + _CHUNK, len(tokens))
        while stop < len(tokens) and not tokenizer.decode(tokens[stop - 1 : stop]).isascii():
            stop += 1
        part = tokens[start:stop]
        for i, ids in enumerate(np.split(part, np.flatnonzero(part == tokenizer.end_of_text))):
            text = tokenizer.decode(ids)  # less the end of text that begins all but the first of a part
            inside = inside and i == 0
            if text:
                words += len(text.split()) - (inside and not text[0].isspace())
                inside = not text[-1].isspace()
        start = stop
    return words


def _exp(nats: float) -> float:
    """A perplexity that is finite where the nats are."""
    return math.exp(min(nats, 700.0)) if math.isfinite(nats) else nats
