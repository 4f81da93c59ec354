"""The optimizer is data: an ordered tuple of stage names and a table of arguments each, made into an Optax chain.

    chain = ("clip_by_global_norm", "scale_by_adam", "scale_by_learning_rate")
    scale_by_adam = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}

A table may hold, beside the arguments of its function: `transform`, the function's name where it isn't the
stage's; and `where`, a named mask or a regex over parameter paths outside which the stage changes nothing.
A function that takes a `learning_rate` may be given `peak`, `schedule`, `warmup` and `final` in its place.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from jaxlm import tree
from jaxlm.config import TRACED, flat
from jaxlm.errors import ConfigError, nearest
from jaxlm.optim import schedules, transforms
from jaxlm.optim.lookup import find

PyTree = Any
Spec = Mapping[str, Any]
"""A config's `optimizer` section, or the same in a structure, where traced numbers are marked."""

SCHEDULED = ("peak", "schedule")
TABLES = (Mapping, ConfigDict)


class Stage(NamedTuple):
    """One stage of a chain, checked."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    where: str | None


def stages(spec: Spec, hparams: Mapping[str, Any] | None = None) -> tuple[Stage, ...]:
    """The stages of a chain in order, with the traced numbers of `hparams` in their places.

    Raises:
      ConfigError: an unknown or repeated stage, an unknown or missing argument, a mask that does not compile.
    """
    chain = tuple(spec["chain"])
    if not chain:
        raise ConfigError("optimizer.chain is empty; it needs at least 'scale_by_learning_rate'")
    for name in chain:
        if chain.count(name) > 1:
            raise ConfigError(f"optimizer.chain has {name!r} twice; name one freely and set its 'transform'")
    return tuple(_stage(name, dict(spec.get(name) or {}), (hparams or {}).get(name, {})) for name in chain)


def _stage(name: str, table: dict[str, Any], numbers: Mapping[str, Any]) -> Stage:
    arguments = _filled(table, numbers)
    function = _find_transform(arguments.pop("transform", name))
    where = arguments.pop("where", None)
    if where is not None:
        tree.pattern(where)
    unset = [path for path, value in flat(arguments).items() if isinstance(value, str) and value == TRACED]
    if unset:
        raise ConfigError(f"optimizer.{name}.{unset[0]} is marked as traced, but the hyperparameters don't hold it")
    if isinstance(arguments.get("schedule"), str):
        _find_schedule(arguments["schedule"])
    _check_arguments(name, function, arguments)
    return Stage(name, function, arguments, where)


def _filled(table: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A table, or tables in a table, with `numbers`, nested alike, in their places."""
    return {
        key: _filled(value, numbers.get(key, {})) if isinstance(value, TABLES) else numbers.get(key, value)
        for key, value in table.items()
    }


def _find_transform(name: str) -> Callable[..., Any]:
    """Ours before optax's: our `scale_by_learning_rate` takes a schedule."""
    if name.startswith("contrib."):
        return find("optimizer transform", name.removeprefix("contrib."), optax.contrib)
    return find("optimizer transform", name, transforms, optax, optax.contrib)


def _find_schedule(name: str) -> Callable[..., schedules.Shape]:
    return find("schedule", name, schedules)


