"""What a chain's names and tables mean: each stage found, its arguments checked, its numbers in their places.

    chain = ("clip_by_global_norm", "scale_by_adam", "scale_by_learning_rate")
    scale_by_adam = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}

A table holds the arguments of its function and, beside them:

- `transform`: the function's name where it isn't the stage's; from Python also the function, or what it returned;
- `where`: a named mask or a regex over parameter paths, outside which the stage changes nothing;
- `peak`, `schedule`, `warmup`, ... in the place of a `learning_rate`; and for any other number a table of these.

A function with a parameter `inner` is a *wrapper*: it is given all the stages that come after it. `partition` sends
parameters through chains of their own: `partition = {"matrices": {"where": "kernels", "chain": ("muon",)}, ...}`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import optax
import optax.contrib
from ml_collections import ConfigDict

from jaxlm import tree
from jaxlm.config import TRACED, flat, stage_names
from jaxlm.errors import ConfigError, nearest
from jaxlm.lookup import find
from jaxlm.optim import transforms
from jaxlm.optim.scheduled import find_schedule

Spec = Mapping[str, Any]
"""A config's `optimizer` section, or the same in a structure, where traced numbers are marked."""

SCHEDULED = ("peak", "schedule")
TABLES = (Mapping, ConfigDict)
MODULES = (transforms, optax, optax.contrib)
"""Where the name of a transform is looked up, in this order."""
PARTITION = "partition"
REST = "rest"
"""As the `where` of a group of a partition: what no other group takes."""


class Group(NamedTuple):
    """A part of the parameters and the stages that they go through."""

    where: str
    stages: tuple[Stage, ...]


class Stage(NamedTuple):
    """One stage of a chain, checked."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    where: str | None
    groups: dict[str, Group]  # of a partition; else empty

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def wraps(self) -> bool:
        return "inner" in self.parameters

    @property
    def rate(self) -> Any:
        """What sets its learning rate: a number, the arguments of a schedule, or None."""
        ours = self.function is transforms.scale_by_learning_rate
        if "peak" in self.arguments and (ours or "learning_rate" in self.parameters):
            own = set() if ours else set(self.parameters) - {*SCHEDULED}
            return {key: value for key, value in self.arguments.items() if key not in own}
        if "learning_rate" not in self.parameters:
            return None
        usual = self.parameters["learning_rate"].default  # as prodigy's
        return self.arguments.get("learning_rate", usual if isinstance(usual, float) else None)


def stages(spec: Spec, hparams: Mapping[str, Any] | None = None) -> tuple[Stage, ...]:
    """The stages of a chain in order, with the traced numbers of `hparams` in their places.

    Raises:
      ConfigError: an unknown or repeated stage, an unknown or missing argument, a mask that does not compile.
    """
    if not isinstance(spec.get("chain"), (tuple, list)):
        own = "{'chain': (...), ...}" if "optimizer" not in spec else "cfg.optimizer.to_dict()"
        raise ConfigError(f"a spec without a chain; expected a config's optimizer section, {own}")
    named = names(spec)
    repeated = [name for name in dict.fromkeys(named) if named.count(name) > 1]
    if repeated:
        raise ConfigError(f"optimizer.chain has {repeated[0]!r} twice; name one freely and set its 'transform'")
    if not spec["chain"]:
        raise ConfigError("optimizer.chain is empty; it needs at least 'scale_by_learning_rate'")
    found = _stages(spec, hparams or {})
    follows = any(stage.rate is not None for stage in walk(found))
    for stage in walk(found):
        _check_arguments(stage, follows)
    return found


def walk(found: tuple[Stage, ...]) -> Iterator[Stage]:
    """All stages, those of a partition's groups after it."""
    for stage in found:
        yield stage
        for group in stage.groups.values():
            yield from walk(group.stages)


def names(spec: Spec, seen: tuple[str, ...] = ()) -> list[str]:
    """The names in a chain and in the chains of its partitions."""
    out: list[str] = []
    for name in spec["chain"]:
        out.append(name)
        if name in seen:
            raise ConfigError(f"optimizer.{name}: its chain names itself")
        table = spec.get(name) or {}
        if _is_partition(name, table):
            for key, group in table.items():
                if isinstance(group, TABLES) and "chain" in group:
                    inside = stage_names(f"optimizer.{name}.{key}.chain", group["chain"])
                    out += names({**spec, "chain": inside}, (*seen, name))
    return out


def _stages(spec: Spec, hparams: Mapping[str, Any]) -> tuple[Stage, ...]:
    return tuple(_stage(name, spec, hparams) for name in spec["chain"])


def _is_partition(name: str, table: Mapping[str, Any]) -> bool:
    return table.get("transform", name) == PARTITION


def _stage(name: str, spec: Spec, hparams: Mapping[str, Any]) -> Stage:
    table = dict(spec.get(name) or {})
    if _is_partition(name, table):
        return Stage(name, optax.partition, {}, None, _groups(name, table, spec, hparams))
    arguments = _filled(table, hparams.get(name, {}))
    function = find_transform(name, arguments.pop("transform", name))
    where = arguments.get("where")
    if where is not None:
        tree.pattern(where)
        if "where" not in inspect.signature(function).parameters:
            del arguments["where"]
    unset = [path for path, value in flat(arguments).items() if isinstance(value, str) and value == TRACED]
    if unset:
        raise ConfigError(f"optimizer.{name}.{unset[0]} is marked as traced, but the hyperparameters don't hold it")
    return Stage(name, function, arguments, where, {})


