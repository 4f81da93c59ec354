"""jaxlm: GPT-2 training, tuning and ablation in JAX.

    result = jaxlm.train(config, "runs/mine")
    model, params, tokenizer, config = jaxlm.load("runs/mine")  # or one step of it, a Hugging Face folder, a hub id

Importing it is cheap and touches no device: what is named here is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.training.load import load as load
    from jaxlm.training.loop import train as train

__version__ = "0.1.0"

_HOME = {"train": "jaxlm.training.loop", "load": "jaxlm.training.load"}
_ROOMS = ("ablation", "config", "config_json", "data", "evals", "model", "optim", "telemetry", "training", "tree")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"jaxlm.{name}")
    raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_ROOMS])
