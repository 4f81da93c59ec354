"""A profile of some steps: what the host and the devices do, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

_FIRST = 2  # the call with which it begins: those before compile, or wait for what does


class Profile:
    """A trace by `jax.profiler` of so many steps of a run, or to its end where fewer are left.

    Args:
      steps: 0: none.
      folder: where it goes.
      say: takes a line for people.
    """

    def __init__(self, steps: int, folder: Path, say: Callable[[str], None]):
        self._left, self._folder, self._say, self._calls = steps, folder, say, 0
        self._on = False

    def before_call(self) -> None:
        if self._left > 0 and not self._on and self._calls == _FIRST:
            with self._no_end():
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
                self._on = True

    def after_call(self, steps: int, results: Any) -> None:
        """Once a call of so many steps is under way; waits for its results where it is the last in the trace."""
        self._calls += 1
        if self._on:
            self._left -= steps
            if self._left <= 0:
                jax.block_until_ready(results)
                self.close()

    def close(self) -> None:
        """Ends a trace that is still taken; says so where there was none."""
        if self._left > 0 and self._calls <= _FIRST:
            self._say(f"warning: no profile: it begins with call {_FIRST + 1} of a run, which had {self._calls}")
        if self._on:
            self._on, self._left = False, 0
            with self._no_end():
                jax.profiler.stop_trace()
                self._say(f"profile: {self._folder}; open its perfetto_trace.json.gz at ui.perfetto.dev")

    @contextlib.contextmanager
    def _no_end(self) -> Iterator[None]:
        """A profile is no reason to stop a run."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            self._say(f"warning: no profile: {type(error).__name__}: {error}".splitlines()[0])
