"""None of the processes that train together outlives another: how they learn of each other's end, and end too."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the store of keys and values has no public name; Orbax takes it from here too

from jaxlm.errors import INTERRUPTED, PREEMPTED, DataError, JaxlmError
from jaxlm.telemetry import progress

SILENCE = 15
"""Seconds after which a process that gives no sign of life is held for lost."""
AGAIN = "run the same command on all to go on from the latest checkpoint"

_TICK = 1.0
_ENDED = "jaxlm/ended"
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "Connection", "coordination service", "DEADLINE_EXCEEDED")


def store() -> Any:
    """Of keys and values, in the process that coordinates."""
    return distributed.global_state.client


def name() -> str:
    """Of this process, for people."""
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


class LastWords:
    """What JAX's runtime does not leave Python time for: it aborts the process where the coordinator is gone. In this
    context an abort says these words and ends with this exit code."""

    def __init__(self, words: str, exit_code: int):
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept: C has only its address
        self.say(words, exit_code)

    def say(self, words: str, exit_code: int) -> None:
        self._words, self._exit_code = words, exit_code

    def _aborted(self, _: int) -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"error: {self._words}\n".encode())
        os._exit(self._exit_code)

    def __enter__(self) -> LastWords:
        set_handler = ctypes.CDLL(None).signal
        set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        self._set = functools.partial(set_handler, signal.SIGABRT)
        self._previous = self._set(ctypes.cast(self._handler, ctypes.c_void_p))
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._previous)


class Watch:
    """A thread that gives signs of life, and ends this process when another has ended; the first one misses others."""

    def __init__(self) -> None:
        self._client = store()
        self._own, self._stopped = jax.process_index(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._ending, self._lost = threading.RLock(), 0
        self.start, self._seen = self._thread.start, dict.fromkeys(range(jax.process_count()), ("", time.monotonic()))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        for beat in itertools.count():
            try:
                if told := self._told():
                    self._leave(told["words"], told["exit_code"])
                self._client.key_value_set(f"jaxlm/alive/{self._own}", str(beat), allow_overwrite=True)
                if self._own == 0 and (lost := self._missed()):
                    self._lost = len(lost)
                    who = ", ".join(map(str, lost))
                    self._tell(
                        f"lost process {who} of {jax.process_count()}: no sign of life for {SILENCE} s; {AGAIN}",
                        PREEMPTED,
                    )
            except jax.errors.JaxRuntimeError:
                self._leave(f"{name()}: lost process 0, which coordinates; {AGAIN}", PREEMPTED)
            if self._stopped.wait(_TICK):
                return

    def _told(self) -> dict[str, Any] | None:
        try:
            told: dict[str, Any] = json.loads(self._client.key_value_try_get(_ENDED))
            return told
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def _missed(self) -> list[int]:
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get("jaxlm/alive/"):
            index = int(key.rpartition("/")[2])
            if self._seen[index][0] != beat:
                self._seen[index] = beat, now
        return [index for index, (_, when) in self._seen.items() if now - when > SILENCE]

    def _tell(self, words: str, exit_code: int) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was faster
            self._client.key_value_set(_ENDED, json.dumps({"words": words, "exit_code": exit_code}))

    def _leave(self, words: str, exit_code: int) -> NoReturn:
        """Ends this process, whatever it waits for; the first one last, since the others hear through it."""
        with self._ending:
            progress.say(None, f"error: {words}")
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(f"jaxlm/left/{self._own}", "")
                deadline = time.monotonic() + 5 * _TICK
                while self._own == 0 and time.monotonic() < deadline:
                    if len(self._client.key_value_dir_get("jaxlm/left/")) + self._lost == jax.process_count():
                        time.sleep(0.2)  # for them to be gone
                        break
                    time.sleep(0.1)
            os._exit(exit_code)

    def end(self, error: BaseException) -> NoReturn:
        """Ends all processes for what this one raised."""
        if isinstance(error, Exception) and not isinstance(error, JaxlmError) and any(x in str(error) for x in _LOST):
            time.sleep(SILENCE + 5 * _TICK)  # another process is gone: the watch will say which, and end this one
        match error:
            case JaxlmError():
                words, exit_code = str(error), error.exit_code
            case OSError():
                words, exit_code = str(error), DataError.exit_code
            case KeyboardInterrupt():
                words, exit_code = "interrupted", INTERRUPTED
            case SystemExit():
                words, exit_code = "stopped before the first step", int(error.code or 0)
            case _:
                words, exit_code = "".join(traceback.format_exception_only(error)).strip(), 1
        with self._ending:  # unless the watch is at it
            if exit_code == 1:
                traceback.print_exception(error)
            self._tell(f"{name()} ended: {words}", exit_code)
            self._leave(words, exit_code)
