"""Text in: a spec such as `stdlib`, a file, a glob, a folder or hf://name becomes a lazy stream of documents.

A document is one text file, or one row: of a .jsonl, .csv or .parquet file, a hub dataset, or what a function gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxlm import hub, lookup
from jaxlm.data import columns, forms, paths, readers
from jaxlm.data.forms import Document, Form
from jaxlm.data.readers import File
from jaxlm.errors import DataError

_FUNCTION = re.compile(r"[\w.]+:\w+")


class Content(NamedTuple):
    """What a file held when its source was opened."""

    file: File
    num_bytes: int
    sha256: str


class Source(NamedTuple):
    spec: str  # as given, of the whole where this is a part; opens it again
    fingerprint: str  # sha256 of names, sizes and contents
    num_bytes: int  # about what `read` gives, for a progress bar; 0 where unknown
    read: Callable[[], Iterator[Document]]  # from the start at each call, in a fixed order; DataError if there is none
    left_out: str = ""  # of a folder, in words
    contents: Sequence[Content] = ()  # of its files, as they are read; none of the hub or a function


def open_source(spec: str, *, form: Form | None = None, errors: str = "strict") -> Source:
    """The documents that `spec` names. Reads every file once, for the fingerprint.

    Args:
      spec: `stdlib` (the Python standard library's own source), a file, a glob, a folder (read recursively, and what
        links lead to as well, each folder once: files with one of `paths.SUFFIXES`, nothing hidden),
        `hf://name[:split]` or `hf://owner/name/config[:split]`; or `package.module:function`, which gives rows,
        {column: text}, the same ones at each call.
      form: what is made of a row; by default its column "text" is a document.
      errors: "strict", or "replace" to put U+FFFD for what is not UTF-8.

    Raises:
      DataError: missing, empty or unreadable. Bad rows and bytes raise it when they are read.
      ConfigError: there is no such function.
    """
    form = form or forms.text()
    if spec.startswith("hf://"):
        return _hub_source(spec, form, errors)
    if _FUNCTION.fullmatch(spec) and not os.path.exists(spec):
        return _function_source(spec, form, errors)
    if spec == "stdlib":
        errors = "skip"  # a few of its files are in other encodings on purpose
    files, left_out = paths.files(spec)

    def read() -> Iterator[Document]:
        for file in files:
            yield from readers.read(file, form, errors)

    packed = any(file.path.suffix.lower() == ".gz" for file in files)
    num_bytes = 0 if packed else sum(file.path.stat().st_size for file in files)
    contents = [_content(file) for file in files]
    return Source(spec, _fingerprint(contents), num_bytes, lambda: _not_none(spec, read()), left_out, contents)


def changed(spec: str) -> DataError:
    """The error for a source that is another now than when it was opened."""
    return DataError(f"{spec} has changed while it was read; run again when it is complete")


def _content(file: File) -> Content:
    with readers.reading(file.path), file.path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        return Content(file, opened.tell(), sha256)


def _fingerprint(contents: Iterable[Content]) -> str:
    """sha256 over the name, size and content of each file: not over its path or time, so a copy is the same data."""
    total = hashlib.sha256()
    for file, num_bytes, sha256 in contents:
        total.update(json.dumps([file.name, num_bytes, sha256]).encode())
    return total.hexdigest()


# The hub


def _hub_source(spec: str, form: Form, errors: str) -> Source:
    name, _, split_name = spec.removeprefix("hf://").partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{spec!r} names no dataset; expected hf://name[:split] or hf://owner/name[/config][:split]")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{spec} needs the datasets library: pip install 'jaxlm[data]'") from error
    if not hub.offline() and (reason := hub.unreachable()):
        raise DataError(f"{spec}: {reason}. For a dataset in the local cache set HF_HUB_OFFLINE=1")
    config = parts[2] if len(parts) == 3 else None
    try:
        dataset = datasets.load_dataset("/".join(parts[:2]), config, split=split_name or "train")
    except Exception as error:  # whatever it is, it is about this name, this split or this machine
        raise DataError(f"{spec}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    held = columns.roots(form.columns, dataset.column_names)
    readers.check_columns(spec, form, columns.with_paths(form.columns, dataset.column_names))
    read_here = list(dict.fromkeys(held.values()))

    def read() -> Iterator[Document]:
        number = 0
        for rows in dataset.select_columns(read_here).iter(batch_size=1000):
            for row in zip(*(rows[column] for column in read_here), strict=True):
                where = f"{spec}, row {number}"
                given = dict(zip(read_here, row, strict=True))
                yield from form.documents(str(number), where, readers.texts(given, where, form, errors))
                number += 1

    # The library's fingerprint comes from the hashes of the files in the hub, not from where they are cached.
    fingerprint = hashlib.sha256(f"{name}:{dataset._fingerprint}".encode()).hexdigest()
    return Source(spec, fingerprint, dataset.dataset_size or 0, lambda: _not_none(spec, read()))


# A function


def _function_source(spec: str, form: Form, errors: str) -> Source:
    function = lookup.find("data source", spec)

    def rows() -> Iterator[tuple[str, str, Mapping[str, str]]]:
        with lookup.calling("data source", spec, function):
            yield from given_rows()

    def given_rows() -> Iterator[tuple[str, str, Mapping[str, str]]]:
        given = function()
        try:
            numbered = enumerate(given)
        except TypeError as error:
            raise DataError(f"{spec} gave {type(given).__name__}; expected rows, each a dict of columns") from error
        for number, row in numbered:
            where = f"{spec}, row {number}"
            if not isinstance(row, Mapping):
                raise DataError(f"{where}: {type(row).__name__}; expected a dict of columns")
            yield str(number), where, readers.texts(row, where, form, errors)

    def read() -> Iterator[Document]:
        for row in rows():
            yield from form.documents(*row)

    total, num_bytes = hashlib.sha256(), 0
    for _, _, row in rows():
        text = json.dumps(row).encode()
        total.update(text + b"\n")
        num_bytes += len(text)
    return Source(spec, total.hexdigest(), num_bytes, lambda: _not_none(spec, read()))


def _not_none(name: str, documents: Iterator[Document]) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise DataError(f"no text in {name}: all of it is empty")
    yield first
    yield from documents
