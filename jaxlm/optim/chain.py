"""The optimizer is data: an ordered tuple of stage names and a table of arguments each, made into an Optax chain.

What names and tables mean is `jaxlm.optim.stages`' story.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxlm import tree
from jaxlm.config import Hparams
from jaxlm.errors import ConfigError, JaxlmError
from jaxlm.optim import kinds, scheduled
from jaxlm.optim.edits import drop, insert_after, insert_before, replace, with_args
from jaxlm.optim.kept import kept
from jaxlm.optim.layerwise import OF_A_MATRIX, layer_by_layer
from jaxlm.optim.parts import of_part
from jaxlm.optim.stages import REST, Group, Spec, Stage, is_scheduled, stages, walk

__all__ = [  # with the edits of a spec
    "build",
    "drop",
    "insert_after",
    "insert_before",
    "labels",
    "learning_rates",
    "replace",
    "schedule_count",
    "update",
    "with_args",
]

PyTree = Any
Transform: TypeAlias = optax.GradientTransformationExtraArgs


def build(spec: Spec, hparams: Mapping[str, Any] | Hparams | None, steps: int) -> Transform:
    """The Optax chain of a spec.

    Args:
      spec: a config's `optimizer` section or a structure's.
      hparams: the traced numbers, stage -> argument -> float32[], or a config's, which hold them; None where `spec`
        holds all of its numbers.
      steps: the length of the run in optimizer steps.

    Its `update` hands on extra arguments to the stages that take them: `value`, `grad`, `value_fn`, `obj_fn`.

    Raises:
      ConfigError: see `stages.stages`; or a function's own complaint about its arguments.
    """
    found = stages(spec, hparams.optimizer if isinstance(hparams, Hparams) else hparams)
    return _chained(found, steps, _first_rate(found))


def update(
    transform: Transform,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    objective: Callable[[PyTree], jax.Array],
    value: jax.Array | None = None,
) -> tuple[PyTree, PyTree]:
    """`transform.update` with all that some stage may want beside the gradients.

    Args:
      objective: params -> the loss on this step's batch; differentiable.
      value: the objective at `params`; computed where it isn't given.
    """

    def value_fn(params: PyTree, obj_fn: Any = None, layers: Any = None) -> jax.Array:
        del obj_fn, layers  # named, since line searches refuse what their function does not take
        return objective(params)

    value = objective(params) if value is None else value
    return transform.update(grads, state, params, value=value, grad=grads, value_fn=value_fn, obj_fn=objective)


def _chained(found: tuple[Stage, ...], steps: int, rate: Any) -> Transform:
    parts = []
    for i, stage in enumerate(found):
        if stage.wraps:  # all that comes after it
            if not found[i + 1 :]:
                raise ConfigError(
                    f"optimizer stage {stage.name!r} holds the stages after it, and there are none: put it first"
                )
            parts.append(kept(stage.name, _transform(stage, steps, rate, inner=_chained(found[i + 1 :], steps, rate))))
            break
        parts.append(kept(stage.name, _transform(stage, steps, rate)))
    return optax.chain(*parts)


def _transform(stage: Stage, steps: int, rate: Any, **inner: Transform) -> Transform:
    if stage.groups:
        groups = stage.groups
        chains = {name: _frozen_or_chained(group, steps, rate) for name, group in groups.items()}
        return of_part(optax.partition(chains, lambda params: labels(groups, params), mask_compatible_extra_args=True))
    arguments = dict(stage.arguments)
    parameters = stage.parameters
    if "learning_rate" in parameters:
        own = rate if stage.rate is None else stage.rate
        if isinstance(own, Mapping):
            arguments = {key: value for key, value in arguments.items() if key not in own}
        if own is not None and (stage.rate is not None or _required(parameters["learning_rate"])):
            arguments["learning_rate"] = _rate(stage, own, steps)
    if "steps" in parameters:
        arguments["steps"] = steps
    scheduled = {
        key: arguments.pop(key) for key in list(arguments) if key in parameters and is_scheduled(arguments[key])
    }

    def make(**numbers: Any) -> Transform:
        try:
            transform = stage.function(**arguments, **inner, **numbers)
        except (JaxlmError, jax.errors.JAXTypeError):  # the latter: a number can't be traced, see `static_arguments`
            raise
        except Exception as error:
            what = f"optimizer stage {stage.name!r}: {type(error).__name__}: {error}"
            raise ConfigError(what) from error
        if not isinstance(transform, optax.GradientTransformation):
            raise ConfigError(f"optimizer stage {stage.name!r} is no transform: it returned {type(transform).__name__}")
        if stage.function in OF_A_MATRIX:
            transform = layer_by_layer(transform)
        return optax.with_extra_args_support(transform)

    transform = _following(make, {key: _schedule(value, steps) for key, value in scheduled.items()})
    if stage.where is not None and "where" not in parameters:
        where = stage.where
        masked = optax.masked(transform, lambda params: tree.mask(params, where), mask_compatible_extra_args=True)
        return of_part(masked)
    return transform


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _frozen_or_chained(group: Group, steps: int, rate: Any) -> optax.GradientTransformation:
    if not group.stages:
        return optax.set_to_zero()  # without state
    own = _first_rate(group.stages)
    return _chained(group.stages, steps, rate if own is None else own)


class Following(NamedTuple):
    """The state of a stage with arguments that follow a schedule."""

    step: jax.Array  # int32[]
    inner: PyTree


def _following(make: Callable[..., Transform], shapes: Mapping[str, Callable[[jax.Array], jax.Array]]) -> Transform:
    """The transform of `make`, its arguments in `shapes` being functions of the step."""
    if not shapes:
        return make()

    def at(count: jax.Array) -> Transform:
        return make(**{name: shape(count) for name, shape in shapes.items()})

    def init(params: PyTree) -> Following:
        count = jnp.zeros([], jnp.int32)
        return Following(count, at(count).init(params))

    def update(updates: PyTree, state: Following, params: PyTree = None, **extra: Any) -> tuple[PyTree, Following]:
        updates, inner = at(state.step).update(updates, state.inner, params, **extra)
        return updates, Following(optax.safe_increment(state.step), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def labels(groups: Mapping[str, Group], params: PyTree) -> PyTree:
    """A tree like `params` of the names of the groups that take them.

    Raises:
      ConfigError: a parameter in no group or in two, or a group that takes none.
    """
    paths = tree.paths(params)
    named = {
        name: jax.tree.leaves(tree.mask(params, group.where)) for name, group in groups.items() if group.where != REST
    }
    rest = [name for name, group in groups.items() if group.where == REST]
    if len(rest) > 1:
        raise ConfigError(f"groups {rest[0]!r} and {rest[1]!r} both take the {REST!r}")
    out = []
    for i, path in enumerate(paths):
        taken = [name for name, mask in named.items() if mask[i]] or rest
        if len(taken) != 1:
            what = f"are both to take {path!r}" if taken else f"leave {path!r} to no group; add one with where={REST!r}"
            raise ConfigError(f"the partition's groups {', '.join(map(repr, taken or groups))} {what}")
        out.append(taken[0])
    if rest and rest[0] not in out:
        raise ConfigError(f"group {rest[0]!r} takes the {REST!r}, and there is none")
    return jax.tree.unflatten(jax.tree.structure(params), out)


# Learning rates


def _schedule(rate: Any, steps: int) -> Any:
    """A number, or a function of the step where `rate` is the arguments of a schedule."""
    if not isinstance(rate, Mapping):
        return rate
    try:
        return scheduled.number(steps=steps, **rate)
    except (TypeError, ValueError) as error:
        if isinstance(error, jax.errors.JAXTypeError):
            raise
        raise ConfigError(f"schedule {rate.get('schedule', 'constant')!r}: {error}") from error


def _rate(stage: Stage, own: Any, steps: int) -> Any:
    """What a stage's function is given as its `learning_rate`: as `_schedule`."""
    rate = _schedule(own, steps)
    if callable(rate) and stage.function in kinds.OF_ONE_RATE:
        how = f"set optimizer.{stage.name}.learning_rate, without a peak or a schedule"
        raise ConfigError(f"optimizer stage {stage.name!r} takes a learning rate that is one number: {how}")
    if callable(rate) and stage.function in kinds.DIVIDES_BY_RATES:
        return lambda count: jnp.maximum(rate(count), 1e-9)
    return rate


def _first_rate(found: tuple[Stage, ...]) -> Any:
    return next((stage.rate for stage in walk(found) if stage.rate is not None), None)


def learning_rates(spec: Spec, hparams: Mapping[str, Any] | None, steps: int, count: jax.Array) -> dict[str, jax.Array]:
    """{stage: its learning rate at a step, float32[]} of all stages that set one, in the chain's order."""
    out = {}
    for stage in walk(stages(spec, hparams)):
        if stage.rate is not None:
            rate = _schedule(stage.rate, steps)
            out[stage.name] = jnp.float32(rate(count) if callable(rate) else rate)
    return out


def schedule_count(opt_state: PyTree, steps: jax.Array) -> jax.Array:
    """int32[]: the count at which schedules stand: less than the completed steps where some were skipped, which keep
    the optimizer's state as it was."""
    kind = optax.ScaleByScheduleState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return next((node.count for node in nodes if isinstance(node, kind)), steps)
