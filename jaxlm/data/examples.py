"""Rows of whole examples: pairs of a prompt and its completion, or documents. An example never attends to another.

An example of n + 1 tokens takes n positions of a row. A pair is prompt, completion, end of text; an empty prompt is an
end of text, as at the start of generation. A document is what follows an end of text, up to and with its own; one that
is longer than a row goes on in another, as an example of its own. Rows that hold several examples ("packed") have
`segment_ids` int32[B, T] (from 1; 0 is padding) and `positions` int32[B, T] (from 0 in each example).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data import mapped, unknown
from jaxlm.data.batches import (
    Batch,
    Batches,
    Chosen,
    Noised,
    Rows,
    UInt64s,
    Windows,
    evaluation,
    hashed,
    permutation,
)
from jaxlm.data.section import Section
from jaxlm.data.store import Data
from jaxlm.data.tokenfile import TokenFile
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import DataError

_PART = 4 * 2**20  # tokens that are looked at at once


class HeldOut(NamedTuple):
    batches: Sequence[Batch]
    bytes_per_token: float
    """UTF-8 bytes of running text, or of the tokens that are predicted, over the latter's number; nan where some of the
    text is unknown."""


def running(section: Section) -> bool:
    """Whether rows are windows of running text, not whole examples."""
    return section.format == "text" and not section.pack


def training(section: Section, data: Data, context_length: int, seed: int) -> tuple[Batches, str]:
    """The batches of a run, and what is to be said of them: "" where they are windows of known running text.

    Raises:
      DataError: there is too little text, no example, or one that is too long where that is an error.
    """
    rows: Rows
    if running(section):
        rows, said = Windows(data.train.tokens, context_length), ""
    else:
        rows = Examples(section, data.tokenizer, data.train, context_length, seed)
        said = str(rows)
    said = "\n".join(filter(None, (said, unknown.warning(data))))
    if section.token_dropout:
        rows = Noised(rows, data.train.tokens, section.token_dropout)
    return Batches(rows, section.batch_size, seed), said


def held_out(
    section: Section, tokenizer: Tokenizer, file: TokenFile, context_length: int, batch_size: int, limit: int = 0
) -> HeldOut:
    """A split in order, each prediction once; at most `limit` batches, of rows evenly spaced, where that is
    not 0. As many rows are the same ones whatever the batch size.

    Raises:
      DataError: as `training`.
    """
    known = math.nan if unknown.share(tokenizer, file) else 1.0
    if running(section):
        batches = evaluation(file.tokens, batch_size, context_length, limit)
        return HeldOut(batches, known * file.num_bytes / (file.num_tokens - 1))  # nothing is before the first
    rows = Examples(section, tokenizer, file, context_length)

    def batch(places: np.ndarray) -> Batch:
        return rows.take(np.minimum(places, len(rows)).astype(np.uint64))

    return HeldOut(Chosen(len(rows), batch_size, limit, batch), known * rows.bytes_per_token(tokenizer))


def pairs(tokenizer: Tokenizer, file: TokenFile) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, completion) of each pair in a token file, as ids without their ends of text.

    Raises:
      DataError: it holds no pairs.
    """
    tokens = np.asarray(file.tokens)
    first, middle, last = _parts(tokens, tokenizer, file)
    mapped.check_unchanged(tokens)
    return [
        (tokens[start:stop].astype(np.int64), tokens[stop + 1 : end].astype(np.int64))
        for start, stop, end in zip(first.tolist(), middle.tolist(), last.tolist(), strict=True)
    ]


