"""How probable given texts are to a model, in nats."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlm.errors import DataError
from jaxlm.model import losses
from jaxlm.model.decode import SHORTEST, bucket
from jaxlm.model.gpt2 import Batch, Model, PyTree
from jaxlm.telemetry.progress import tracked


def of_completions(
    model: Model,
    params: PyTree,
    end_of_text: int,
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    context_length: int,
    batch_size: int,
    progress: bool = False,
    chunks: int = 1,
) -> np.ndarray:
    """float64[rows]: in nats, of each completion and the end of text after it, given its prompt.

    Args:
      rows: (prompt, completion) as ids. An empty prompt is an end of text; one that leaves no room is cut on the left.
      batch_size, progress, chunks: as `of_tails`.

    Raises:
      DataError: a completion that fills the context.
    """
    end, sequences, counted = np.array([end_of_text], np.int32), [], []
    for prompt, completion in rows:  # arrays of int32: as lists, each prompt for each label, they fill the memory
        head = (prompt if len(prompt) else end)[-room(completion, context_length) :]
        sequences.append(np.concatenate([head, completion, end], dtype=np.int32))
        counted.append(len(completion) + 1)
    return of_tails(model, params, sequences, counted, context_length, batch_size, progress, chunks)[0]


def room(completion: np.ndarray, context_length: int) -> int:
    """Tokens that a completion of ids leaves for its prompt, at least 1.

    Raises:
      DataError: a completion that fills the context.
    """
    if len(completion) >= context_length:
        raise DataError(f"a completion of {len(completion)} tokens fills the context of {context_length}")
    return context_length - len(completion)


def of_tails(
    model: Model,
    params: PyTree,
    sequences: Sequence[Sequence[int] | np.ndarray],
    counted: Sequence[int],
    context_length: int,
    batch_size: int,
    progress: bool = False,
    chunks: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """float64[rows] in nats, of the last ids of each sequence given those before; and bool[rows], whether greedy
    decoding gives just these.

    Args:
      sequences: of at least two ids, and at most one more than the context.
      counted: how many of each sequence's last ids.
      batch_size: at most so many at once.
      progress: show a bar on stderr.
      chunks: parts of the context whose logits are in memory at a time, as `model.loss_chunks`.
    """
    batch_size = min(batch_size, len(sequences))
    order = np.argsort([-len(sequence) for sequence in sequences], kind="stable")  # a lack of memory shows at once
    nats, greedy = np.zeros(len(sequences)), np.zeros(len(sequences), bool)
    for first in tracked(range(0, len(order), batch_size), "scoring", progress):
        chosen = order[first : first + batch_size]
        length = min(context_length, bucket(len(sequences[chosen[0]]) - 1, SHORTEST))
        batch = {name: np.zeros((batch_size, length), np.int32) for name in ("inputs", "targets")}
        batch["weights"] = np.zeros((batch_size, length), np.float32)
        for b, row in enumerate(chosen):
            ids, n = sequences[row], len(sequences[row]) - 1
            batch["inputs"][b, :n], batch["targets"][b, :n] = ids[:-1], ids[1:]
            batch["weights"][b, n - counted[row] : n] = 1
        found = _of_rows(model, params, batch, _parts(length, chunks, context_length))
        nats[chosen], greedy[chosen] = (np.asarray(x)[: len(chosen)] for x in found)
    return nats, greedy


def _parts(length: int, chunks: int, context_length: int) -> int:
    """How many a batch is to be cut into: none longer than a chunk of the context."""
    if length == context_length:
        return max(1, chunks)
    return min(length, bucket(max(1, -(-chunks * length // context_length))))


def of_rows(model: Model, params: PyTree, batch: Batch, chunks: int = 1) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Weighted sums of log-likelihoods over each row of a batch, float32; and whether, wherever there is a weight, the
    target is the most probable id. Pure.

    Args:
      chunks: parts of T, one after another, whose logits are in memory at a time.

    Raises:
      ValueError: T does not divide into the chunks.
    """

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, targets_BT, weights_BT = part
        logits_BTV = model.logits(params, hidden_BTD)
        at_target = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        nats = jnp.sum(weights_BT * (at_target - jax.nn.logsumexp(logits_BTV, axis=-1)), axis=-1)
        return nats, ((logits_BTV.argmax(-1) == targets_BT) | (weights_BT == 0)).all(-1)

    arrays = (model.hidden(params, batch), batch["targets"], batch["weights"])
    nats, hits = jax.lax.map(one, losses.chunked(arrays, chunks))
    return nats.sum(0), hits.all(0)


_of_rows = jax.jit(of_rows, static_argnames=("model", "chunks"))
