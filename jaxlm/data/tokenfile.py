"""Token files: NAME.bin, the raw little-endian ids, and NAME.json, what they are and the tokenizer that made them.

A NAME.bin of another's making has the ids alone, as nanoGPT writes them: it is opened with a tokenizer.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import mapped, paths, readers, tokenizers
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import DataError
from jaxlm.files import atomic, expanded, seal

FORMAT = "jaxlm tokens 1"
_PART = 4 * 2**20  # ids that are looked at at once
_HASHED = 256 * 2**20  # bytes: larger files are checked by their size only, when opened


class TokenFile(NamedTuple):
    path: Path
    tokens: np.ndarray  # uint16[num_tokens] or uint32, mapped from the file; each document ends in end of text
    num_bytes: int  # UTF-8 bytes of the text, for bits per byte
    num_documents: int
    max_id: int  # no id is higher
    vocab_size: int
    sha256: str  # of the tokens' bytes; of a part of a file, derived from the whole's
    tokenizer: str  # its fingerprint
    source: str  # fingerprint of the text; "" if unknown

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tokens.dtype


class Chunk(NamedTuple):
    ids: np.ndarray  # documents, each with its end of text
    num_bytes: int
    num_documents: int


def write_tokens(path: str | Path, documents: Iterable[np.ndarray], tokenizer: Tokenizer) -> TokenFile:
    """Writes NAME.bin and NAME.json from the ids of documents, to be named as `data.source`.

    Args:
      path: NAME.bin.
      documents: integer arrays [N], of one document or more; an end-of-text token is added where the last is another.
      tokenizer: that made the ids. It is kept in NAME.json.

    Raises:
      DataError: what is no list of documents, an id outside of the vocabulary, no ids at all, or a file that can't be
        written.
    """
    path = expanded(path)
    if path.suffix != ".bin":
        raise DataError(f"token file {path} must be named NAME.bin")

    def chunks() -> Iterator[Chunk]:
        for number, document in enumerate(documents):
            ids = np.asarray(document)
            if ids.ndim != 1:  # of ids that are not in a list, each would end in an end of text
                what = "a single number" if ids.ndim == 0 else f"an array of shape {ids.shape}"
                raise DataError(f"document {number} is {what}; expected a list of documents, each an array [N] of ids")
            if len(ids) and not np.issubdtype(ids.dtype, np.integer):
                raise DataError(f"token ids are {ids.dtype}; expected integers")
            for first in range(0, len(ids), _PART):
                yield _chunk(ids[first : first + _PART], tokenizer)
            if not len(ids) or ids[-1] != tokenizer.end_of_text:
                yield _chunk(np.array([tokenizer.end_of_text]), tokenizer)

    try:
        write(path, chunks(), tokenizer, source="")
    except OSError as error:
        raise DataError(f"can't write {path}: {error.strerror or error}") from error
    return open_tokens(path)


def open_tokens(path: str | Path, tokenizer: Tokenizer | None = None) -> TokenFile:
    """Maps a token file into memory, checked against its metadata: its size always, its sha256 if it isn't large.

    Args:
      tokenizer: made the ids, where there is no metadata: uint16, or uint32 for a vocabulary above 65,536. They are
        all read, and checked to be in the vocabulary.

    Raises:
      DataError: a file is missing, empty, unreadable, or not what the metadata says.
    """
    path = expanded(path)
    raw = tokenizer is not None and path.is_file() and not path.with_suffix(".json").exists()
    meta = _raw(path, tokenizer) if tokenizer is not None and raw else _metadata(path)
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    with readers.reading(path), path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size != meta["num_tokens"] * dtype.itemsize:
            raise DataError(
                f"{path} holds {size} bytes; its metadata {path.with_suffix('.json')} says {meta['num_tokens']} tokens "
                f"of {dtype.itemsize} bytes. It was truncated, or is still being written"
            )
        tokens = mapped.map_tokens(opened, path, dtype, meta["max_id"], meta["sha256"])
    fields = {name: meta[name] for name in TokenFile._fields if name not in ("path", "tokens")}
    file = TokenFile(path=path, tokens=tokens, **fields)
    if size < _HASHED and not raw:
        verify(file)
    return file


def verify(file: TokenFile) -> None:
    """Reads a whole token file, as `open_tokens` gives it, and compares it with its sha256.

    Raises:
      DataError: the tokens are not those that were written.
    """
    mapped.verify(file.path, file.sha256)


def tokenizer_of(path: str | Path) -> Tokenizer:
    """The tokenizer that is kept in a token file's metadata.

    Raises:
      DataError: it is missing or damaged.
    """
    path = expanded(path)
    meta = _metadata(path)
    try:
        tokenizer = tokenizers.from_json(json.dumps(meta["tokenizer_json"]))
    except DataError as error:
        raise DataError(f"the tokenizer in {path.with_suffix('.json')}: {error}") from error
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (meta["tokenizer"], meta["vocab_size"]):
        raise DataError(f"the tokenizer in {path.with_suffix('.json')} is not the one that its metadata describes")
    return tokenizer


def _metadata(path: Path) -> dict[str, Any]:
    """The content of NAME.json of a token file NAME.bin, as it was written."""
    if not path.is_file():
        if found := glob.glob(str(path)) if glob.has_magic(str(path)) else [*path.glob("*.bin")]:
            raise paths.several(str(path), map(Path, found))
        if path.is_dir():
            raise DataError(f"{path} is a folder; a token file is expected")
        raise paths.missing(path)
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise DataError(
            f"token file {path} has no metadata {beside.name} next to it: write it with jaxlm.data.write_tokens; or, "
            f"for raw ids as nanoGPT's, let data.tokenizer name what made them, such as gpt2{_pickled(path)}"
        )
    try:
        meta = json.loads(beside.read_bytes())
        whole = isinstance(meta, dict) and meta.pop("check", None) == seal(meta)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"can't read the metadata {beside}: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{beside} is not metadata of a token file: no format {FORMAT!r}")
    match meta:
        case {
            "dtype": "uint16" | "uint32",
            "num_tokens": int(num_tokens),
            "num_bytes": int(),
            "num_documents": int(),
            "max_id": int(max_id),
            "vocab_size": int(vocab_size),
            "sha256": str(),
            "tokenizer": str(),
            "source": str(),
            "tokenizer_json": dict(),
        } if whole and num_tokens > 0 and 0 <= max_id < vocab_size:
            return meta
    raise DataError(f"the metadata {beside} is damaged, or was edited: write it with jaxlm.data.write_tokens")


def write(path: Path, chunks: Iterable[Chunk], tokenizer: Tokenizer, source: str) -> None:
    """NAME.bin, then NAME.json; each appears whole or not at all. Two writers of the same tokens do no harm."""
    with atomic(path) as file:
        meta = _described(chunks, tokenizer, source, file.write)
        if not meta["num_tokens"]:
            raise DataError(f"no tokens to write to {path}")
    with atomic(path.with_suffix(".json")) as file:
        file.write(json.dumps({**meta, "check": seal(meta)}).encode())


def _raw(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The metadata of ids that have none. Reads them, and not by a map, which may end in a SIGBUS."""
    if pickled := _pickled(path):
        raise DataError(f"{path} is not of data.tokenizer{pickled}")
    itemsize = tokenizer.dtype.itemsize
    with readers.reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size or size % itemsize:
            raise DataError(f"{path} holds {size} bytes; expected token ids of {itemsize} bytes, as it has no metadata")

        def chunks() -> Iterator[Chunk]:
            while part := file.read(_PART * itemsize):
                yield _chunk(np.frombuffer(part, tokenizer.dtype), tokenizer)

        try:
            return _described(chunks(), tokenizer, "", lambda _: None)
        except DataError as error:
            what = f"{path} has no metadata, and is not uint{8 * itemsize} ids of data.tokenizer"
            raise DataError(f"{what}: {error}") from error


