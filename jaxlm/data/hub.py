"""Whether the Hugging Face hub can be asked: its own look-ups stall for half a minute where it can't."""

from __future__ import annotations

import os
import socket
import threading
import urllib.parse
import urllib.request


def offline() -> bool:
    """Whether the user has set HF_HUB_OFFLINE."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def unreachable(timeout: float = 5.0) -> str:
    """Why the hub can't be asked, found within `timeout` seconds; "" where it can."""
    if offline():
        return "HF_HUB_OFFLINE is set"
    if urllib.request.getproxies().get("https"):
        return ""  # the proxy resolves names for us, so a look-up from here would say nothing
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
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
