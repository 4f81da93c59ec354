"""What each field of a config may be: its type is that of the default, its range stands here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import ConfigError

FLOAT32_MAX = float(np.finfo(np.float32).max)

LARGEST = {
    "num_layers": 10**3,
    "num_heads": 10**5,
    "embed_dim": 10**6,
    "feed_forward_dim": 10**7,
    "context_length": 10**8,
    "vocab_size": 10**8,
}
"""Of a model's whole numbers, so that a mistyped or crafted one costs no more than a look at shapes."""


class Rule(NamedTuple):
    holds: Callable[[Any], bool]
    expected: str


def _at_least(low: int) -> Rule:
    return Rule(lambda v: v >= low, f"at least {low}")


def _between(low: int, high: int) -> Rule:
    return Rule(lambda v: low <= v <= high, f"from {low} to {high:,}")


def _share(low: float = 0.0) -> Rule:
    return Rule(lambda v: low <= v and float(np.float32(v)) < 1, f"at least {low:g} and below 1")


def _one_of(*names: Any) -> Rule:
    return Rule(lambda v: v in names, "one of " + ", ".join(map(repr, names)))


_DTYPES = _one_of("float32", "bfloat16", "float16")
_NONNEGATIVE = Rule(lambda v: v >= 0, "zero or more")
_NAME = Rule(lambda v: v != "", "not empty")

RULES: dict[str, Rule] = {
    "seed": Rule(lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
    "steps": Rule(lambda v: 1 <= v < 2**31, "from 1 to 2**31 - 1"),  # counted in int32
    "steps_per_call": _at_least(1),
    "model.num_layers": _between(1, LARGEST["num_layers"]),
    "model.num_heads": _between(1, LARGEST["num_heads"]),
    "model.embed_dim": _between(1, LARGEST["embed_dim"]),
    "model.context_length": _between(0, LARGEST["context_length"]),
    "model.vocab_size": _between(0, LARGEST["vocab_size"]),
    "model.feed_forward_dim": _between(0, LARGEST["feed_forward_dim"]),
    "model.activation": _one_of("gelu_tanh", "gelu", "relu", "silu"),
    "model.norm_epsilon": Rule(lambda v: v > 0, "above 0"),
    "model.dropout": _share(),
    "model.dtype": _DTYPES,
    "model.param_dtype": _one_of("float32", "bfloat16"),
    "model.attention": _one_of("auto", "cudnn", "blockwise"),
    "model.loss_chunks": _at_least(0),
    "model.lora.rank": _between(0, LARGEST["embed_dim"]),
    "model.lora.alpha": Rule(lambda v: v > 0, "above 0"),
    "model.lora.where": _NAME,
    "model.remat": _one_of("none", "dots", "block"),
    "data.source": _NAME,
    "data.tokenizer": _NAME,
    "data.format": _one_of("text", "pairs"),
    "data.completion": _NAME,
    "data.loss_on": _one_of("completions", "all"),
    "data.token_dropout": _share(),
    "data.crop": _share(),
    "data.too_long": _one_of("cut", "drop", "error"),
    "log.energy": _one_of("counter", "estimate", "off"),
    "data.text_field": _NAME,
    "data.errors": _one_of("strict", "replace"),
    "data.batch_size": _between(1, 2**31 - 1),
    "data.micro_batches": _at_least(1),
    "loss.label_smoothing": _share(),
    "loss.z_loss": _NONNEGATIVE,
    "loss.l1": _NONNEGATIVE,
    "loss.l2": _NONNEGATIVE,
    "eval.every": _at_least(0),
    "eval.batches": _at_least(0),
    "eval.tasks": Rule(lambda v: all(isinstance(name, str) and name for name in v), "names of tasks, as ('generate',)"),
    "checkpoint.every": _at_least(0),
    "checkpoint.keep": _at_least(1),
    "early_stopping.metric": _NAME,
    "early_stopping.patience": _at_least(0),
    "early_stopping.min_delta": _NONNEGATIVE,
    "checkpoint.max_failures": _at_least(1),
    "divergence.max_bad_steps": _at_least(1),
    "divergence.rollback_z": _NONNEGATIVE,
    "divergence.window": _at_least(2),
    "divergence.max_rollbacks": _at_least(0),
    "parallel.mode": _one_of("jit", "pmap"),
    "parallel.data": Rule(lambda v: v == -1 or v >= 1, "-1 or at least 1"),
    "parallel.fsdp": _at_least(0),
    "parallel.tensor": _at_least(1),
    "log.every": _at_least(0),
    "log.profile": _at_least(0),
    "log.writers": Rule(
        lambda v: all(name in ("jsonl", "tensorboard", "wandb") for name in v),
        "names of 'jsonl', 'tensorboard', 'wandb'",
    ),
}


def checked(path: str, value: Any, declared: Any) -> Any:
    """`value` as the type of `declared`. Ints serve as floats; nothing else is converted."""
    kind, value = type(declared), number(value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not kind:
        example = str(value) if declared == "" and type(value) in (int, float) else declared
        raise ConfigError(
            f"{path} is {value!r} ({type(value).__name__}); expected {kind.__name__}, such as {example!r}"
        )
    finite(path, value)
    rule = RULES.get(path)
    if rule and not rule.holds(value):
        raise ConfigError(f"{path} is {value!r}; expected {rule.expected}")
    return value


def number(value: Any) -> Any:
    """A scalar of NumPy, which sweeps in Python give, as Python's own; anything else as it is."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def finite(path: str, value: Any) -> None:
    if isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
        raise ConfigError(f"{path} is {value}; expected a finite number, in float32 too")


def is_object(path: str, value: Any) -> bool:
    """Whether a value is a transform, or a function that makes one: what only Python can give."""
    return path.endswith(".transform") and (callable(value) or hasattr(value, "update"))


def storable(path: str, value: Any) -> None:
    if is_object(path, value):
        return
    if isinstance(value, tuple):
        for item in value:
            storable(path, item)
    elif type(value) not in (bool, int, float, str, type(None)):
        given = f"{value!r} ({type(value).__name__})"
        how = ""
        if callable(value):
            how = "; name a schedule 'module:function', or give what takes it, made: transform=optax.adamw(...)"
        raise ConfigError(f"{path} is {given}; expected a plain number, string, bool, None or a tuple of them{how}")