def _pickled(path: Path) -> str:
    """What is to be said where nanoGPT kept a vocabulary beside the ids."""
    if not (path.parent / "meta.pkl").exists():
        return ""
    return (
        "; by the meta.pkl next to it, its ids are of characters: give the text itself as data.source (input.txt), and "
        "data.tokenizer=chars"
    )


def _described(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, source: str, keep: Callable[[memoryview], object]
) -> dict[str, Any]:
    """The metadata of ids, whose bytes go to `keep`."""
    total, max_id, num_bytes, num_documents = 0, 0, 0, 0
    digest = hashlib.sha256()
    for chunk in chunks:
        max_id = max(max_id, _check_range(chunk.ids, tokenizer))
        ids = np.ascontiguousarray(chunk.ids, tokenizer.dtype)  # in range, so nothing wraps
        keep(ids.data)
        digest.update(ids.data)
        total += len(ids)
        num_bytes += chunk.num_bytes
        num_documents += chunk.num_documents
    return {
        "format": FORMAT,
        "dtype": f"uint{8 * tokenizer.dtype.itemsize}",
        "num_tokens": total,
        "num_bytes": num_bytes,
        "num_documents": num_documents,
        "max_id": max_id,
        "vocab_size": tokenizer.vocab_size,
        "sha256": digest.hexdigest(),
        "tokenizer": tokenizer.fingerprint,
        "source": source,
        "tokenizer_json": json.loads(tokenizer.to_json()),
    }


def _chunk(ids: np.ndarray, tokenizer: Tokenizer) -> Chunk:
    _check_range(ids, tokenizer)
    ends = int(np.count_nonzero(ids == tokenizer.end_of_text))
    return Chunk(ids, int(tokenizer.byte_lengths[ids].sum(dtype=np.int64)), ends)


def _check_range(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """The highest of `ids`, all of which are in the vocabulary."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= tokenizer.vocab_size:
        bad = low if low < 0 else high
        raise DataError(f"token id {bad} is outside of the tokenizer's vocabulary of {tokenizer.vocab_size}")
    return high
