"""A config as JSON, in which a run directory, a checkpoint and a model card keep it: without secrets, and read by later
versions too."""

from __future__ import annotations

import json
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import functions, redact
from jaxlm.config import default, items, plain, resolve
from jaxlm.config_rules import is_object
from jaxlm.errors import ConfigError, DataError


def to_json(cfg: ConfigDict | FrozenConfigDict, *, secrets: bool = False) -> str:
    """The config as JSON text; `from_json` gives it back equal, but for `objects`.

    Args:
      secrets: leave them in; else they are redacted.
    """

    def named(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: named(item, f"{path}.{key}") for key, item in value.items()}
        return _edition(value) if is_object(path, value) else value

    out = named(plain(cfg), "")
    return json.dumps(out if secrets else redact.fields(out), indent=2)


def objects(cfg: ConfigDict | FrozenConfigDict) -> dict[str, str]:
    """{"optimizer.mine.transform": its name, as `to_json` writes it} of what JSON can't hold: functions and transforms
    given from Python."""
    return {path: _edition(value) for path, value in items(cfg) if is_object(path, value)}


def object_name(value: Any) -> str:
    """Of a function or transform: where it was defined, as "<package.module.function>"."""
    made = getattr(value, "update", value)  # of a transform, that is a pair of functions
    return f"<{getattr(made, '__module__', '')}.{getattr(made, '__qualname__', type(value).__name__)}>"


def _edition(value: Any) -> str:
    """Its name with the digest of its code, by which a run knows another one of the same name."""
    return f"{object_name(value)[:-1]} {functions.of(value)[:8]}>"


def from_json(text: str) -> FrozenConfigDict:
    """Reads what `to_json` wrote, and checks it again. Fields that an earlier version did not have get their defaults.

    Raises:
      DataError: the text is not JSON.
      ConfigError: it is not a config of this version.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a config: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"not a config: it holds {type(raw).__name__}, not an object")
    try:
        given = ConfigDict(_completed(plain(raw), default()))
    except (AttributeError, RecursionError, TypeError, ValueError) as error:  # of names that no field can have
        raise ConfigError(f"not a config: {error}") from error
    return resolve(given)


def _completed(given: Any, usual: ConfigDict) -> Any:
    """With the fields of `usual` that are not given, but for the optimizer's."""
    if not isinstance(given, dict):
        return given
    out = dict(given)
    for name, value in usual.items():
        if isinstance(value, ConfigDict) and name != "optimizer":
            out[name] = _completed(given.get(name, {}), value)
        elif name != "optimizer":
            out.setdefault(name, value)
    return out
