"""The documents of one file, by its kind: all of a text file, or the rows of a .jsonl, .csv or .parquet file.

Nothing is guessed about text: it is UTF-8 or an error that says where it isn't; line ends (CRLF too) and NULs stay as
they are; a byte order mark at the start of a file is dropped. Text, .jsonl and .csv may be packed: NAME.txt.gz.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import columns
from jaxlm.data.forms import Document, Form
from jaxlm.errors import DataError, closest

_BYTE_ORDER_MARK = codecs.BOM_UTF8.decode()

_PACKED = {
    "gzip": rb"\x1f\x8b",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "bzip2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\0",
    "zip": rb"PK\x03\x04",
}
"""How a file begins that was packed by each."""

_ROWS = 256  # of a table in memory at once: Arrow's own 65,536 are gigabytes where each is a book


class File(NamedTuple):
    name: str  # relative to the spec, with forward slashes
    path: Path


def read(file: File, form: Form, errors: str) -> Iterator[Document]:
    """The documents of a file; one with a suffix of no known kind is text.

    Args:
      form: what is made of a row.
      errors: "strict", "replace" to put U+FFFD for what is not UTF-8, or "skip" to leave out such a text file.

    Raises:
      DataError: it can't be read, is not of its kind or not UTF-8, or a row lacks a column or text in it.
    """
    return _READERS.get(kind(file.path), _text)(file, form, errors)


def kind(path: Path) -> str:
    """The suffix, in small letters, that says what a file holds: .txt of NAME.txt.gz too."""
    suffix = path.suffix.lower()
    return kind(Path(path.stem)) if suffix == ".gz" else suffix


def _text(file: File, form: Form, errors: str) -> Iterator[Document]:
    if form.pairs:
        raise DataError(f"{file.path} is text, and has no pairs; they are rows of .jsonl, .csv, .parquet or hf://")
    with _opened(file.path) as opened:
        raw = opened.read()
    try:
        text = _decode(raw, file.path, "strict" if errors == "skip" else errors)
    except DataError:
        if errors != "skip":
            raise
        return
    del raw  # as large as the text, for as long as that is in use
    if text := text.removeprefix(_BYTE_ORDER_MARK):
        yield Document(file.name, text)


def _jsonl(file: File, form: Form, errors: str) -> Iterator[Document]:
    for number, line in _lines(file.path, errors):
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            wanted = ", ".join(map(repr, form.columns))
            raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object with the text in {wanted}")
        yield from form.documents(f"{file.name}:{number}", where, texts(row, where, form, errors))


def _csv(file: File, form: Form, errors: str) -> Iterator[Document]:
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB is shorter than many a document
    rows = csv.reader((line for _, line in _lines(file.path, errors)), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        check_columns(str(file.path), form, header)
        for row in filter(None, rows):
            where = f"{file.path}, line {rows.line_num}"
            if len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields; the header has {len(header)}")
            yield from form.documents(f"{file.name}:{rows.line_num}", where, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{file.path}, line {rows.line_num}: not CSV: {error}") from error


def _parquet(file: File, form: Form, errors: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{file.path} needs pyarrow: pip install 'jaxlm[data]'") from error
    number = 0
    try:
        with reading(file.path), pq.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            held = columns.roots(form.columns, names)
            check_columns(str(file.path), form, columns.with_paths(form.columns, names))
            casts = {}
            within = [column for column, root in held.items() if root != column]
            for column in (column for column in form.columns if column not in within):
                kind = table.schema_arrow.field(column).type
                kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
                if not (text or (form.pairs and pa.types.is_integer(kind))):
                    raise DataError(f"{file.path}: column {column!r} is {kind}; expected {_expected(form)}")
                # As bytes, since Arrow doesn't check that its strings are UTF-8.
                casts[column] = (kind, pa.large_binary()) if text else (kind,)
            for batch in table.iter_batches(_ROWS, columns=list(dict.fromkeys(held.values()))):
                nested = {held[column]: batch.column(held[column]).to_pylist() for column in within}
                parts = [functools.reduce(pa.Array.cast, kinds, batch.column(name)) for name, kinds in casts.items()]
                for i in range(batch.num_rows):
                    where = f"{file.path}, row {number}"
                    cells = zip(casts, (part[i].as_py() for part in parts), strict=True)
                    given = {name: _decode(x, where, errors) if isinstance(x, bytes) else x for name, x in cells}
                    given |= {root: rows[i] for root, rows in nested.items()}
                    yield from form.documents(f"{file.name}:{number}", where, texts(given, where, form, errors))
                    number += 1
    except pa.ArrowException as error:
        raise DataError(f"{file.path}: not Parquet: {str(error).splitlines()[0]}") from error
    except UnicodeDecodeError as error:  # of a column within a column, which Arrow gives as Python's values
        raise DataError(f"{file.path}, after row {number}: not UTF-8 text") from error


_READERS: dict[str, Callable[[File, Form, str], Iterator[Document]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def texts(row: Mapping[str, Any], where: str, form: Form, errors: str) -> dict[str, str]:
    """The text in each of a form's columns: a string, or, in a template, an integer such as a label. (Other numbers
    can be spelled in several ways.)

    Raises:
      DataError: a column is not there, or something else is in it.
    """
    row = columns.reached(row, form.columns)
    check_columns(where, form, row)
    return {column: _text_of(row[column], where, column, form, errors) for column in form.columns}


def _text_of(value: Any, where: str, column: str, form: Form, errors: str) -> str:
    """JSON can spell half a surrogate pair, which has no UTF-8 form."""
    if form.pairs and isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} is {type(value).__name__}; expected {_expected(form)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where}: {column!r} has a lone surrogate at character {error.start}. "
                'data.errors="replace" goes on with U+FFFD in its place'
            ) from error
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _expected(form: Form) -> str:
    return "a string or an integer" if form.pairs else "a string"


def check_columns(where: str, form: Form, columns: Iterable[str]) -> None:
    """Raises DataError for the first column that isn't there, with the nearest name that is, or is there twice."""
    columns = list(columns)
    for column, field in form.columns.items():
        if column not in columns:
            known = sorted(map(str, columns))  # a function's rows may have numbers for keys
            match = closest(column, known)
            hint = f"did you mean {match!r}? " if match else ""
            listed = ", ".join(name if name.isprintable() else repr(name) for name in known) or "none"
            raise DataError(f"{where}: no column {column!r}, which {field} names; {hint}known: {listed}")
        if columns.count(column) > 1:
            raise DataError(f"{where}: {columns.count(column)} columns are called {column!r}, which {field} names")


def _lines(path: Path, errors: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a file, a line at a time."""
    position = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            text = _decode(line, path, errors, position)
            yield number, text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text
            position += len(line)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """A file of text, unpacked where its name ends in .gz."""
    with reading(path), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        start = file.peek(16)
        if found := next((name for name, pattern in _PACKED.items() if re.match(pattern, start)), ""):
            what = "name it NAME.gz" if found == "gzip" else "unpack it, or pack it with gzip, as NAME.gz"
            raise DataError(f"{path} is packed by {found}, and text was expected: {what}")
        yield file


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
    except (OSError, EOFError, zlib.error) as error:  # the latter two of a .gz that is cut off or damaged
        raise DataError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from error
