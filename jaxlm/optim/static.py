"""Which numbers of a spec can't be arguments of the compiled step."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import flat
from jaxlm.errors import ConfigError
from jaxlm.optim import chain
from jaxlm.optim.kept import StageError
from jaxlm.optim.stages import Spec, stages, walk

PyTree = Any


def static_arguments(spec: Spec, params: PyTree, steps: int) -> frozenset[str]:
    """Which floats of a spec must stay constants, as "stage.argument": those that their transform can't take traced.

    Found by abstract evaluation of init and update, so it costs no arithmetic and knows no list of exceptions.

    Args:
      params: arrays or their shapes.

    Raises:
      ConfigError: a stage fails with constants, too, or refuses a number.
    """
    names = {stage.name for stage in walk(stages(spec))}
    numbers = {
        path: value for path, value in flat(spec).items() if type(value) is float and path.split(".")[0] in names
    }

    def fails(traced: Mapping[str, float], spec: Spec = spec) -> Exception | None:
        def run(values: dict[str, jax.Array], params: PyTree) -> PyTree:
            hparams: dict[str, Any] = {}
            for path, value in values.items():
                *tables, argument = path.split(".")
                functools.reduce(lambda node, key: node.setdefault(key, {}), tables, hparams)[argument] = value
            transform = chain.build(spec, hparams, steps)
            return chain.update(transform, params, transform.init(params), params, lambda params: jnp.float32(0))

        try:
            jax.eval_shape(run, {path: jnp.float32(value) for path, value in traced.items()}, params)
        except Exception as error:
            return error
        return None

    if fails(numbers) is None:
        chain.build(spec, None, steps)  # no function says of a traced number that it is out of range
        return frozenset()
    error = fails({})
    if error is not None:
        if isinstance(error, ConfigError) and not isinstance(error, StageError):
            raise error
        odd = {path: value for path, value in flat(spec).items() if _is_odd(path, value)}
        for path, value in odd.items():
            if fails({}, _with(spec, path.split("."), 0.5)) is None:
                raise ConfigError(f"optimizer.{path} is {value!r}; expected a number") from error
        text = ", ".join(f"{path}={value!r}" for path, value in odd.items() if value is not None)
        hint = f"; is a number meant by {text}?" if text else ""
        raise ConfigError(f"the optimizer can't be built: {str(error).rstrip('.')}{hint}") from error
    return frozenset(path for path, value in numbers.items() if fails({path: value}))


def _is_odd(path: str, value: Any) -> bool:
    """Whether it is no number where most arguments are."""
    stage, _, argument = path.rpartition(".")
    is_name = argument in ("chain", "transform", "where", "schedule")
    return bool(stage) and not is_name and (value is None or isinstance(value, (str, tuple)))


def _with(table: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A table with another value at a path of tables in it."""
    first, *rest = path
    return {**table, first: _with(table[first], rest, value) if rest else value}
