"""How probable given texts are to a model, in nats."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.errors import DataError
from jaxlm.model.gpt2 import Batch, Model, PyTree


def of_completions(
    model: Model,
    params: PyTree,
    end_of_text: int,
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    context_length: int,
    batch_size: int,
) -> np.ndarray:
    """float64[rows]: in nats, of each completion and the end of text after it, given its prompt.

    Args:
      rows: (prompt, completion) as ids. An empty prompt is an end of text; one that leaves no room is cut on the left.

    Raises:
      DataError: a completion that fills the context.
    """
    end, T = [end_of_text], context_length
    sequences, counted = [], []
    for prompt, completion in rows:
        room = T - len(completion)
        if room < 1:
            raise DataError(f"a completion of {len(completion)} tokens fills the context of {T}")
        head = (prompt.tolist() or end)[-room:]
        sequences.append([*head, *completion.tolist(), *end])
        counted.append(len(completion) + 1)
    length = min(T, 1 << (max(map(len, sequences)) - 2).bit_length())
    order = np.argsort([len(sequence) for sequence in sequences], kind="stable")
    out = np.zeros(len(rows))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = {name: np.zeros((batch_size, length), np.int32) for name in ("inputs", "targets")}
        batch["weights"] = np.zeros((batch_size, length), np.float32)
        for b, row in enumerate(chosen):
            ids, n = sequences[row], len(sequences[row]) - 1
            batch["inputs"][b, :n], batch["targets"][b, :n] = ids[:-1], ids[1:]
            batch["weights"][b, n - counted[row] : n] = 1
        out[chosen] = np.asarray(_row_sums(model, params, batch))[: len(chosen)]
    return out


def of_rows(model: Model, params: PyTree, batch: Batch) -> Float[Array, "B"]:
    """Weighted sums over each row of a batch, float32. Pure."""
    logits = model.apply(params, batch)
    at_target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(batch["weights"] * (at_target - jax.nn.logsumexp(logits, axis=-1)), axis=-1)


_row_sums = jax.jit(of_rows, static_argnames="model")