def _check_arguments(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("steps", None)  # given by `build`
    known = {key for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    required = {key for key in known if parameters[key].default is inspect.Parameter.empty}
    if any(key in arguments for key in SCHEDULED) and {"learning_rate", "peak"} & set(parameters):
        schedule = inspect.signature(_find_schedule(arguments.get("schedule", "constant"))).parameters
        known |= {*SCHEDULED, *schedule} - {"steps"}
        required = (required - {"learning_rate"}) | {"peak"}
    elif any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known |= set(arguments)
    for key in arguments:
        if key not in known:
            raise ConfigError(
                f"optimizer stage {name!r} takes no argument {key!r}: {nearest(key, known | {'where', 'transform'})}"
            )
    missing = sorted(required - set(arguments))
    if missing:
        how = f"set optimizer.{name}.{missing[0]}"
        if re.search("[.:]", name):  # no key of a config
            how = f"name the stage freely and give it a table with {missing[0]!r} and 'transform': {name!r}"
        raise ConfigError(f"optimizer stage {name!r} lacks its argument {missing[0]!r}: {how}")


def build(spec: Spec, hparams: Mapping[str, Any] | None, steps: int) -> optax.GradientTransformationExtraArgs:
    """The Optax chain of a spec.

    Args:
      spec: a config's `optimizer` section or a structure's.
      hparams: the traced numbers, stage -> argument -> float32[]; None where `spec` holds all of its numbers.
      steps: the length of the run in optimizer steps.

    Raises:
      ConfigError: see `stages`; or a function's own complaint about its arguments.
    """
    return optax.chain(*(_transform(stage, steps) for stage in stages(spec, hparams)))


def _transform(stage: Stage, steps: int) -> optax.GradientTransformationExtraArgs:
    arguments = dict(stage.arguments)
    parameters = inspect.signature(stage.function).parameters
    if "learning_rate" in parameters and "peak" in arguments:
        scheduled = {key: arguments.pop(key) for key in list(arguments) if key not in parameters}
        arguments["learning_rate"] = transforms.learning_rate(steps=steps, **scheduled)
    if "steps" in parameters:
        arguments["steps"] = steps
    try:
        transform = stage.function(**arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, jax.errors.JAXTypeError):
            raise  # a number that can't be traced, see `static_arguments`
        raise ConfigError(f"optimizer stage {stage.name!r}: {error}") from error
    if not isinstance(transform, optax.GradientTransformation):
        raise ConfigError(f"optimizer stage {stage.name!r} is no transform: it returned {type(transform).__name__}")
    if stage.where is not None:
        where = stage.where
        transform = optax.masked(transform, lambda params: tree.mask(params, where))
    return optax.with_extra_args_support(transform)


def learning_rate(spec: Spec, hparams: Mapping[str, Any] | None, steps: int, count: jax.Array) -> jax.Array | None:
    """The learning rate of the first stage that has one, at a step, float32[]; None where no stage has."""
    for stage in stages(spec, hparams):
        parameters = inspect.signature(stage.function).parameters
        ours = stage.function is transforms.scale_by_learning_rate
        if "peak" in stage.arguments and (ours or "learning_rate" in parameters):
            own = set() if ours else set(parameters) - {*SCHEDULED}
            scheduled = {key: value for key, value in stage.arguments.items() if key not in own}
            return jnp.float32(transforms.learning_rate(steps=steps, **scheduled)(count))
        if "learning_rate" in stage.arguments:
            return jnp.float32(stage.arguments["learning_rate"])
    return None


def static_arguments(spec: Spec, params: PyTree, steps: int) -> frozenset[str]:
    """Which floats of a spec must stay constants, as "stage.argument": those that their transform can't take traced.

    Found by abstract evaluation of init and update, so it costs no arithmetic and knows no list of exceptions.

    Args:
      params: arrays or their shapes.

    Raises:
      ConfigError: a stage fails with constants, too.
    """
    numbers = {
        path: value
        for path, value in flat(spec).items()
        if type(value) is float and path.split(".")[0] in spec["chain"]
    }

    def fails(traced: Mapping[str, float], chain: tuple[str, ...]) -> Exception | None:
        def run(values: dict[str, jax.Array], params: PyTree) -> PyTree:
            hparams: dict[str, Any] = {}
            for path, value in values.items():
                *tables, argument = path.split(".")
                functools.reduce(lambda node, key: node.setdefault(key, {}), tables, hparams)[argument] = value
            transform = build({**spec, "chain": chain}, hparams, steps)
            return transform.update(params, transform.init(params), params, value=jnp.float32(0))

        try:
            jax.eval_shape(run, {path: jnp.float32(value) for path, value in traced.items()}, params)
        except Exception as error:
            return error
        return None

    if fails(numbers, spec["chain"]) is None:
        return frozenset()
    error = fails({}, spec["chain"])
    if error is not None:
        raise (
            error if isinstance(error, ConfigError) else ConfigError(f"the optimizer can't be built: {error}")
        ) from error
    return frozenset(path for path, value in numbers.items() if fails({path: value}, (path.split(".")[0],)))


def explain(spec: Spec, params: PyTree) -> dict[str, tuple[str, ...]]:
    """Which stages touch which parameter: {path: (stage name, ...)} in the chain's order. Shapes of params suffice."""
    masks = {stage.name: jax.tree.leaves(tree.mask(params, stage.where or "all")) for stage in stages(spec)}
    return {path: tuple(name for name, on in masks.items() if on[i]) for i, path in enumerate(tree.paths(params))}
