"""What makes a checkpoint whole: a list of its files with sizes and sha256, written last.

Restoring a flipped bit raises nothing in any library below, so nothing is restored that does not match its list.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxlm import files

NAME = "manifest.json"


def write(folder: Path, **facts: Any) -> None:
    """Lists all files below a folder, with `facts` beside them as JSON values. Appears whole or not at all."""
    listed = {name: [size, _sha256(folder / name)] for name, size in _files(folder).items()}
    content = {"files": listed, **facts}
    with files.atomic(folder / NAME) as file:
        file.write(json.dumps({**content, "check": files.seal(content)}).encode())


def read(folder: Path) -> dict[str, Any]:
    """The facts that were written, and `files`.

    Raises:
      ValueError: there is no manifest, or it is damaged.
    """
    try:
        content = json.loads((folder / NAME).read_bytes())
        if content.pop("check") == files.seal(content):
            return content
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing: the save was not finished") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{NAME} is damaged")


def verify(folder: Path, item: str = "") -> None:
    """Reads all files of a folder, or those of one item below it, and compares them with the manifest.

    Raises:
      ValueError: says which file is missing, new or not what was written.
    """
    listed = read(folder)["files"]
    try:
        there = _files(folder)
    except OSError as error:  # as of a folder that is being removed
        raise ValueError(f"its files can't be listed: {error.strerror}") from error
    for name in sorted(listed | there):
        if not name.startswith(f"{item}/" if item else ""):
            continue
        if name not in there:
            raise ValueError(f"{name} is missing")
        if name not in listed:
            raise ValueError(f"{name} was not saved with it")
        size, digest = listed[name]
        if there[name] != size:
            raise ValueError(f"{name} has {there[name]:,} bytes, had {size:,} when saved")
        if _sha256(folder / name) != digest:
            raise ValueError(f"{name} has another sha256 than when it was saved")


def _files(folder: Path) -> dict[str, int]:
    """{name: bytes} of all files below a folder but the manifest."""
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {name: size for name, size in found.items() if name != NAME}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path.name} can't be read: {error.strerror}") from error
