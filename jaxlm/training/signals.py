"""SIGTERM, SIGINT or SIGUSR1 (Slurm's warning) ask the loop to finish its step, save and leave; a second one leaves
at once. While there is no step to finish, the first one leaves, too."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from jaxlm.errors import INTERRUPTED, PREEMPTED


class Signals:
    """A context in which `caught` is the first signal that arrived, or None. Outside the main thread it hears none."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self.stepping = False  # whether someone looks at `caught`
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self.caught is not None:
            os._exit(self.exit_code)  # what was saved is whole, and what was not is not there
        self.caught = signal.Signals(number)
        if not self.stepping:
            if self.caught == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(PREEMPTED)

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.caught == signal.SIGINT else PREEMPTED
