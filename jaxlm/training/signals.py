"""SIGTERM and SIGINT ask the loop to finish its step, save and leave; a second one leaves at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from jaxlm.errors import INTERRUPTED, PREEMPTED


class Signals:
    """A context in which `caught` is the first signal that arrived, or None. Outside the main thread it hears none."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.caught == signal.SIGINT else PREEMPTED
