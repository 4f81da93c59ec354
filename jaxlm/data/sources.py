"""Text in: a spec such as `stdlib`, a file, a glob, a folder or hf://name becomes a lazy stream of documents.

A document is one text file, or one row: of a .jsonl, .csv or .parquet file, a hub dataset, or what a function gives.
"""

from __future__ import annotations

import collections
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm import hub, lookup
from jaxlm.data import columns, forms, readers
from jaxlm.data.forms import Document, Form
from jaxlm.data.readers import File
from jaxlm.errors import DataError, closest
from jaxlm.files import expanded

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".csv", ".parquet")
"""What is read from a folder, packed by gzip too. A file or a glob may name others: they are read as text."""

# Of the standard library: tests, and tables and demos that are not code as people write it.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"),
    *("encodings", "pydoc_data", "__pycache__"),
}


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
        links lead to as well, each folder once: files with one of `SUFFIXES`, nothing hidden),
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
    files, left_out = _files(spec)

    def read() -> Iterator[Document]:
        for file in files:
            yield from readers.read(file, form, errors)

    packed = any(file.path.suffix.lower() == ".gz" for file in files)
    num_bytes = 0 if packed else sum(file.path.stat().st_size for file in files)
    contents = [_content(file) for file in files]
    return Source(spec, _fingerprint(contents), num_bytes, lambda: _not_none(spec, read()), left_out, contents)


def missing(path: str | Path) -> DataError:
    """The error for a path that doesn't exist, with the nearest name that does."""
    given = path = Path(path)
    if os.path.islink(path):
        return DataError(f"{path} is a link to {os.readlink(path)}, which is not there")
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
    close = closest(path.name, siblings)
    hint = f"; did you mean {path.parent / close}?" if close else ""
    return DataError(f"no such file or folder: {given}{hint}")


def changed(spec: str) -> DataError:
    """The error for a source that is another now than when it was opened."""
    return DataError(f"{spec} has changed while it was read; run again when it is complete")


def several(spec: str, paths: Iterable[Path]) -> DataError:
    """The error for token files where one source is named."""
    listed = sorted(map(str, paths))
    names = ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
    return DataError(
        f"{spec} holds token files ({len(listed)}: {names}), and one of them at a time is a source: name it, or join "
        "them: jaxlm.data.write_tokens('all.bin', [jaxlm.data.open_tokens(path).tokens for path in paths], "
        "jaxlm.data.tokenizer_of(paths[0]))"
    )


# Files


def _files(spec: str) -> tuple[list[File], str]:
    """The files of a spec, in an order that is the same everywhere; and which of a folder were left out, in words."""
    path, left_out = expanded(spec), ""
    if spec == "stdlib":
        files, _ = _walk(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_STDLIB)
    elif os.path.isdir(path):
        files, others = _walk(path, SUFFIXES, {"__pycache__"})
        if not files and (tokens := [other for other in others if other.suffix == ".bin"]):
            raise several(spec, tokens)
        left_out = _counted(others)
        if not files:
            there = f"; {left_out}" if left_out else ""
            raise DataError(f"folder {path} holds no file with one of the suffixes {' '.join(SUFFIXES)}{there}")
    elif os.path.isfile(path):
        files = [File(path.name, path)]
        with readers.reading(path):
            if path.stat().st_size == 0:
                raise DataError(f"{path} is empty")
    elif os.path.exists(path):
        raise DataError(f"{path} is neither a file nor a folder")
    elif glob.has_magic(spec):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not found:
            raise DataError(f"no file matches {spec!r}; from {Path.cwd()}")
        top = os.path.commonpath([p.parent for p in found])
        files = [File(p.relative_to(top).as_posix(), p) for p in found]
    else:
        raise missing(path)
    return files, left_out


def _counted(others: Sequence[Path]) -> str:
    if not others:
        return ""
    suffixes = collections.Counter(path.suffix.lower() or "none" for path in others).most_common()
    listed = ", ".join(f"{suffix} {count}" for suffix, count in suffixes[:5]) + (", ..." if suffixes[5:] else "")
    return f"files with other suffixes were left out: {len(others)} ({listed})"


def _walk(top: Path, suffixes: Sequence[str], skip: set[str]) -> tuple[list[File], list[Path]]:
    """The files below a folder whose kind is one of `suffixes`, and the others; nothing hidden."""

    def fail(error: OSError) -> None:
        raise DataError(f"can't read folder {error.filename}: {error.strerror}")

    found: list[Path] = []
    read: set[str] = set()  # so that links in a circle end
    starts = [str(top)]
    for start in starts:  # links are followed last: what has a place of its own keeps its name
        for folder, folders, names in os.walk(start, onerror=fail):
            if (real := os.path.realpath(folder)) in read:
                folders.clear()
                continue
            read.add(real)
            folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
            starts += [link for name in folders if os.path.islink(link := os.path.join(folder, name))]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    found = [path for path in found if path.is_file()]
    files = [path for path in found if readers.kind(path) in suffixes]
    others = [path for path in found if readers.kind(path) not in suffixes]
    return sorted(File(path.relative_to(top).as_posix(), path) for path in files), others


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
                given = columns.reached(dict(zip(read_here, row, strict=True)), form.columns)
                readers.check_columns(where, form, given)
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
            row = columns.reached(row, form.columns)
            readers.check_columns(where, form, row)
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
