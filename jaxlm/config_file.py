"""A config, or another value, from a Python file. It is executed: run only those that you trust."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxlm.config import default, flat
from jaxlm.errors import ConfigError, JaxlmError, nearest, place

MODULE = "_jaxlm_config_"
"""What the name of a file's module begins with, which no module that is imported does."""


def load(spec: str) -> ConfigDict:
    """`path/to/x.py[:arg]` -> the config that its `get_config(arg)` returns. Executes the file.

    Raises:
      ConfigError: no such file, no `get_config`, or an error in it that concerns the config.
    """
    file, _, arg = spec.partition(":")
    cfg = call(file, "get_config", "configs", arg)
    if not isinstance(cfg, ConfigDict):
        raise ConfigError(f"get_config of {file!r} returned {type(cfg).__name__}; expected a ConfigDict")
    return cfg


def call(file: str, function: str, folder: str, *arguments: str) -> Any:
    """What a function of a Python file returns. Executes the file.

    Args:
      folder: where such files usually are.

    Raises:
      ConfigError: no such file, no such function in it, or an error in it that concerns the config.
    """
    path = Path(file)
    if not path.is_file():
        beside = path if path.is_dir() else path.parent if path.parent.is_dir() else Path(folder)
        near = nearest(file, map(str, beside.glob("*.py")))
        what = "it is a folder; " if path.is_dir() else ""
        raise ConfigError(f"no {folder.removesuffix('s')} file {file!r}: {what}{near}")
    module_spec = importlib.util.spec_from_file_location(f"{MODULE}{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{file!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        with _findable(module):
            module_spec.loader.exec_module(module)
            if not hasattr(module, function):
                raise ConfigError(f"{file!r} defines no {function}({'arg' if arguments else ''})")
            return getattr(module, function)(*arguments)
    except (JaxlmError, OSError):
        raise
    except Exception as error:
        raise ConfigError(f"{place(error, str(path))}: {_words(error)}") from error


@contextlib.contextmanager
def _findable(module: ModuleType) -> Iterator[None]:
    """A dataclass looks for its module by name as it is made. Not for longer: what another process is sent of a module
    that can be found goes by name, and there it can't."""
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]
        if before:  # of a file of the same name, which calls this one
            sys.modules[module.__name__] = before


def _words(error: BaseException) -> str:
    """What is wrong in a config file. ml_collections names a missing field among a dump of all; we keep the names."""
    wrapped = error.args[0] if error.args and isinstance(error.args[0], KeyError) else KeyError("")
    missing = re.search(r'Key "(\w+)" does not exist', str(error))  # of a field that was set
    missing = missing or re.match(r"'(\w+)'", str(wrapped.args[0]))  # of one that was read
    if missing:
        near = re.search(r'Did you mean "(\w+)"', str(wrapped.args[0]) or str(error))  # of the section that it is in
        names = [near[1]] if near else {part for path in flat(default()) for part in path.split(".")}
        return f"unknown config field {missing[1]!r}: {nearest(missing[1], names)}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
