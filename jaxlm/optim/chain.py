"""The optimizer is data: an ordered tuple of stage names and a table of arguments each, made into an Optax chain.

What names and tables mean is `jaxlm.optim.stages`' story. The functions at the end edit a spec: each returns a new one.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxlm import tree
from jaxlm.errors import ConfigError, nearest
from jaxlm.optim import scheduled
from jaxlm.optim.parts import of_part
from jaxlm.optim.stages import REST, TABLES, Group, Spec, Stage, is_scheduled, names, stages, walk

PyTree = Any
Transform: TypeAlias = optax.GradientTransformationExtraArgs


def build(spec: Spec, hparams: Mapping[str, Any] | None, steps: int) -> Transform:
    """The Optax chain of a spec.

    Args:
      spec: a config's `optimizer` section or a structure's.
      hparams: the traced numbers, stage -> argument -> float32[]; None where `spec` holds all of its numbers.
      steps: the length of the run in optimizer steps.

    Its `update` hands on extra arguments to the stages that take them: `value`, `grad`, `value_fn`, `obj_fn`.

    Raises:
      ConfigError: see `stages.stages`; or a function's own complaint about its arguments.
    """
    found = stages(spec, hparams)
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
            parts.append(_transform(stage, steps, rate, inner=_chained(found[i + 1 :], steps, rate)))
            break
        parts.append(_transform(stage, steps, rate))
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
            arguments["learning_rate"] = _schedule(own, steps)
    if "steps" in parameters:
        arguments["steps"] = steps
    scheduled = {
        key: arguments.pop(key) for key in list(arguments) if key in parameters and is_scheduled(arguments[key])
    }

    def make(**numbers: Any) -> Transform:
        try:
            transform = stage.function(**arguments, **inner, **numbers)
        except (TypeError, ValueError) as error:
            if isinstance(error, jax.errors.JAXTypeError):
                raise  # a number that can't be traced, see `static_arguments`
            raise ConfigError(f"optimizer stage {stage.name!r}: {error}") from error
        if not isinstance(transform, optax.GradientTransformation):
            raise ConfigError(f"optimizer stage {stage.name!r} is no transform: it returned {type(transform).__name__}")
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


def updates_before(opt_state: PyTree, steps: jax.Array) -> jax.Array:
    """int32[]: the count at which schedules stand: less than the completed steps where some were skipped, which keep
    the optimizer's state as it was."""
    kind = optax.ScaleByScheduleState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return next((node.count for node in nodes if isinstance(node, kind)), steps)


def learning_rate(spec: Spec, hparams: Mapping[str, Any] | None, steps: int, count: jax.Array) -> jax.Array | None:
    """The learning rate of the first stage that has one, at a step, float32[]; None where no stage has."""
    return next(iter(learning_rates(spec, hparams, steps, count).values()), None)


# Edits. A spec is a plain mapping: these return plain dicts, and leave their argument alone.


def replace(spec: Spec, stage: str, by: str, **arguments: Any) -> dict[str, Any]:
    """`by`, with its own arguments, in the place of a stage."""
    return _edited(spec, stage, lambda chain, i: (*chain[:i], by, *chain[i + 1 :]), {by: arguments})


def insert_before(spec: Spec, stage: str, new: str, **arguments: Any) -> dict[str, Any]:
    """A new stage right before another."""
    return _edited(spec, stage, lambda chain, i: (*chain[:i], new, *chain[i:]), {new: arguments})


def insert_after(spec: Spec, stage: str, new: str, **arguments: Any) -> dict[str, Any]:
    """A new stage right after another."""
    return _edited(spec, stage, lambda chain, i: (*chain[: i + 1], new, *chain[i + 1 :]), {new: arguments})


def drop(spec: Spec, stage: str) -> dict[str, Any]:
    """The spec without a stage."""
    return _edited(spec, stage, lambda chain, i: (*chain[:i], *chain[i + 1 :]), {})


