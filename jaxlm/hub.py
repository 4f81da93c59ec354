"""The Hugging Face hub: whether it can be asked, since its own look-ups stall for half a minute where it can't, and the
files of its models."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import DataError


def offline() -> bool:
    """Whether the user has set HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def unreachable(timeout: float = 5.0) -> str:
    """Why the hub can't be asked, found within `timeout` seconds; "" where it can."""
    if offline():
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    host = urllib.parse.urlsplit(endpoint)
    if host.scheme not in ("https", "http") or not host.hostname:
        return f"HF_ENDPOINT is {endpoint!r}; expected an address such as 'https://huggingface.co'"
    if urllib.request.getproxies().get("https"):
        return ""  # the proxy resolves names for us, so a look-up from here would say nothing
    failure = [f"{host.hostname} does not answer"]

    def probe() -> None:
        try:
            socket.create_connection((host.hostname, host.port or 443), timeout=timeout).close()
            failure.clear()
        except OSError as error:
            failure[0] = f"no connection to {host.hostname}: {error.strerror or error}"

    # In a thread, since a name look-up has no time limit of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return failure[0] if failure else ""


def is_id(name: str) -> bool:
    """Whether a name can be that of a repository: `owner/name` or `name`."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def snapshot(name: str, patterns: Sequence[str], needed: Sequence[str]) -> Path:
    """The folder with the files of a model: the local cache's where it has them, otherwise fetched into the cache.

    Args:
      name: `owner/name` or `name`.
      patterns: of the names of the files to fetch.
      needed: patterns that must each match a file, or the cache does not have the model.

    Raises:
      DataError: it is not in the cache, and the hub can't be asked or doesn't have it.
    """
    from huggingface_hub import snapshot_download

    def get(local: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=local))

    def lacking(folder: Path) -> str:
        return " and ".join(pattern for pattern in needed if not any(folder.glob(pattern)))

    cached = None
    with contextlib.suppress(Exception):  # it is not there, or in part
        cached = get(local=True)
    if cached and not lacking(cached):
        return cached
    if reason := unreachable():
        if cached and any(cached.glob("*.bin")):
            return cached  # another format: who reads it says how to convert it
        missing = (
            f"{name!r} in the local Hugging Face cache lacks {lacking(cached)}"
            if cached
            else (f"{name!r} is not in the local Hugging Face cache, or not all of it")
        )
        raise DataError(
            f"{missing}; and {reason}. Give a folder that save_pretrained wrote on another machine, or set HF_HOME to "
            "a cache that has the model"
        )
    try:
        fetched = get(local=False)
    except Exception as error:  # whatever it is, it is about this name or this machine
        raise DataError(f"can't fetch {name!r} from the hub: {str(error).strip().splitlines()[0]}") from error
    if lacking(fetched):
        raise DataError(
            f"{name!r} on the hub lacks {lacking(fetched)}: it is no model that jaxlm reads, or in another format: "
            f"convert it with transformers and PyTorch, from_pretrained({name!r}).save_pretrained('converted')"
        )
    return fetched
