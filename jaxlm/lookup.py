"""From names to functions: in given modules, or `package.module:function` of the user's own."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from jaxlm.errors import PREEMPTED, ConfigError, DataError, JaxlmError, closest, nearest, place


def find(kind: str, name: str, *modules: types.ModuleType) -> Callable[..., Any]:
    """The function called `name` in the first of `modules` that has it; or the one that `package.module:function` is.

    Args:
      kind: what such a name means, for the message: "transform", "schedule".

    Raises:
      ConfigError: no such function (with the nearest name), or the user's module fails to import (with the last
        line of its traceback).
    """
    if ":" in name:
        return _import(kind, name)
    for module in modules:
        if name in _functions(module):
            return getattr(module, name)
    known = {function for module in modules for function in _functions(module)}
    if match := closest(name, known):
        hint = f"did you mean {match!r}?"
    else:
        hint = "see " + ", ".join(module.__name__ for module in modules) + ", or name a package.module:function"
    raise ConfigError(f"unknown {kind} {name!r}: {hint}")


@contextlib.contextmanager
def calling(kind: str, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Where `package.module:function` of the user's own is called: turns what it raises into an error that names it.

    A lack of memory stays one; and so does a bug in one of ours, which has no ":" in its name.

    Raises:
      ConfigError: in the place of its error; DataError, of what it can't read.
    """
    try:
        yield
    except (JaxlmError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        from jax.errors import JaxRuntimeError  # not before it is needed: data, which needs no JAX, imports this

        if ":" not in name or isinstance(error, JaxRuntimeError):
            raise
        if isinstance(error, SystemExit) and error.code == PREEMPTED:  # by a signal meanwhile
            raise
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        where = f"{place(error, file)}: " if file else ""
        last = traceback.format_exception_only(error)[-1].strip()
        raise (DataError if isinstance(error, OSError) else ConfigError)(f"{kind} {name!r}: {where}{last}") from error


def takes(kind: str, name: str, function: Callable[..., Any], *arguments: str) -> None:
    """Checks, before it is called, that a function can be given such arguments.

    Raises:
      ConfigError: it can't.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{kind} {name!r} is called with ({', '.join(arguments)}): {error}") from error


def _import(kind: str, name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        last = traceback.format_exception_only(error)[-1].strip()
        raise ConfigError(f"{kind} {name!r}: importing {module_name!r} failed: {last}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = _functions(module)
        raise ConfigError(
            f"{kind} {name!r}: {module_name!r} has no function {attribute!r}: {nearest(attribute, known)}"
        )
    return function


def _functions(module: types.ModuleType) -> list[str]:
    kinds = (types.FunctionType, functools.partial)  # optax's nadam is a partial
    return [name for name, value in vars(module).items() if isinstance(value, kinds) and not name.startswith("_")]