def with_args(spec: Spec, stage: str, **arguments: Any) -> dict[str, Any]:
    """The spec with some arguments of a stage set, the others as they were."""
    table = dict(_plain(spec).get(stage) or {})
    return _edited(spec, stage, lambda chain, i: chain, {stage: table | arguments})


def leave_one_out(spec: Spec) -> dict[str, dict[str, Any]]:
    """{"without NAME": the spec without it} for each stage but those that set a learning rate: an ablation's arms."""
    free = [stage.name for stage in stages(spec) if all(inner.rate is None for inner in walk((stage,)))]
    return {f"without {name}": drop(spec, name) for name in free}


def _edited(
    spec: Spec, stage: str, edit: Callable[[tuple[str, ...], int], tuple[str, ...]], tables: dict[str, Any]
) -> dict[str, Any]:
    out = _plain(spec)
    chain = tuple(out["chain"])
    if stage not in chain:
        raise ConfigError(f"no stage {stage!r} in optimizer.chain: {nearest(stage, chain)}")
    out["chain"] = edit(chain, chain.index(stage))
    if len(set(out["chain"])) < len(out["chain"]):
        raise ConfigError(f"{next(iter(tables))!r} is in optimizer.chain already; name one freely, with a 'transform'")
    out |= {name: table for name, table in tables.items() if table or name in out}
    for name in set(names(spec)) - set(names(out)):  # with the stages of a partition's groups
        out.pop(name, None)
    stages(out)
    return out


def _plain(spec: Spec) -> dict[str, Any]:
    """Tables as dicts, lists as tuples; what the chain's functions are is left as it is."""

    def plain(value: Any) -> Any:
        if isinstance(value, TABLES):
            return {key: plain(item) for key, item in value.items()}
        return tuple(map(plain, value)) if type(value) in (list, tuple) else value

    return plain(spec)


def to_json(spec: Spec) -> str:
    """A spec as JSON; `from_json` gives it back equal.

    Raises:
      ConfigError: a stage is a Python object, which JSON can't hold.
    """

    def refuse(value: Any) -> Any:
        raise ConfigError(
            f"an optimizer stage is a Python object, {value!r}, which JSON can't hold; name it module:function"
        )

    return json.dumps(_plain(spec), indent=2, default=refuse)


def from_json(text: str) -> dict[str, Any]:
    """The spec that `to_json` wrote."""
    return _plain(json.loads(text))


def lines(spec: Spec, numbered: bool = False, exact: bool = False) -> list[str]:
    """One line a stage, name(argument=value, ...), and one for each group of a partition before its own.

    Args:
      exact: Python objects that aren't the same read differently, by their places in memory.
    """
    numbers = itertools.count(1)

    def line(stage: Stage, depth: int) -> list[str]:
        shown = dict(stage.arguments) | ({"where": stage.where} if stage.where else {})
        transform = (dict(spec.get(stage.name) or {})).get("transform")
        if transform is not None and not isinstance(transform, str):
            transform = repr(getattr(transform, "update", transform)) if exact else "Python"
        head = f"{stage.name}: {transform}" if transform else stage.name
        number = f"{next(numbers)}. " if numbered else ""
        out = ["  " * depth + f"{number}{head}({', '.join(f'{key}={value!r}' for key, value in shown.items())})"]
        for name, group in stage.groups.items():
            out.append("  " * (depth + 1) + f"{name}, where={group.where!r}" + ("" if group.stages else ": frozen"))
            out += [text for inner in group.stages for text in line(inner, depth + 2)]
        return out

    return [text for stage in stages(spec) for text in line(stage, 0)]


def diff(old: Spec, new: Spec) -> str:
    """How two specs differ, a line a stage: "- " gone, "+ " new, "  " in both; "" where they are equal."""
    a, b = lines(old, exact=True), lines(new, exact=True)
    return "" if a == b else "\n".join(line for line in difflib.ndiff(a, b) if not line.startswith("?"))
