"""Text in: a spec such as `stdlib`, a file, a glob, a folder or hf://name becomes a lazy stream of documents.

A document is one text file, or one row of a .jsonl, .csv, .parquet file or of a hub dataset. Nothing is guessed about
text: it is UTF-8 or an error that says where it isn't; line ends stay as they are; a byte order mark is dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import glob
import hashlib
import json
import math
import os
import sys
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import hub
from jaxlm.errors import ConfigError, DataError, nearest

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".csv", ".parquet")
"""What is read from a folder. A file or a glob may name others: they are read as text."""

# Of the standard library: tests, and tables and demos that are not code as people write it.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"),
    *("encodings", "pydoc_data", "__pycache__"),
}


class Document(NamedTuple):
    name: str  # unique in its source, and the same wherever the source lies
    text: str  # not empty; no surrogates, so it has a UTF-8 form


class Source(NamedTuple):
    name: str  # for messages
    fingerprint: str  # sha256 of names, sizes and contents
    num_bytes: int  # about what `read` gives, for a progress bar; 0 where unknown
    read: Callable[[], Iterator[Document]]  # from the start at each call, in a fixed order; DataError if there is none


class _File(NamedTuple):
    name: str  # relative to the spec, with forward slashes
    path: Path


def open_source(spec: str, *, text_field: str = "text", errors: str = "strict") -> Source:
    """The documents that `spec` names. Reads every file once, for the fingerprint.

    Args:
      spec: `stdlib` (the Python standard library's own source), a file, a glob, a folder (read recursively: files
        with one of `SUFFIXES`, nothing hidden), or `hf://name[:split]`; also `hf://owner/name/config[:split]`.
      text_field: the column of .jsonl, .csv, .parquet and hf:// that holds the text.
      errors: "strict", or "replace" to put U+FFFD for what is not UTF-8.

    Raises:
      DataError: missing, empty or unreadable. Bad rows and bytes raise it when they are read.
    """
    if spec.startswith("hf://"):
        return _hub_source(spec, text_field, errors)
    if spec == "stdlib":
        errors = "skip"  # a few of its files are in other encodings on purpose
    files = _files(spec)

    def read() -> Iterator[Document]:
        for file in files:
            yield from _READERS.get(file.path.suffix.lower(), _text)(file, text_field, errors)

    num_bytes = sum(file.path.stat().st_size for file in files)
    return Source(spec, _fingerprint(files), num_bytes, lambda: _not_none(spec, read()))


def missing(path: str | Path) -> DataError:
    """The error for a path that doesn't exist, with the nearest name that does."""
    given = path = Path(path)
    try:
        path.stat()
    except PermissionError as error:
        return DataError(f"can't read {path}: {error.strerror}")
    except (OSError, ValueError):  # no such name, or one that can't be
        pass
    while not os.path.exists(path.parent):
        path = path.parent
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        siblings = []
    if path.parent == Path("."):
        siblings.append("stdlib")
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    return DataError(f"no such file or folder: {given}{hint}")


# Files


def _files(spec: str) -> list[_File]:
    """The files of a spec, in an order that is the same everywhere."""
    path = Path(spec).expanduser()
    if spec == "stdlib":
        files = _walk(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_STDLIB)
    elif os.path.isdir(path):
        files = _walk(path, SUFFIXES, {"__pycache__"})
        if not files:
            raise DataError(f"folder {path} holds no file with one of the suffixes {' '.join(SUFFIXES)}")
    elif os.path.isfile(path):
        files = [_File(path.name, path)]
        with _io(path):
            if path.stat().st_size == 0:
                raise DataError(f"{path} is empty")
    elif os.path.exists(path):
        raise DataError(f"{path} is neither a file nor a folder")
    elif glob.has_magic(spec):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not found:
            raise DataError(f"no file matches {spec!r}; from {Path.cwd()}")
        top = os.path.commonpath([p.parent for p in found])
        files = [_File(p.relative_to(top).as_posix(), p) for p in found]
    else:
        raise missing(path)
    return files


def _walk(top: Path, suffixes: Sequence[str], skip: set[str]) -> list[_File]:
    def fail(error: OSError) -> None:
        raise DataError(f"can't read folder {error.filename}: {error.strerror}")

    found = []
    for folder, folders, names in os.walk(top, onerror=fail):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
    return sorted(_File(path.relative_to(top).as_posix(), path) for path in found)


