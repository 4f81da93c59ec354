"""An object in a process of its own. The sides of a comparison share neither threads nor the heap: glibc keeps or
returns memory by what else a process has freed, which moves XLA's step time on the CPU; thread pools spin for a while
after work. A process that waits for its next call sleeps in a read."""

from __future__ import annotations

import importlib
import multiprocessing
import traceback
from multiprocessing.connection import Connection
from typing import Any


class Remote:
    """`with Remote("package.module:Class", *args) as far: far.call("method", *args)`. One call at a time.

    Raises:
      RuntimeError: the class or a method raised, with its traceback; or the process died.
    """

    def __init__(self, factory: str, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._name = factory
        self._process = context.Process(target=_serve, args=(far, factory, args), daemon=True)
        self._process.start()
        far.close()
        self._receive()

    def call(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            self._process.join(5)
            raise RuntimeError(f"the process of {self._name} died: exit code {self._process.exitcode}") from None
        if not ok:
            raise RuntimeError(f"in the process of {self._name}:\n{value}")
        return value

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # it reads the end, and ends
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, factory: str, args: tuple[Any, ...]) -> None:
    try:
        module, _, name = factory.partition(":")
        target = getattr(importlib.import_module(module), name)(*args)
        pipe.send((True, None))
        while True:
            method, args = pipe.recv()
            pipe.send((True, getattr(target, method)(*args)))
    except EOFError:
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))
