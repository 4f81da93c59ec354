"""Batch n as a pure function of (data, seed, n): the same on every machine and after every restart.

Each epoch takes all rows once, in the order of a keyed permutation, with no state to save and no array of indices to
shuffle. Rows of running text are windows: its N tokens lie on a circle, which epoch e turns by a shift and cuts into
W = N // T windows of T targets, so each epoch has other cuts. Where the circle closes, the last document's end-of-text
token meets the first document.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from jaxlm.data import mapped
from jaxlm.errors import ConfigError, DataError

Batch = dict[str, np.ndarray]
"""`inputs` int32[B, T], `targets` int32[B, T], `weights` float32[B, T] (0 where a token does not count)."""

Argument = TypeVar("Argument")
Item = TypeVar("Item")
UInt64s = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6


class Rows(Protocol):
    """What an epoch is made of: rows of T, each once."""

    context_length: int  # T

    def __len__(self) -> int: ...
    def take(self, places: UInt64s, keys: UInt64s) -> Batch:
        """Those at places [B] in [0, len), of epochs whose keys are [B], as a batch."""


class Batches:
    """Batches without end: `batches[n]` for n = 0, 1, ...

    Args:
      rows: of an epoch.
      batch_size: B.
      seed: of the order, and of what differs from epoch to epoch in the rows, such as where windows are cut.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self._rows = rows
        self._seed_key = _mix(np.array([seed % 2**64], np.uint64))
        self.batch_size = batch_size
        self.num_rows = len(rows)
        """In an epoch."""

    def __getitem__(self, n: int) -> Batch:
        return self.rows(n * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """Sequences first, ..., first + count - 1 of the run as one batch, with B = `count`.

        `batches[n]` is `rows(n * batch_size, batch_size)`, so a run that goes on with another batch size goes on at
        the same sequence.

        Raises:
          IndexError: `first` is negative.
          DataError: the token file was cut short or written over since it was opened, or holds ids that it can't.
        """
        if first < 0:
            raise IndexError(f"sequence {first}: they count from 0")
        sequences, size = np.arange(first, first + count, dtype=np.uint64), np.uint64(self.num_rows)
        keys = _mix(self._seed_key + sequences // size * np.uint64(_GOLDEN))
        return self._rows.take(permutation(sequences % size, self.num_rows, keys), keys)


class Windows:
    """Windows of tokens that lie on a circle, turned in each epoch.

    Args:
      tokens: [N] of an integer type, such as those of a token file.

    Raises:
      DataError: fewer than T + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, context_length: int) -> None:
        if len(tokens) < context_length + 1:
            raise DataError(
                f"text of {len(tokens)} tokens is shorter than one window of {context_length + 1}; "
                "lower model.context_length or give more text"
            )
        self._tokens = np.asarray(tokens)  # a plain view, if they are a numpy.memmap: its own indexing is slower
        self._windows = np.lib.stride_tricks.sliding_window_view(self._tokens, context_length + 1)
        self.context_length = context_length

    def __len__(self) -> int:
        return len(self._tokens) // self.context_length

    def take(self, places: UInt64s, keys: UInt64s) -> Batch:
        size = len(self._tokens)
        shifts = _mix(keys) % np.uint64(size)
        starts = ((shifts + places * np.uint64(self.context_length)) % np.uint64(size)).astype(np.int64)
        mapped.check_unchanged(self._tokens)
        if int(starts.max(initial=0)) < len(self._windows):
            windows = self._windows[starts]
        else:  # some row runs over the seam
            windows = np.take(self._tokens, starts[:, None] + np.arange(self.context_length + 1), mode="wrap")
        mapped.check_ids(self._tokens, windows, starts)
        return {
            "inputs": windows[:, :-1].astype(np.int32),
            "targets": windows[:, 1:].astype(np.int32),
            "weights": np.ones((len(places), self.context_length), np.float32),
        }


class Noised:
    """Rows of which some inputs are replaced by tokens drawn from a text, at other places in each epoch; the targets
    stay. Unigram noising, of Xie et al. 2017 (arXiv:1703.02573).

    Args:
      tokens: [N], where they are drawn.
      share: of the inputs, in [0, 1).
    """

    def __init__(self, rows: Rows, tokens: np.ndarray, share: float) -> None:
        self._rows, self._tokens, self._below = rows, np.asarray(tokens), np.uint64(share * 2**64)
        self.context_length = rows.context_length

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, places: UInt64s, keys: UInt64s) -> Batch:
        batch = self._rows.take(places, keys)
        drawn = hashed(hashed(keys, places)[:, None], np.arange(self.context_length, dtype=np.uint64))
        where = (_mix(drawn) % np.uint64(len(self._tokens))).astype(np.int64)
        others = self._tokens[where]
        mapped.check_ids(self._tokens, others.reshape(-1, 1), where.ravel())
        return batch | {"inputs": np.where(drawn < self._below, others, batch["inputs"]).astype(np.int32)}


def hashed(keys: UInt64s, numbers: UInt64s) -> UInt64s:
    """Numbers in [0, 2**64) that look drawn: of keys and numbers, uint64 of one shape."""
    return _mix(keys + (numbers + np.uint64(1)) * np.uint64(_GOLDEN))


def permutation(indices: UInt64s, size: int, keys: UInt64s) -> UInt64s:
    """Where each index in [0, size) goes under the permutation of its key, in O(1) memory.

    An alternating Feistel network on pairs (left, right) of [0, a) x [0, b) with ab just above `size`; what falls
    outside of [0, size) is permuted again until it doesn't ("cycle walking"), which keeps it a bijection. After Black
    and Rogaway, "Ciphers with arbitrary finite domains" (2002). Integer arithmetic only, never a library's random
    numbers: so runs can be repeated for as long as these lines stand. Not for secrets. Of fewer than ten things some
    orders are drawn more often than others.

    Args:
      indices: uint64[B].
      size: number of things permuted, at least 1.
      keys: uint64[B], or uint64[1] for all.

    Returns:
      uint64[B].
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    a, b = np.uint64(rows), np.uint64(columns)

    def once(x: UInt64s, keys: UInt64s) -> UInt64s:
        left, right = x // b, x % b
        for r in range(0, _ROUNDS, 2):
            left = (left + _mix(right + keys + _CONSTANTS[r]) % a) % a
            right = (right + _mix(left + keys + _CONSTANTS[r + 1]) % b) % b
        return left * b + right

    keys = np.broadcast_to(keys, indices.shape)
    out = once(indices, keys)
    while len(outside := np.flatnonzero(out >= size)):
        out[outside] = once(out[outside], keys[outside])
    return out


_CONSTANTS = np.array([(r + 1) * _GOLDEN % 2**64 for r in range(_ROUNDS)], np.uint64)


def _mix(x: UInt64s) -> UInt64s:
    """The output function of splitmix64 (Steele et al., 2014): each input bit moves all output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def evaluation(
    tokens: np.ndarray, batch_size: int, context_length: int, limit: int = 0, stride: int = 0
) -> Sequence[Batch]:
    """A split in order, as batches of one shape: tokens 1, ..., N - 1 are each the target of weight 1 once.

    Each window of T inputs begins `stride` tokens after the one before, and of its T targets only those count that are
    new: so each target has at least T - stride + 1 tokens before it in its window, but where the split begins. What is
    missing of the last window and the last batch is filled with zeros of weight 0.

    Args:
      tokens: [N] of an integer type.
      batch_size: B.
      context_length: T.
      limit: give at most so many batches, of windows evenly spaced over the split: as many windows are the same ones
        whatever the batch size. 0 gives all.
      stride: from 1 to T; 0 is T, windows that don't overlap. The work grows by T / stride.

    Raises:
      ConfigError: the stride is negative, or skips tokens.
      DataError: fewer than two tokens; and as `Batches.rows`, when a batch is read.
    """
    if not 0 <= stride <= context_length:
        raise ConfigError(
            f"stride is {stride}; expected from 1 to the context of {context_length} tokens, or 0 for windows that "
            "don't overlap"
        )
    if len(tokens) < 2:
        raise DataError(f"a split of {len(tokens)} tokens has nothing to predict; give more text to data.validation")
    T, stride, plain = context_length, stride or context_length, np.asarray(tokens)
    rows = 1 + -(-max(len(tokens) - 1 - T, 0) // stride)

    def batch(places: np.ndarray) -> Batch:
        starts = places * stride
        where = starts[:, None] + np.arange(T + 1)
        mapped.check_unchanged(plain)
        ids = plain[np.minimum(where, len(plain) - 1)]
        mapped.check_ids(plain, ids, starts)
        known = where[:, 1:] < len(plain)
        weights = known.astype(np.float32)
        weights[starts > 0, : T - stride] = 0  # counted in the window before, if there is one
        return {
            "inputs": np.where(known, ids[:, :-1], 0).astype(np.int32),
            "targets": np.where(known, ids[:, 1:], 0).astype(np.int32),
            "weights": weights,
        }

    return Chosen(rows, batch_size, limit, batch)


class Chosen(Sequence[Batch]):
    """Rows as batches: of so many rows those of `limit` batches, evenly spaced, the middles of equal parts; or all, in
    order, if it is 0 or they are fewer. Each batch is made when it is asked for.

    Args:
      make: of places int64[B], a batch; a place that is `rows` or more has no row, and fills the last batch.
    """

    def __init__(self, rows: int, batch_size: int, limit: int, make: Callable[[np.ndarray], Batch]) -> None:
        self._rows, self._batch_size, self._make = rows, batch_size, make
        self._count = min(limit * batch_size or rows, rows)

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    @overload
    def __getitem__(self, n: int) -> Batch: ...
    @overload
    def __getitem__(self, n: slice) -> list[Batch]: ...
    def __getitem__(self, n: int | slice) -> Batch | list[Batch]:
        if isinstance(n, slice):
            return [self[i] for i in range(len(self))[n]]
        numbers = range(len(self))[n] * self._batch_size + np.arange(self._batch_size)
        places = (2 * numbers + 1) * self._rows // (2 * self._count)
        return self._make(np.where(numbers < self._count, places, self._rows + numbers))


@contextlib.contextmanager
def prefetch(
    get: Callable[[Argument], Item], arguments: Iterable[Argument], depth: int = 2
) -> Iterator[Iterator[Item]]:
    """`with prefetch(batches.__getitem__, range(start, stop)) as items:` gives what `get` makes of each, in order.

    A thread keeps the next `depth` ready. What `get` raises is raised where its item would have come. Leaving the
    block, at the end or early, joins the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        submitted = (thread.submit(get, argument) for argument in arguments)
        ahead = deque(itertools.islice(submitted, depth))

        def items() -> Iterator[Item]:
            while ahead:
                future = ahead.popleft()
                ahead.extend(itertools.islice(submitted, 1))
                yield future.result()

        try:
            yield items()
        finally:
            thread.shutdown(cancel_futures=True)
