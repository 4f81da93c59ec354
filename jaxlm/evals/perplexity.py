"""How well a split is predicted: loss, perplexity, bits per byte, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxlm.model.losses import TokenSums


def evaluate(
    eval_step: Callable[[Any], TokenSums], batches: Iterable[Any], *, bytes_per_token: float
) -> dict[str, float]:
    """Metrics over batches, each token weighed alike.

    Args:
      eval_step: batch -> weighted sums.
      bytes_per_token: UTF-8 bytes of text over tokens in the split. Bits per byte are the nats per token over
        ln 2 and this: they compare across tokenizers, which perplexity does not.

    Returns:
      eval/loss (nats per token), eval/perplexity (its exponential), eval/bits_per_byte, eval/accuracy.
    """
    total = np.zeros(len(TokenSums._fields), np.float64)
    waiting: TokenSums | None = None
    for batch in batches:  # fetch the sums of one batch while the next is computed
        running = eval_step(batch)
        if waiting is not None:
            total += np.array(jax.device_get(waiting), np.float64)
        waiting = running
    if waiting is not None:
        total += np.array(jax.device_get(waiting), np.float64)
    sums = TokenSums(*total)
    loss = float(sums.nll / sums.weight)
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss,
        "eval/bits_per_byte": loss / math.log(2) / bytes_per_token,
        "eval/accuracy": float(sums.correct / sums.weight),
    }
