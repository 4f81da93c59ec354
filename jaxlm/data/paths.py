"""A path, a glob or a folder becomes the files that are read."""

from __future__ import annotations

import collections
import glob
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxlm.data import readers
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


def files(spec: str) -> tuple[list[File], str]:
    """The files of a spec, in an order that is the same everywhere; and which of a folder were left out, in words."""
    if spec == "stdlib":
        return _walk(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_STDLIB)[0], ""
    path = expanded(spec)
    if os.path.isdir(path):
        return _folder(spec, path)
    if os.path.isfile(path):
        with readers.reading(path):
            if path.stat().st_size == 0:
                raise DataError(f"{path} is empty")
        return [File(path.name, path)], ""
    if os.path.exists(path):
        raise DataError(f"{path} is neither a file nor a folder")
    if not glob.has_magic(spec):
        raise missing(path)
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    if not found:
        raise DataError(f"no file matches {spec!r}; from {Path.cwd()}")
    top = os.path.commonpath([p.parent for p in found])
    return [File(p.relative_to(top).as_posix(), p) for p in found], ""


def _folder(spec: str, path: Path) -> tuple[list[File], str]:
    found, others = _walk(path, SUFFIXES, {"__pycache__"})
    left_out = _counted(others)
    if not found:
        if tokens := [other for other in others if other.suffix == ".bin"]:
            raise several(spec, tokens)
        there = f"; {left_out}" if left_out else ""
        raise DataError(f"folder {path} holds no file with one of the suffixes {' '.join(SUFFIXES)}{there}")
    return found, left_out


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


def several(spec: str, paths: Iterable[Path]) -> DataError:
    """The error for token files where one source is named."""
    listed = sorted(map(str, paths))
    names = ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
    return DataError(
        f"{spec} holds token files ({len(listed)}: {names}), and one of them at a time is a source: name it, or join "
        "them: jaxlm.data.write_tokens('all.bin', [jaxlm.data.open_tokens(path).tokens for path in paths], "
        "jaxlm.data.tokenizer_of(paths[0]))"
    )
