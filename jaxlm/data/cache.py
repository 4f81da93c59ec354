"""The cache of token files: an entry is built by one process, once, and used by all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxlm.data.tokenfile import TokenFile, open_tokens
from jaxlm.errors import DataError
from jaxlm.files import cache_dir, locked

_ABANDONED = 600  # seconds for which no one wrote to a file


def filled(
    setting: str, what: Sequence[object], names: Sequence[str], build: Callable[[Path], None]
) -> dict[str, TokenFile]:
    """The token files of a cache entry, {name: file}, which `build` fills where it isn't whole.

    Args:
      setting: `data.cache_dir`.
      what: the tokens depend on; JSON values.
      names: of the files, of which `build` writes the last one last.
      build: writes NAME.bin and NAME.json into a folder.

    Raises:
      DataError: the cache can't be written; and what `build` raises.
    """
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    entry = cache_dir(setting) / "tokens" / key[:16]

    complete = entry / f"{names[-1]}.json"

    def cached() -> dict[str, TokenFile]:
        return {name: open_tokens(entry / f"{name}.bin") for name in names}

    def wait() -> None:
        print(f"note: waiting for another process, which is tokenizing the same text into {entry}", file=sys.stderr)

    try:
        if complete.exists():
            try:
                return cached()
            except DataError as error:
                print(f"warning: rebuilding the cache entry {entry}: {error}", file=sys.stderr)
                complete.unlink(missing_ok=True)
        entry.mkdir(parents=True, exist_ok=True)
        _sweep(entry.parent)
        with locked(entry, wait) as held:
            if not complete.exists():  # by the process that was waited for
                with _emptied(entry, names, held):
                    build(entry)
    except OSError as error:
        raise DataError(
            f"can't write the token cache {entry}: {error.strerror or error}. "
            "Set data.cache_dir, or JAXLM_CACHE, to a folder that can be written"
        ) from error
    return cached()


@contextlib.contextmanager
def _emptied(entry: Path, names: Sequence[str], held: bool) -> Iterator[None]:
    """Leaves nothing of a build that breaks off, where no other process is at it."""
    try:
        yield
    except BaseException:
        for name in names if held else ():
            for suffix in (".json", ".bin"):
                (entry / f"{name}{suffix}").unlink(missing_ok=True)
        raise


def _sweep(entries: Path) -> None:
    """Removes what killed processes were writing: temporary files of gigabytes, in entries that no one is at."""
    for left in entries.glob("*/.*.tmp"):
        with contextlib.suppress(OSError), locked(left.parent) as held:
            # some file systems lock within one machine only: who writes from another does so all the time
            if held and time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
