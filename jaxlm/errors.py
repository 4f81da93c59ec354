"""What can go wrong for a user's reason: one exception per exit code, and the words for it.

Exit codes of every door: 0 done or stopped early, 1 --verify_resume found a difference, 2 bad config, 3 diverged,
4 data or I/O, 75 preempted (run again to resume), 130 interrupted.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import TextIO

PREEMPTED = 75
INTERRUPTED = 130
UNREAD = 141  # as of a process that SIGPIPE ended

MOST_NAMES = 20  # in a message


class JaxlmError(Exception):
    """A mistake or mishap that the user can mend; its message says how."""

    exit_code = 1


class ConfigError(JaxlmError):
    """The config, a flag or an argument is wrong."""

    exit_code = 2


class DivergedError(JaxlmError):
    """The loss or the state became non-finite."""

    exit_code = 3


class DataError(JaxlmError):
    """Data is missing, empty, damaged or can't be read or written."""

    exit_code = 4


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is likely meant, if one is near."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or all of them, of many the first."""
    names = sorted(known)
    if (match := closest(name, names)) is not None:
        return f"did you mean {match!r}?"
    more = f", ... ({len(names):,} in all)" if len(names) > MOST_NAMES else ""
    return f"known: {', '.join(names[:MOST_NAMES])}{more}" if names else "there are none"


def place(error: BaseException, file: str) -> str:
    """`file, line n` where the error came through a line of that file, or is about one; else the file alone."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    return f"{file}, line {line}" if line else file


def exit_code(door: Callable[[], int]) -> int:
    """Runs a door; turns the user's mistakes into one line on stderr and their exit code."""
    _settle_streams()
    try:
        return door()
    except JaxlmError as error:
        _say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:  # who reads has enough, as `head`
        _drop(sys.stdout)
        return UNREAD
    except OSError as error:
        _say(f"error: {error}")
        return DataError.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED


def _settle_streams() -> None:
    """Has a stream that was closed before the start go nowhere, and "?" stand for a character that stdout's encoding
    lacks, which else is an error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), "utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # who would read it is gone
        _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
    """Has what a broken stream still holds go nowhere, or the interpreter's end would fail by it, with a code of its
    own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