def _fingerprint(files: Iterable[_File]) -> str:
    """sha256 over the name, size and content of each file: not over its path or time, so a copy is the same data."""
    total = hashlib.sha256()
    for file in files:
        with _io(file.path), file.path.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(json.dumps([file.name, opened.tell(), content]).encode())
    return total.hexdigest()


@contextlib.contextmanager
def _io(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}") from error


# Readers: each gives the documents of one file. `errors` is "strict", "replace" or "skip".


def _text(file: _File, text_field: str, errors: str) -> Iterator[Document]:
    with _io(file.path):
        raw = file.path.read_bytes()
    if errors == "skip":
        with contextlib.suppress(DataError):
            yield from _document(file.name, _decode(raw, file.path, "strict"))
    else:
        yield from _document(file.name, _decode(raw, file.path, errors))


def _jsonl(file: _File, text_field: str, errors: str) -> Iterator[Document]:
    for number, line in _lines(file.path, errors):
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object with the text in {text_field!r}")
        if text_field not in row:
            raise _no_column(where, text_field, row)
        yield from _document(f"{file.name}:{number}", _string(row[text_field], where, text_field, errors))


def _csv(file: _File, text_field: str, errors: str) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB is shorter than many a document
    rows = csv.reader((line for _, line in _lines(file.path, errors)), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        if text_field not in header:
            raise _no_column(str(file.path), text_field, header)
        column = header.index(text_field)
        for row in filter(None, rows):
            if len(row) != len(header):
                raise DataError(f"{file.path}, line {rows.line_num}: {len(row)} fields; the header has {len(header)}")
            yield from _document(f"{file.name}:{rows.line_num}", row[column])
    except csv.Error as error:
        raise DataError(f"{file.path}, line {rows.line_num}: not CSV: {error}") from error


def _parquet(file: _File, text_field: str, errors: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{file.path} needs pyarrow: pip install 'jaxlm[data]'") from error
    try:
        with _io(file.path), pq.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise _no_column(str(file.path), text_field, names)
            kind = table.schema_arrow.field(text_field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{file.path}: column {text_field!r} is {kind}; expected string")
            number = 0
            for batch in table.iter_batches(columns=[text_field]):
                # As bytes, since Arrow doesn't check that its strings are UTF-8.
                for value in batch.column(0).cast(kind).cast(pa.large_binary()):
                    where, number = f"{file.path}, row {number}", number + 1
                    raw = value.as_py()
                    text = raw if raw is None else _decode(raw, where, errors)
                    yield from _document(f"{file.name}:{number - 1}", _string(text, where, text_field, errors))
    except pa.ArrowException as error:
        raise DataError(f"{file.path}: not Parquet: {str(error).splitlines()[0]}") from error


_READERS: dict[str, Callable[[_File, str, str], Iterator[Document]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _hub_source(spec: str, text_field: str, errors: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{spec} needs the datasets library: pip install 'jaxlm[data]'") from error
    if not hub.offline() and (reason := hub.unreachable()):
        raise DataError(f"{spec}: {reason}. For a dataset in the local cache set HF_HUB_OFFLINE=1")
    name, _, split_name = spec.removeprefix("hf://").partition(":")
    parts = name.split("/")
    config = parts[2] if len(parts) == 3 else None
    try:
        dataset = datasets.load_dataset("/".join(parts[:2]), config, split=split_name or "train")
    except Exception as error:  # whatever it is, it is about this name, this split or this machine
        raise DataError(f"{spec}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if text_field not in dataset.column_names:
        raise _no_column(spec, text_field, dataset.column_names)

    def read() -> Iterator[Document]:
        number = 0
        for rows in dataset.select_columns([text_field]).iter(batch_size=1000):
            for value in rows[text_field]:
                yield from _document(str(number), _string(value, f"{spec}, row {number}", text_field, errors))
                number += 1

    # The library's fingerprint comes from the hashes of the files in the hub, not from where they are cached.
    fingerprint = hashlib.sha256(f"{name}:{dataset._fingerprint}".encode()).hexdigest()
    return Source(spec, fingerprint, dataset.dataset_size or 0, lambda: _not_none(spec, read()))


def _document(name: str, text: str) -> Iterator[Document]:
    if text:
        yield Document(name, text)


def _not_none(name: str, documents: Iterator[Document]) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise DataError(f"no text in {name}: all of it is empty")
    yield first
    yield from documents


def _lines(path: Path, errors: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a file, a line at a time."""
    position = 0
    with _io(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield number, _decode(line, path, errors, position)
            position += len(line)


def _decode(raw: bytes, where: object, errors: str, position: int = 0) -> str:
    """UTF-8 text of bytes that stand at `position` of their file."""
    try:
        text = raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: byte 0x{raw[error.start]:02x} at position {position + error.start}. "
            'data.errors="replace" goes on with U+FFFD in its place'
        ) from error
    return text.removeprefix(codecs.BOM_UTF8.decode()) if position == 0 else text


def _string(value: Any, where: str, text_field: str, errors: str) -> str:
    """`value`, if it is text that has a UTF-8 form. JSON can spell half a surrogate pair, which has none."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {text_field!r} is {type(value).__name__}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where}: {text_field!r} has a lone surrogate at character {error.start}. "
                'data.errors="replace" goes on with U+FFFD in its place'
            ) from error
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _no_column(where: str, text_field: str, columns: Iterable[str]) -> DataError:
    columns = sorted(columns)
    hint = nearest(text_field, columns)
    if not hint.startswith("known"):
        hint += f" known: {', '.join(columns)}"
    return DataError(f"{where}: no column {text_field!r}, which is data.text_field; {hint}")


# The held-out part


def share(validation: str) -> float | None:
    """0.05 of "5%"; None where `validation` is not a percentage.

    Raises:
      ConfigError: a percentage that isn't between 0 and 100.
    """
    if not validation.strip().endswith("%"):
        return None
    try:
        percent = float(validation.strip()[:-1])
    except ValueError:
        percent = math.nan
    if not 0 < percent < 100:
        raise ConfigError(f"data.validation is {validation!r}; expected more than 0% and less than 100%, such as '5%'")
    return percent / 100


def split(source: Source, share: float) -> tuple[Source, Source]:
    """Parts a source into (train, held out), the latter with about `share` of the bytes. Reads it once.

    Whole documents are held out, chosen by a hash of their names: so no text is on both sides, no seed moves it, and
    a document added to a folder leaves most of the others where they were. Of a single document, the tail is held out.

    Raises:
      DataError: the source has no two characters to part.
    """
    hashes, lengths = array("Q"), array("Q")
    for document in source.read():
        hashes.append(int.from_bytes(hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).digest()[:8]))
        lengths.append(len(document.text.encode()))
    sizes = np.array(lengths, np.int64)
    if len(sizes) == 1:
        return _split_text(source, share)
    held = _held_out(np.array(hashes), sizes, share)

    def part(side: str, chosen: np.ndarray) -> Source:
        def read() -> Iterator[Document]:
            return (document for document, take in zip(source.read(), chosen, strict=True) if take)

        return Source(source.name, _side(source, share, side), int(sizes[chosen].sum()), read)

    return part("train", ~held), part("held out", held)


def _held_out(hashes: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """bool[documents] of those held out: in the order of their hashes, the number that comes nearest to the share."""
    target = share * sizes.sum()
    order = np.argsort(hashes, kind="stable")
    # One document larger than the whole share would make it another share.
    order = order[sizes[order] <= target]
    if not len(order):
        order = np.array([np.argmin(sizes)])
    count = int(np.argmin(np.abs(np.cumsum(sizes[order]) - target))) + 1
    held = np.zeros(len(sizes), bool)
    held[order[: min(count, len(sizes) - 1)]] = True
    return held


def _split_text(source: Source, share: float) -> tuple[Source, Source]:
    length = len(next(source.read()).text)
    if length < 2:
        raise DataError(f'{source.name} is one character long: nothing to hold out; set data.validation=""')
    cut = min(max(round(length * (1 - share)), 1), length - 1)

    def part(side: str, chosen: slice) -> Source:
        def read() -> Iterator[Document]:
            return (Document(f"{name}[{side}]", text[chosen]) for name, text in source.read())

        num_bytes = source.num_bytes * len(range(length)[chosen]) // length
        return Source(source.name, _side(source, share, side), num_bytes, read)

    return part("train", slice(None, cut)), part("held out", slice(cut, None))


def _side(source: Source, share: float, side: str) -> str:
    return hashlib.sha256(json.dumps([source.fingerprint, share, side]).encode()).hexdigest()
