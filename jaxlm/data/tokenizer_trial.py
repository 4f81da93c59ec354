"""The tokenizers library behind a guard: its panics as DataErrors, and a trial of each tokenizer.json elsewhere first.

A crafted file can do worse than raise: overflow the stack, never end, take all memory. So a file that is new here is
loaded and used in a process of its own, with limits; that it went well is remembered by its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxlm import __version__
from jaxlm.errors import DataError
from jaxlm.files import atomic, cache_dir

if TYPE_CHECKING:
    import tokenizers

_SECONDS = 60.0
_MEMORY = 8 * 2**30  # bytes of address space, on Linux
_LARGEST_ID = 2**24  # the largest vocabularies in use have a million ids; a table is made of all up to the highest

_SAMPLES = (
    "",
    "Hello, world's 1st\r\n\t line",
    "naïve 🙂 \u4e2d\u6587\0",
    "a" * 1000 + " " * 100 + "!",
    "<|endoftext|>",
)

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from jaxlm.data import tokenizer_trial as t; sys.exit(t.use(json.load(sys.stdin), int(sys.argv[2])))"
)
# One thread, since each reserves address space.
_CHILD_ENV = {"RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"}


def load(text: str) -> tokenizers.Tokenizer:
    """Of a tokenizer.json's text, made to encode text as it is."""
    import tokenizers

    live = tokenizers.Tokenizer.from_str(text)
    live.encode_special_tokens = True
    live.no_padding()
    live.no_truncation()
    if getattr(live.model, "dropout", None) is not None:
        live.model.dropout = None
    return live


@contextlib.contextmanager
def panics(what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises as a DataError: on crafted files it panics, with a BaseException."""
    try:
        yield
    except (DataError, UnicodeEncodeError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def trial(text: str, what: str) -> None:
    """`use` of a tokenizer.json's text in another process, unless it went well before with these versions.

    Args:
      what: begins the error's message.

    Raises:
      DataError: it can't be loaded, or did not survive.
    """
    import tokenizers

    name = hashlib.sha256(json.dumps([__version__, tokenizers.__version__, text]).encode()).hexdigest()
    marker = cache_dir() / "tokenizers" / name
    if marker.exists():
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path), str(_MEMORY)],
            input=json.dumps(text).encode(),
            capture_output=True,
            timeout=_SECONDS,
            env={**os.environ, **_CHILD_ENV},
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{what}: in a trial in another process it had not encoded a few words after {_SECONDS:g} s"
        ) from error
    except OSError as error:
        raise DataError(f"{what}: can't start another process to try it in: {error.strerror or error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines() or ["no message"]
        if done.returncode > 0:
            raise DataError(f"{what}: {said[-1]}")
        name = signal.Signals(-done.returncode).name
        raise DataError(f"{what}: in a trial in another process it died of {name}: {said[0]}")
    with contextlib.suppress(OSError):  # without a cache it is tried again
        marker.parent.mkdir(parents=True, exist_ok=True)
        with atomic(marker):
            pass


def use(text: str, memory: int) -> str | None:
    """Loads a tokenizer and uses it a little, within `memory` bytes; returns what is wrong with it, in a line.

    That it can't encode some text is no fault: it may have no token for what it doesn't know.
    """
    if sys.platform == "linux":
        import resource

        for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)):
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    try:
        live = load(text)
        highest = max(live.get_vocab(with_added_tokens=True).values(), default=0)
        if highest > _LARGEST_ID:
            return f"a token has the id {highest}; expected none above {_LARGEST_ID}"
        for sample in _SAMPLES:
            with contextlib.suppress(Exception):
                ids = live.encode_batch_fast([sample], add_special_tokens=False)[0].ids
                live.decode(ids, skip_special_tokens=False)
    except BaseException as error:  # as a panic is one
        return (str(error) or type(error).__name__).splitlines()[0]
    return None
