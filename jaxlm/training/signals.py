"""SIGTERM, SIGINT or SIGUSR1 (Slurm's warning) ask the loop to finish its step, save and leave; a second one leaves
at once: SIGINT by KeyboardInterrupt, which ends no notebook, the others with their process. While there is no step to
finish, the first one leaves, too.

Where processes train together (`jax.distributed.initialize`), a signal to one of them stops all after the same step:
JAX then owns SIGTERM, tells the other processes of it, and says when that step has come.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jaxlm.errors import INTERRUPTED, PREEMPTED


class Signals:
    """A context in which `caught` is the first signal that arrived, or None. Outside the main thread it hears none."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self.stepping = False  # whether someone asks `heard`
        self._together = jax.distributed.is_initialized()
        self._asked, self._handed_on = 0, False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGUSR1, *(() if self._together else (signal.SIGTERM,))):
                self._previous[number] = signal.signal(number, self._hand_on if self._together else self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def heard(self) -> bool:
        """Whether to stop now. To be asked after each call of the step, by all processes that train together."""
        if self._together:
            self._asked += 1  # not the step: JAX names one number at which to stop, which must not be jumped over
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.caught = signal.SIGTERM
        return self.caught is not None

    def _catch(self, number: int, _: FrameType | None) -> None:
        again, self.caught = self.caught is not None, signal.Signals(number)
        if self.stepping and not again:
            _say(f"{self.caught.name}: stops after this step; once more: at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif again:
            os._exit(PREEMPTED)  # what was saved is whole, and what was not is not there
        else:
            _say("preempted; run the same command to go on")
            sys.exit(PREEMPTED)

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        """To JAX, the first time."""
        if self._handed_on:
            os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)
        self._handed_on = True
        _say(f"{signal.Signals(number).name}: all processes stop after the same step; once more: this one at once")
        os.kill(os.getpid(), signal.SIGTERM)

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.caught == signal.SIGINT else PREEMPTED


def _say(text: str) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # it came while something else was being printed
        print(text, file=sys.stderr, flush=True)
