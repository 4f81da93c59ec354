"""Where jaxlm caches, and how a file appears there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_dir(setting: str = "") -> Path:
    """Where jaxlm caches: `setting`, else $JAXLM_CACHE, else jaxlm in the user's cache directory."""
    if setting or os.environ.get("JAXLM_CACHE"):
        return Path(setting or os.environ["JAXLM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well, on disk by then; otherwise nothing is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