def _groups(name: str, table: dict[str, Any], spec: Spec, hparams: Mapping[str, Any]) -> dict[str, Group]:
    table.pop("transform", None)
    out = {}
    for key, group in table.items():
        if not isinstance(group, TABLES) or set(group) != {"where", "chain"}:
            raise ConfigError(
                f"optimizer.{name}.{key} is {group!r}; expected {{'where': a mask or regex, 'chain': names of stages}}"
            )
        if group["where"] != REST:
            tree.pattern(group["where"])
        inside = stage_names(f"optimizer.{name}.{key}.chain", group["chain"])
        out[key] = Group(group["where"], _stages({**spec, "chain": inside}, hparams))
    if not out:
        raise ConfigError(f"optimizer.{name} has no groups; expected {{'name': {{'where': ..., 'chain': ...}}, ...}}")
    return out


def _filled(table: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A table, or tables in a table, with `numbers`, nested alike, in their places."""
    return {
        key: _filled(value, numbers.get(key, {})) if isinstance(value, TABLES) else numbers.get(key, value)
        for key, value in table.items()
    }


def find_transform(stage: str, name: Any) -> Callable[..., Any]:
    """The function that a transform's name means: ours before optax's, as `scale_by_learning_rate`, which takes a
    schedule. A function, or what one returned, is taken as it is."""
    if isinstance(name, optax.GradientTransformation):
        return lambda: name
    if callable(name):
        return name
    if not isinstance(name, str):
        how = "; give its .gradient_transformation()" if hasattr(name, "gradient_transformation") else ""  # MultiSteps
        raise ConfigError(
            f"optimizer.{stage}.transform is {name!r}; expected the name of a function, or a transform{how}"
        )
    if name.startswith("<"):
        raise ConfigError(
            f"optimizer.{stage}.transform was a Python object, {name}, which JSON can't hold; give the same from Python"
        )
    if name.startswith("contrib."):
        return find("optimizer transform", name.removeprefix("contrib."), optax.contrib)
    return find("optimizer transform", name, *MODULES)


def is_named(function: Callable[..., Any]) -> bool:
    """Whether a transform's name, the function's own, means this very function."""
    name = getattr(function, "__name__", "")
    found = (getattr(module, name) for module in MODULES if hasattr(module, name))
    return next(found, None) is function


def is_scheduled(value: Any) -> bool:
    """Whether an argument is a table in the place of a number."""
    return isinstance(value, TABLES) and any(key in value for key in SCHEDULED)


def _check_arguments(stage: Stage, follows: bool) -> None:
    """`follows`: the chain has a learning rate, which a stage that needs one and is given none takes over."""
    if stage.groups:
        return
    name, arguments, parameters = stage.name, stage.arguments, dict(stage.parameters)
    if "learning_rate" in parameters and {"learning_rate", "peak"} <= set(arguments):
        raise ConfigError(
            f"optimizer.{name} has a 'learning_rate' and a 'peak', which are two names for one number; leave one out"
        )
    if stage.wraps and stage.where is not None and "where" not in parameters:
        raise ConfigError(
            f"optimizer.{name}.where={stage.where!r}: a wrapper holds all stages after it, and without them the other "
            "parameters climb; put it into a group of a partition"
        )
    for given in ("steps", "inner"):  # by `chain.build`
        parameters.pop(given, None)
    known = {key for key, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    required = {key for key in known if parameters[key].default is inspect.Parameter.empty}
    if any(key in arguments for key in SCHEDULED) and {"learning_rate", "peak"} & set(parameters):
        known |= {*SCHEDULED, *_schedule_arguments(arguments)}
        required = (required - {"learning_rate"}) | {"peak"}
    elif any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known |= set(arguments)
    if follows and stage.rate is None:
        required -= {"learning_rate"}
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(
                f"optimizer stage {name!r} takes no argument {key!r}: {nearest(key, known | {'where', 'transform'})}"
            )
        if is_scheduled(value):
            allowed = {*SCHEDULED, *_schedule_arguments(value)}
            for part in value:
                if part not in allowed:
                    raise ConfigError(f"optimizer.{name}.{key} takes no {part!r}: {nearest(part, allowed)}")
            if "peak" not in value:
                raise ConfigError(f"optimizer.{name}.{key} follows a schedule and lacks its 'peak'")
    missing = sorted(required - set(arguments))
    if missing:
        how = f"set optimizer.{name}.{missing[0]}"
        if re.search("[.:]", name):  # no key of a config
            how = f"name the stage freely and give it a table with {missing[0]!r} and 'transform': {name!r}"
        if not getattr(stage.function, "__module__", "").startswith(("jaxlm.", "optax.")):
            how += "; or if it is to be given the stages after it, call it 'inner'"
        raise ConfigError(f"optimizer stage {name!r} lacks its argument {missing[0]!r}: {how}")


def _schedule_arguments(table: Mapping[str, Any]) -> set[str]:
    """The names that a table's schedule takes; all of the table's, where it takes any."""
    parameters = inspect.signature(find_schedule(table.get("schedule", "constant"))).parameters
    names = set(parameters) - {"steps"}
    return names | set(table) if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else names