def _parts(tokens: np.ndarray, tokenizer: Tokenizer, file: TokenFile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each pair begins, its prompt's end of text, and its completion's: int64[E]."""
    ends = _ends(tokens, tokenizer.end_of_text)
    if len(ends) != 2 * file.num_documents or not len(ends):
        raise DataError(f"{file.path} holds no pairs of prompt and completion")
    middle, last = ends[0::2], ends[1::2]
    return np.append(0, last[:-1] + 1), middle, last


def _ends(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Where the ends of text are: int64[E]. By parts, since a bool for every token is half of a large file."""
    firsts = range(0, len(tokens), _PART)
    found = [first + np.flatnonzero(tokens[first : first + _PART] == end_of_text) for first in firsts]
    return np.concatenate([np.empty(0, np.int64), *found])


class Examples:
    """The rows of a token file's examples.

    Args:
      seed: of the order in which examples are packed; None is the file's.

    Raises:
      DataError: there is no example that fits, or one that doesn't where `too_long` is "error".
    """

    def __init__(
        self, section: Section, tokenizer: Tokenizer, file: TokenFile, context_length: int, seed: int | None = None
    ) -> None:
        self._tokens, self.context_length, self._packed = np.asarray(file.tokens), context_length, section.pack
        self._what, self._cut, self._dropped = "pieces of documents", 0, 0
        if section.format == "pairs":
            self._spans = self._fitted(*_parts(self._tokens, tokenizer, file), section.too_long)
            self._what = "pairs"
        else:
            self._spans = _documents(self._tokens, tokenizer.end_of_text, context_length)
        if not len(self._spans):
            raise DataError(f"none of the {self._what} in {file.path} fits a context of {context_length} tokens")
        heads, tails = self._spans[:, 1] - self._spans[:, 0], self._spans[:, 3] - self._spans[:, 2]
        self._sizes = heads + tails - 1
        self._crop, self._heads = section.crop, heads
        self._first_counted = np.zeros_like(heads) if section.loss_on == "all" else heads - 1

        count = len(self._spans)
        order = np.arange(count, dtype=np.uint64)
        if seed is not None:
            order = permutation(order, count, np.array([seed % 2**64], np.uint64))
        order = order.astype(np.int64)
        bins = first_fit(self._sizes[order], context_length) if section.pack else np.arange(count)
        self._members = order[np.argsort(bins, kind="stable")]
        # where each row's members begin; and a row after the last, which has none
        starts = np.append(0, np.cumsum(np.bincount(bins)))
        self._starts = np.append(starts, starts[-1])

    def __len__(self) -> int:
        return len(self._starts) - 2

    def __str__(self) -> str:
        share = self._sizes.sum() / (len(self) * self.context_length)
        said = [f"{len(self._spans):,} {self._what} in {len(self):,} rows, {share:.1%} of whose positions are used"]
        if self._cut:
            said.append(f"{self._cut:,} prompts cut on the left")
        if self._dropped:
            said.append(f"{self._dropped:,} pairs dropped, which are too long")
        return "; ".join(said)

    def take(self, places: UInt64s, keys: UInt64s | None = None) -> Batch:
        """Rows at places [B] of [0, len]: the one at len is empty. With keys [B], of epochs, prompts are cropped."""
        mapped.check_unchanged(self._tokens)
        shape = (len(places), self.context_length)
        names = ("inputs", "targets", *(("segment_ids", "positions") if self._packed else ()))
        batch = {name: np.zeros(shape, np.int32) for name in names} | {"weights": np.zeros(shape, np.float32)}
        for b, place in enumerate(places.tolist()):
            at = 0
            for number, example in enumerate(self._members[self._starts[place] : self._starts[place + 1]], 1):
                start, stop, *completion = self._spans[example]
                cut = 0
                if self._crop and keys is not None:
                    most = min(int(self._crop * self._heads[example]), int(self._heads[example]) - 1)
                    drawn = hashed(keys[b : b + 1], np.array([example], np.uint64))
                    cut = int(drawn[0]) % (most + 1)
                ids = np.concatenate([self._read(start + cut, stop), self._read(*completion)])
                here = slice(at, at := at + len(ids) - 1)
                batch["inputs"][b, here], batch["targets"][b, here] = ids[:-1], ids[1:]
                batch["weights"][b, here][max(0, self._first_counted[example] - cut) :] = 1
                if self._packed:
                    batch["segment_ids"][b, here] = number
                    batch["positions"][b, here] = np.arange(len(ids) - 1)
        return batch

    def bytes_per_token(self, tokenizer: Tokenizer) -> float:
        """UTF-8 bytes of the tokens that count, over their number."""
        first, stop, middle, last = self._spans.T
        begins, ends = np.concatenate([first + 1 + self._first_counted, middle]), np.concatenate([stop, last])
        before = _bytes_before(self._tokens, tokenizer, np.stack([begins, ends]))
        return float((before[1] - before[0]).sum() / (ends - begins).sum())

    def _read(self, start: int, stop: int) -> np.ndarray:
        ids = self._tokens[start:stop]
        mapped.check_ids(self._tokens, ids[None], [start])
        return ids

    def _fitted(self, first: np.ndarray, middle: np.ndarray, last: np.ndarray, too_long: str) -> np.ndarray:
        """Spans int64[E, 4]: of the prompt, or of the end of text where it is empty; and of what follows it."""
        stop = np.where(first == middle, middle + 1, middle)
        over = (stop - first) + (last - middle) - 1 - self.context_length  # positions too many
        if too_long == "error" and (over > 0).any():
            pair = int(np.argmax(over > 0))
            raise DataError(
                f"pair {pair} of {len(over)} takes {over[pair] + self.context_length} positions, and "
                f"model.context_length is {self.context_length}; data.too_long='cut' shortens prompts, 'drop' leaves "
                "out such pairs"
            )
        kept = over <= (stop - first - 1 if too_long == "cut" else 0)
        cut = np.maximum(over, 0)
        self._cut, self._dropped = int((kept & (cut > 0)).sum()), int((~kept).sum())
        return np.stack([first + cut, stop, middle + 1, last + 1], axis=1)[kept]


def _documents(tokens: np.ndarray, end_of_text: int, context_length: int) -> np.ndarray:
    """Spans int64[E, 4] of documents: the token before, and at most T that follow it."""
    # the last one has no end of text after it where a token file was parted within it
    ends = _ends(tokens, end_of_text)
    if tokens[-1] != end_of_text:
        ends = np.append(ends, len(tokens) - 1)
    before = np.append(0, ends[:-1])  # nor the first one before it: its first token is not predicted
    counts = -(-(ends - before) // context_length)  # rows that each takes
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a row among its document's
    start = np.repeat(before, counts) + place * context_length
    return np.stack([start, start + 1, start + 1, np.minimum(start + context_length, np.repeat(ends, counts)) + 1], 1)


def _bytes_before(tokens: np.ndarray, tokenizer: Tokenizer, places: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of the tokens before each of `places`, which are from 0 to N: int64, of their shape."""
    order = np.argsort(places, axis=None)
    ordered = places.ravel()[order]
    found, total = np.empty(places.size, np.int64), 0
    for first in range(0, len(tokens) + 1, _PART):
        part = tokens[first : first + _PART]
        mapped.check_ids(tokens, part[None], [first])
        sums = total + np.append(0, np.cumsum(tokenizer.byte_lengths[part], dtype=np.int64))
        here = slice(*np.searchsorted(ordered, [first, first + _PART]))
        found[order[here]] = sums[ordered[here] - first]
        total = sums[-1]
    return found.reshape(places.shape)


def first_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each thing: the first that has room when its turn comes. int64[N] of sizes [N], at most `capacity`.

    By a tree over the bins whose nodes know the most room below them, so that a turn takes O(log N).
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins = np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        bins[i] = node - leaves
        room[node] -= size
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return bins
