"""Long texts in parts, whose tokens are those of the whole: encoding one at once takes much memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_PIECE = 2**18  # characters handed to the tokenizers library at once: it takes some 100 bytes of memory for each token
_LONGEST = 2**20  # characters of a piece, even where that changes a token


def equal(text: str) -> Iterator[str]:
    """Parts of one length."""
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def grouped(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Lists of consecutive items, each closed once its sizes sum to `limit`."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= limit:
            yield group
            group, total = [], 0
    if group:
        yield group


LINES = re.compile(r"(?<=\S\n)(?=\S)")
WORDS = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")
"""Where a text can be cut and its tokens stay: "x\\n" | "y", "x" | " y", never among white space.

The pre-tokenizers of GPT-2 and its kin take a run of white space as one token or more, depending on what follows; a
single line end between two other characters is always the end of a token, and with GPT-2's own a single space is always
the start of one.
"""


def cut(text: str, places: re.Pattern[str]) -> Iterator[str]:
    """Parts of a long text, cut where `places` matches; anywhere, if it does not for a million characters."""
    start = 0
    while len(text) - start > _PIECE:
        found = places.search(text, start + _PIECE, start + _LONGEST)
        if found is None and len(text) - start <= _LONGEST:
            break
        stop = found.end() if found else start + _LONGEST
        yield text[start:stop]
        start = stop
    yield text[start:]
