"""The held-out part: a source parted in two, for training and for validation."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.data.forms import Document
from jaxlm.data.sources import Source, changed
from jaxlm.errors import ConfigError, DataError

_MADE = "jaxlm.data.made:"
_FAR = 2.0  # a share that misses by more than this factor is another share


def share(validation: str) -> float | None:
    """0.05 of "5%"; None where `validation` is not a percentage.

    Raises:
      ConfigError: a percentage that isn't between 0 and 100.
    """
    try:
        percent = float(validation.strip().removesuffix("%"))
    except ValueError:
        percent = math.nan
    if not validation.strip().endswith("%"):
        if math.isfinite(percent) and not os.path.exists(validation):
            meant = f"{percent * 100 if 0 < percent < 1 else percent:g}%"
            raise ConfigError(f"data.validation is {validation!r}, no file; for a share of the documents: {meant!r}")
        return None
    if not 0 < percent < 100:
        raise ConfigError(f"data.validation is {validation!r}; expected more than 0% and less than 100%, such as '5%'")
    return percent / 100


def check_made(source: str, validation: str) -> None:
    """That made rows are held out for a source of the same kind, not for data that took its place.

    Raises:
      ConfigError: they are not.
    """
    if validation.startswith(_MADE) and validation.removesuffix("_held_out") != source.removesuffix("_held_out"):
        raise ConfigError(
            f"data.source is {source!r}, and data.validation={validation!r} is made up: the run would be judged on "
            "other data than yours; set data.validation to a share of yours such as '5%', to a source of its own, or ''"
        )


def overlap(source: Source, validation: Source) -> str:
    """A warning that some files are in both, as a license may be; "" where none is.

    Of one and the same text nothing is said here: that may be wanted, and the run tells what its evaluations are worth.

    Raises:
      ConfigError: they are most of what is held out: who names a file of a folder expects the folder to lack it.
    """
    given, held = ([content for content in each.contents if content.num_bytes] for each in (source, validation))
    if sorted(content.sha256 for content in given) == sorted(content.sha256 for content in held):
        return ""
    trained = {content.sha256: content.file.path for content in given}
    shared = [content for content in held if content.sha256 in trained]
    if not shared:
        return ""
    count = f" ({len(shared):,} such files)" if len(shared) > 1 else ""
    said = f"its {shared[0].file.path} is in data.source={source.spec!r} as well{count}"
    if 2 * sum(content.num_bytes for content in shared) <= sum(content.num_bytes for content in held):
        return f"warning: some of data.validation={validation.spec!r} is trained on: {said}"
    raise ConfigError(
        f"data.validation={validation.spec!r} would be trained on: {said}; one must lack the files of the "
        "other: name them one by one, or hold out a share, such as data.validation='5%'"
    )


def split(source: Source, share: float) -> tuple[Source, Source]:
    """Parts a source into (train, held out), the latter with about `share` of the bytes. Reads it once.

    Whole documents are held out, chosen by a hash of their names, and with one all that are equal to it: so no
    document is on both sides, no seed moves it, and one that is added to a folder leaves most of the others where they
    were. Of a single document, the tail is held out.

    Raises:
      DataError: the source has no two characters, or no two different documents, to part.
    """
    names, texts, lengths = array("Q"), array("Q"), array("Q")
    for document in source.read():
        text = (document.text + (document.completion or "")).encode()
        names.append(_hash(document.name.encode("utf-8", "surrogateescape")))
        texts.append(_hash(text))
        lengths.append(len(text))
    sizes = np.array(lengths, np.int64)
    if len(sizes) == 1:
        return _split_text(source, share)
    _, first, group = np.unique(np.array(texts), return_index=True, return_inverse=True)
    if len(first) == 1:
        raise DataError(
            f'all {len(sizes)} documents of {source.spec} are equal: nothing to hold out; set data.validation=""'
        )
    leads, group = np.unique(first[group], return_inverse=True)  # the first of those that are equal, in their order
    held = _held_out(np.array(names)[leads], np.bincount(group, sizes).astype(np.int64), share)[group]

    def part(side: str, chosen: np.ndarray) -> Source:
        def read() -> Iterator[Document]:
            for document, take in itertools.zip_longest(source.read(), chosen):
                if document is None or take is None:
                    raise changed(source.spec)
                if take:
                    yield document

        return Source(source.spec, _side(source, share, side), int(sizes[chosen].sum()), read)

    return part("train", ~held), part("held out", held)


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest()[:8])


def _held_out(hashes: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """bool[documents] of those held out: in the order of their hashes, the number that comes nearest to the share.

    Where that is not within a factor of two of it, a single document, if there is one that is nearer.
    """
    target = share * sizes.sum()
    by_hash = np.argsort(hashes, kind="stable")
    # One document larger than the whole share would make it another share.
    small = by_hash[sizes[by_hash] <= target]
    if not len(small):
        small = np.array([np.argmin(sizes)])
    count = int(np.argmin(np.abs(np.cumsum(sizes[small]) - target))) + 1
    chosen = small[: min(count, len(sizes) - 1)]
    if _off(sizes[chosen].sum(), target) > _FAR:
        # Those that are left after the larger ones are next to nothing, as a README beside books: one book is nearer.
        some = by_hash[sizes[by_hash] <= max(share, 0.5) * sizes.sum()]  # the larger part is to train on
        alone = some[np.argsort(_off(sizes[some], target), kind="stable")[:1]]
        if len(alone) and _off(sizes[alone].sum(), target) < _off(sizes[chosen].sum(), target):
            chosen = alone
    held = np.zeros(len(sizes), bool)
    held[chosen] = True
    return held


def _off(size: Any, target: float) -> Any:
    """By which factor sizes miss a target, from above or from below: 1 or more."""
    return np.maximum(size / target, target / np.maximum(size, 1e-9))


def warning(validation: str, held_out: int, whole: int) -> str:
    """What is to be said where a share became another by far; "" where it didn't, or `validation` is no share.

    Args:
      held_out, whole: bytes of what is held out, and of all.
    """
    asked = share(validation)
    if asked is None or not held_out or _off(held_out / whole, asked) <= _FAR:
        return ""
    return (
        f"warning: data.validation={validation!r} was asked for and {held_out / whole:.2%} of the text is held out, "
        "since documents are held out whole, and these are few or large; name a file of its own as data.validation"
    )


def _split_text(source: Source, share: float) -> tuple[Source, Source]:
    only = next(source.read())
    if only.completion is not None:
        raise DataError(f'{source.spec} is one pair: nothing to hold out; set data.validation=""')
    length = len(only.text)
    if length < 2:
        raise DataError(f'{source.spec} is one character long: nothing to hold out; set data.validation=""')
    cut = min(max(round(length * (1 - share)), 1), length - 1)

    def part(side: str, chosen: slice) -> Source:
        def read() -> Iterator[Document]:
            return (Document(f"{only.name}[{side}]", only.text[chosen]) for only in source.read())

        num_bytes = source.num_bytes * len(range(length)[chosen]) // length
        return Source(source.spec, _side(source, share, side), num_bytes, read)

    return part("train", slice(None, cut)), part("held out", slice(cut, None))


def _side(source: Source, share: float, side: str) -> str:
    return hashlib.sha256(json.dumps([source.fingerprint, share, side]).encode()).hexdigest()
