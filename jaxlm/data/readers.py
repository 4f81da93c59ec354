"""The documents of one file, by its kind: all of a text file, or the rows of a .jsonl, .csv or .parquet file.

Nothing is guessed about text: it is UTF-8 or an error that says where it isn't; line ends (CRLF too) and NULs stay as
they are; a byte order mark at the start of a file is dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import DataError, nearest

_BYTE_ORDER_MARK = codecs.BOM_UTF8.decode()


class Document(NamedTuple):
    name: str  # unique in its source, and the same wherever the source lies
    text: str  # not empty; no surrogates, so it has a UTF-8 form


class File(NamedTuple):
    name: str  # relative to the spec, with forward slashes
    path: Path


def read(file: File, text_field: str, errors: str) -> Iterator[Document]:
    """The documents of a file; one with a suffix of no known kind is text.

    Args:
      text_field: the column that holds the text of a row.
      errors: "strict", "replace" to put U+FFFD for what is not UTF-8, or "skip" to leave out such a text file.

    Raises:
      DataError: it can't be read, is not of its kind or not UTF-8, or a row has no text in `text_field`.
    """
    return _READERS.get(file.path.suffix.lower(), _text)(file, text_field, errors)


def _text(file: File, text_field: str, errors: str) -> Iterator[Document]:
    with reading(file.path):
        raw = file.path.read_bytes()
    try:
        text = _decode(raw, file.path, "strict" if errors == "skip" else errors)
    except DataError:
        if errors != "skip":
            raise
        return
    del raw  # as large as the text, for as long as that is in use
    yield from document(file.name, text.removeprefix(_BYTE_ORDER_MARK))


def _jsonl(file: File, text_field: str, errors: str) -> Iterator[Document]:
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
            raise no_column(where, text_field, row)
        yield from document(f"{file.name}:{number}", string(row[text_field], where, text_field, errors))


def _csv(file: File, text_field: str, errors: str) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB is shorter than many a document
    rows = csv.reader((line for _, line in _lines(file.path, errors)), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        if text_field not in header:
            raise no_column(str(file.path), text_field, header)
        column = header.index(text_field)
        for row in filter(None, rows):
            if len(row) != len(header):
                raise DataError(f"{file.path}, line {rows.line_num}: {len(row)} fields; the header has {len(header)}")
            yield from document(f"{file.name}:{rows.line_num}", row[column])
    except csv.Error as error:
        raise DataError(f"{file.path}, line {rows.line_num}: not CSV: {error}") from error


def _parquet(file: File, text_field: str, errors: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{file.path} needs pyarrow: pip install 'jaxlm[data]'") from error
    try:
        with reading(file.path), pq.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise no_column(str(file.path), text_field, names)
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
                    yield from document(f"{file.name}:{number - 1}", string(text, where, text_field, errors))
    except pa.ArrowException as error:
        raise DataError(f"{file.path}: not Parquet: {str(error).splitlines()[0]}") from error


_READERS: dict[str, Callable[[File, str, str], Iterator[Document]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def document(name: str, text: str) -> Iterator[Document]:
    """One; none where the text is empty."""
    if text:
        yield Document(name, text)


def string(value: Any, where: str, text_field: str, errors: str) -> str:
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


def no_column(where: str, text_field: str, columns: Iterable[str]) -> DataError:
    """The error for a column that isn't there, with the nearest name that is."""
    columns = sorted(columns)
    hint = nearest(text_field, columns)
    if not hint.startswith("known"):
        hint += f" known: {', '.join(columns)}"
    return DataError(f"{where}: no column {text_field!r}, which is data.text_field; {hint}")


def _lines(path: Path, errors: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a file, a line at a time."""
    position = 0
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(line, path, errors, position)
            yield number, text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text
            position += len(line)


def _decode(raw: bytes, where: object, errors: str, position: int = 0) -> str:
    """UTF-8 text of bytes that stand at `position` of their file."""
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: byte 0x{raw[error.start]:02x} at position {position + error.start}. "
            'data.errors="replace" goes on with U+FFFD in its place'
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses, as a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}") from error
