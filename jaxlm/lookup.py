"""From names to functions: in given modules, or `package.module:function` of the user's own."""

from __future__ import annotations

import functools
import importlib
import traceback
import types
from collections.abc import Callable
from typing import Any

from jaxlm.errors import ConfigError, closest, nearest


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
