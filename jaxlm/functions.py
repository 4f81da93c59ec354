"""What the functions in a config do, so that a run, or a study, tells an edited one from the one that it began with."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import config, lookup
from jaxlm.config_rules import is_object
from jaxlm.errors import ConfigError

_NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # "package.module:function"
_LIBRARIES = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_VALUES = (*_PLAIN, tuple, list, set, frozenset, Mapping, np.ndarray, np.generic, jax.Array, functools.partial)


def digest(cfg: FrozenConfigDict, section: str = "") -> str:
    """Of the code of all of a config's functions, or of those of a section; empty where there are none."""
    text = [f"{path} {code}" for path, code in digests(cfg, section).items()]
    return hashlib.sha256("\n".join(text).encode()).hexdigest() if text else ""


def digests(cfg: FrozenConfigDict, section: str = "") -> dict[str, str]:
    """{"optimizer.mine.transform": the digest of its code} of each field that holds functions, or names them."""
    fields = ((path, value) for path, value in config.items(cfg) if path.startswith(section))
    found = ((path, list(_functions(path, value))) for path, value in fields)
    return {path: of(functions) for path, functions in found if functions}


def of(value: Any) -> str:
    """The digest of a function, or of what one returned.

    It covers what was loaded, not what the file says by now: bytecode, so that comments do not count, defaults,
    variables of closures, and in turn what a function names in its module and in others of the user's: values
    (numbers, text, collections, arrays, partial functions), and functions and classes of the user's own.
    Of a library's functions it covers the name, the defaults and the variables of closures.
    """
    return hashlib.sha256("\n".join(_parts(value, {})).encode()).hexdigest()


def _functions(path: str, value: Any) -> Iterator[Any]:
    """Those that a field holds, or names."""
    if is_object(path, value):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _functions(path, item)
    elif isinstance(value, str) and _NAMED.fullmatch(value) and not value.startswith(("jaxlm.", "optax.")):
        try:
            yield lookup.find("function", value)
        except ConfigError:
            return  # no function: a tokenizer, such as bpe:word


def _parts(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """A value as text that another process of this version of Python gives too."""
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, tuple) or id(value) not in seen:  # which of equal tuples are one depends on the process
        seen[id(value)] = value  # kept, so that no other value gets its id
        yield from _described(value, seen)


def _described(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    inside: Any = ()
    if isinstance(value, (np.ndarray, np.generic, jax.Array)) and not jax.dtypes.issubdtype(
        value.dtype, jax.dtypes.extended
    ):
        array = np.asarray(value)
        yield f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    elif isinstance(value, Mapping):
        inside = (*value.keys(), *value.values())
    elif isinstance(value, (list, tuple)):
        inside = value
    elif isinstance(value, (set, frozenset)):
        yield from sorted(" ".join(_parts(item, dict(seen))) for item in value)
    elif isinstance(value, types.CodeType):
        yield f"{value.co_code.hex()} {value.co_names}"
        inside = value.co_consts
    elif isinstance(value, functools.partial):
        inside = (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        inside = (value.__func__, value.__self__)
    elif isinstance(value, types.FunctionType):
        yield f"{value.__module__}.{value.__qualname__}"
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        inside = (value.__defaults__, value.__kwdefaults__, cells, *(_body(value) if _own(value) else ()))
    elif hasattr(value, "__wrapped__"):  # as jax.jit leaves it
        inside = (value.__wrapped__,)
    else:
        kind = value if isinstance(value, type) else type(value)
        yield f"{kind.__module__}.{kind.__qualname__}"
        if _own(kind):
            inside = ([item for item in vars(kind).values() if callable(item)], getattr(value, "__dict__", None))
    for item in inside:
        yield from _parts(item, seen)


def _body(function: types.FunctionType) -> tuple[types.CodeType, list[Any]]:
    """Its code, and what that names in its module, and in those of the user's modules that it names: values, and
    functions and classes of the user's own."""
    names, places = _names(function.__code__), [function.__globals__]
    follows: list[Any] = []
    for place in places:  # which grows: of `package.helpers.f` the code names all three
        for value in (place[name] for name in names if name in place):
            if isinstance(value, types.ModuleType):
                inside = vars(value)
                places += [inside] if _own(value) and all(inside is not known for known in places) else []
            elif isinstance(value, _VALUES) or _own(value):
                follows.append(value)
    return function.__code__, follows


def _names(code: types.CodeType) -> list[str]:
    inner = [name for item in code.co_consts if isinstance(item, types.CodeType) for name in _names(item)]
    return list(dict.fromkeys((*code.co_names, *inner)))


def _own(value: Any) -> bool:
    """Whether a function, class or module is the user's own, not a library's."""
    module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    root = (module or "builtins").split(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root != "jaxlm" and root not in sys.stdlib_module_names and not file.startswith(_LIBRARIES)
